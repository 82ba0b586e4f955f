"""Which loss of sentence-transformers trains on which kind of source, from which rows, with which arguments.

Plain facts, so that a YAML can be checked without importing torch; a test holds them against the installed library.
`docs/losses.md` is made from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

SourceKind = Literal["pairs", "triplets", "beir", "flag-embedding", "scored", "labelled", "parallel"]
RETRIEVAL_KINDS: tuple[SourceKind, ...] = ("pairs", "triplets", "beir", "flag-embedding")
EXAMPLE_KINDS: tuple[SourceKind, ...] = ("scored", "labelled", "parallel")

# What a row of the trainer's data set is made of; `training.data_sets` builds them.
Rows = Literal[
    "group",  # query, positive, negative_1, ...
    "pair",  # query, positive
    "hardest",  # query, positive, the hardest negative of the group
    "triplet",  # query, positive, negative: one row a negative
    "judged",  # query, passage, label 1.0 or 0.0
    "teacher_group",  # query, positive, negative_1, ..., label: the teacher's score of each passage
    "teacher_pair",  # query, passage, label: the teacher's score
    "list",  # query, docs, labels 1.0 or 0.0
    "scored",  # sentence1, sentence2, score 0..1
    "classes",  # sentence1, sentence2, label: the class
    "text_classes",  # sentence, label: the class
    "embeddings",  # two texts, label: a teacher model's embedding of the first, or of each
]
BatchSampler = Literal["batch_sampler", "no_duplicates", "no_duplicates_hashed", "group_by_label", "group_by_length"]
Needs = Literal["guide", "teacher", "teacher_scores", "two_classes"]


@dataclass(frozen=True)
class Loss:
    """One loss: the rows it learns from, by kind of source, and what may be said of it in a YAML."""

    rows: Mapping[SourceKind, Rows]
    arguments: tuple[str, ...] = ()  # the library's own names, without those that our other settings decide
    needs: tuple[Needs, ...] = ()
    sampler: BatchSampler = "batch_sampler"  # the one its in-batch negatives or classes ask for
    defaults: Mapping[str, Any] = field(default_factory=dict)  # ours, where the library's do not suit unit vectors
    in_batch: bool = False  # takes `temperature` and `negatives_cross_device`
    cached: str | None = None  # its gradient-caching form, taken where `sub_batch_size` is set
    caches: bool = False  # is such a form itself: takes `sub_batch_size`
    reaches_cosines: bool = False  # learns differences of cosines, so a teacher's logits are mapped to 0..1
    has_margin: bool = False  # learns nothing more from rows that keep the margin, so its gradient may become zero
    layers: bool = True  # may be wrapped in AdaptiveLayerLoss or Matryoshka2dLoss


def _retrieval(rows: Rows) -> Mapping[SourceKind, Rows]:
    return MappingProxyType(dict.fromkeys(RETRIEVAL_KINDS, rows))


_RANKING = ("directions", "partition_mode", "hardness_mode", "hardness_strength")
_GIST = ("margin_strategy", "margin", "contrast_anchors", "contrast_positives")
_UNIT_MARGIN = MappingProxyType({"margin": 0.5})  # two unit vectors are at most 2 apart; the library's margin is 5
_JUDGED_OR_SCORED = MappingProxyType({**_retrieval("judged"), "scored": "scored"})
_JUDGED_OR_CLASSES = MappingProxyType({**_retrieval("judged"), "labelled": "classes"})
_TEXT_CLASSES: Mapping[SourceKind, Rows] = MappingProxyType({"labelled": "text_classes"})
_EMBEDDINGS = MappingProxyType({**_retrieval("embeddings"), "parallel": "embeddings"})

EMBEDDER_LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "MultipleNegativesRankingLoss": Loss(
            _retrieval("group"),
            _RANKING,
            sampler="no_duplicates",
            in_batch=True,
            cached="CachedMultipleNegativesRankingLoss",
        ),
        "CachedMultipleNegativesRankingLoss": Loss(
            _retrieval("group"),
            (*_RANKING, "mini_batch_num_tokens"),
            sampler="no_duplicates",
            in_batch=True,
            caches=True,
            layers=False,
        ),
        "MultipleNegativesSymmetricRankingLoss": Loss(
            _retrieval("group"),
            sampler="no_duplicates",
            in_batch=True,
            cached="CachedMultipleNegativesSymmetricRankingLoss",
        ),
        "CachedMultipleNegativesSymmetricRankingLoss": Loss(
            _retrieval("group"),
            ("mini_batch_num_tokens",),
            sampler="no_duplicates",
            in_batch=True,
            caches=True,
            layers=False,
        ),
        "GISTEmbedLoss": Loss(
            _retrieval("hardest"),
            _GIST,
            ("guide",),
            sampler="no_duplicates",
            in_batch=True,
            cached="CachedGISTEmbedLoss",
        ),
        "CachedGISTEmbedLoss": Loss(
            _retrieval("group"),
            (*_GIST, "mini_batch_num_tokens"),
            ("guide",),
            sampler="no_duplicates",
            in_batch=True,
            caches=True,
            layers=False,
        ),
        "MegaBatchMarginLoss": Loss(
            _retrieval("pair"),
            ("positive_margin", "negative_margin", "mini_batch_num_tokens"),
            sampler="no_duplicates",
            caches=True,
            has_margin=True,
            layers=False,
        ),
        "TripletLoss": Loss(
            _retrieval("triplet"),
            ("distance_metric", "triplet_margin"),
            defaults={"triplet_margin": 0.5},
            has_margin=True,
        ),
        "MarginMSELoss": Loss(_retrieval("teacher_group"), (), ("teacher_scores",), reaches_cosines=True),
        "DistillKLDivLoss": Loss(
            _retrieval("teacher_group"),
            ("temperature", "student_temperature", "teacher_temperature"),
            ("teacher_scores",),
        ),
        "CosineSimilarityLoss": Loss(_JUDGED_OR_SCORED),
        "CoSENTLoss": Loss(_JUDGED_OR_SCORED, ("scale",)),
        "AnglELoss": Loss(_JUDGED_OR_SCORED, ("scale",)),
        "ContrastiveLoss": Loss(
            _JUDGED_OR_CLASSES, ("distance_metric", "margin", "size_average"), ("two_classes",), has_margin=True
        ),
        "OnlineContrastiveLoss": Loss(
            _JUDGED_OR_CLASSES, ("distance_metric", "margin"), ("two_classes",), has_margin=True
        ),
        "SoftmaxLoss": Loss(
            MappingProxyType({"labelled": "classes"}),
            ("concatenation_sent_rep", "concatenation_sent_difference", "concatenation_sent_multiplication"),
        ),
        "BatchAllTripletLoss": Loss(
            _TEXT_CLASSES,
            ("distance_metric", "margin"),
            sampler="group_by_label",
            defaults=_UNIT_MARGIN,
            has_margin=True,
        ),
        "BatchHardTripletLoss": Loss(
            _TEXT_CLASSES,
            ("distance_metric", "margin"),
            sampler="group_by_label",
            defaults=_UNIT_MARGIN,
            has_margin=True,
        ),
        "BatchHardSoftMarginTripletLoss": Loss(_TEXT_CLASSES, ("distance_metric",), sampler="group_by_label"),
        "BatchSemiHardTripletLoss": Loss(
            _TEXT_CLASSES,
            ("distance_metric", "margin"),
            sampler="group_by_label",
            defaults=_UNIT_MARGIN,
            has_margin=True,
        ),
        "MSELoss": Loss(_EMBEDDINGS, ("projection_dim",), ("teacher",)),
        "EmbedDistillLoss": Loss(_EMBEDDINGS, ("distance_metric", "projection_dim"), ("teacher",)),
    }
)

_PAIRWISE = ("k", "sigma", "eps", "reduction_log", "mini_batch_size")
_LISTWISE = ("mini_batch_size", "respect_input_order")
_CROSS_RANKING = ("num_negatives", "scale")

RERANKER_LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "BinaryCrossEntropyLoss": Loss(
            MappingProxyType({**_retrieval("judged"), "scored": "scored", "labelled": "classes"}),
            ("pos_weight",),
            ("two_classes",),
        ),
        "MultipleNegativesRankingLoss": Loss(_retrieval("group"), _CROSS_RANKING, sampler="no_duplicates"),
        "CachedMultipleNegativesRankingLoss": Loss(
            _retrieval("group"), (*_CROSS_RANKING, "mini_batch_size"), sampler="no_duplicates"
        ),
        "ListNetLoss": Loss(_retrieval("list"), ("mini_batch_size",)),
        "LambdaLoss": Loss(_retrieval("list"), _PAIRWISE),
        "ListMLELoss": Loss(_retrieval("list"), _LISTWISE),
        "PListMLELoss": Loss(_retrieval("list"), _LISTWISE),
        "RankNetLoss": Loss(_retrieval("list"), _PAIRWISE),
        "ADRMSELoss": Loss(_retrieval("list"), ("alpha", "mini_batch_size")),
        "MSELoss": Loss(MappingProxyType({**_retrieval("teacher_pair"), "scored": "scored"}), (), ("teacher_scores",)),
        "MarginMSELoss": Loss(_retrieval("teacher_group"), (), ("teacher_scores",)),
    }
)

# Losses around another one, for embedders, with the arguments of their own.
_ADAPTIVE = (
    *("n_layers_per_step", "last_layer_weight", "prior_layers_weight"),
    *("kl_div_weight", "kl_temperature", "layer_weighting"),
)
WRAPPERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "MatryoshkaLoss": ("matryoshka_dims", "matryoshka_weights", "n_dims_per_step"),
        "AdaptiveLayerLoss": _ADAPTIVE,
        "Matryoshka2dLoss": ("matryoshka_dims", "matryoshka_weights", "n_dims_per_step", *_ADAPTIVE),
    }
)

# What the library has besides, and why no kind of source takes it.
NOT_OFFERED: Mapping[str, str] = MappingProxyType(
    {
        "ContrastiveTensionLoss": "learns from single texts without any judgement; every source here has one",
        "ContrastiveTensionLossInBatchNegatives": "learns from single texts without any judgement",
        "DenoisingAutoEncoderLoss": "learns from single texts without any judgement",
        "GlobalOrthogonalRegularizationLoss": "spreads embeddings and teaches no similarity: a term beside a loss",
        "CrossEntropyLoss": "gives a reranker one output a class; ours has one score",
    }
)

# Embedders learn from each kind by this one unless told otherwise.
DEFAULT_LOSSES: Mapping[SourceKind, str] = MappingProxyType(
    {
        **dict.fromkeys(RETRIEVAL_KINDS, "MultipleNegativesRankingLoss"),
        "scored": "CoSENTLoss",
        "labelled": "SoftmaxLoss",
        "parallel": "MSELoss",
    }
)


def losses_for(kind: SourceKind, losses: Mapping[str, Loss]) -> list[str]:
    """The names among `losses` that learn from a source of this kind."""
    return [name for name, loss in losses.items() if kind in loss.rows]
