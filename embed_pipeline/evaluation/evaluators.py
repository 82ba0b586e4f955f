"""sentence-transformers' own evaluators, chosen by the kind of a source and by what its split holds.

Their figures get plain names, `<source>/<metric>`, that MLflow takes and that are the same in its runs, in the report
and in a model's card: `sts/spearman`, `nli/triplet_accuracy`, `faq/ndcg_at_10`.

| kind, and what the split holds | evaluator | main metric |
|---|---|---|
| retrieval | InformationRetrievalEvaluator | `ndcg_at_10` |
| retrieval, with passages judged as not relevant | TripletEvaluator, RerankingEvaluator | `triplet_accuracy` |
| scored | EmbeddingSimilarityEvaluator | `spearman` |
| labelled pairs, one of two classes means alike | BinaryClassificationEvaluator, ParaphraseMiningEvaluator | `ap` |
| labelled pairs of other classes | accuracy of a linear classifier, see below | `label_accuracy` |
| labelled texts | TripletEvaluator on triplets drawn from the classes | `triplet_accuracy` |
| parallel | TranslationEvaluator; with a teacher, MSEEvaluator | `translation_accuracy` |

LabelAccuracyEvaluator asks the layer that SoftmaxLoss trains and then drops, which a base model never had. In its place
a linear classifier over the same features is fitted to train rows for each model that is measured, as SentEval does
(Conneau and Kiela, LREC 2018).

A cross-encoder is measured by CrossEncoderRerankingEvaluator over BM25's first passages (retrieval),
CrossEncoderCorrelationEvaluator (scored) and CrossEncoderClassificationEvaluator (labelled pairs of two classes).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    CrossEncoderRerankingEvaluator,
)
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    MSEEvaluator,
    ParaphraseMiningEvaluator,
    RerankingEvaluator,
    TranslationEvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import cos_sim, pairwise_cos_sim

from embed_pipeline.errors import ArtifactError
from embed_pipeline.evaluation.bm25 import bm25_search
from embed_pipeline.evaluation.figure import Figure
from embed_pipeline.losses import RETRIEVAL_KINDS, SourceKind
from embed_pipeline.models.collection import load_collection
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.models.search import finite_rows
from embed_pipeline.tables import EXAMPLES_FILE

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    from embed_pipeline.models.precision import ResolvedPrecision

logger = logging.getLogger(__name__)

FIRST_PASSAGES = 20  # of BM25's ranking, that a cross-encoder reorders
PARAPHRASES = 2_000  # with more sentences than this, mining for paraphrases among them takes too long
TRAIN_ROWS = 2_000  # that a linear classifier is fitted to
# The library says `cosine_ndcg@10`; every similarity here is the cosine.
_RENAMED = {"average_precision": "ap", "mean_accuracy": "translation_accuracy"}


@dataclass(frozen=True)
class MeasuredSource:
    """One source of data in a cleaned_pairs folder."""

    name: str
    kind: SourceKind
    folder: Path  # that of cleaned_pairs itself, or `tables.extra_folder` of it
    search: bool = True  # retrieval: rank the corpus too. False where the pipeline's own metrics do so already
    teacher: Embedder | None = None  # parallel: whose embedding of the first sentence both should have


Figures = dict[str, Figure]
"""`<source>/<metric>` -> figure"""


@dataclass(frozen=True)
class Part:
    """One evaluator of the library on one source, with our names for its figures."""

    source: str
    evaluator: BaseEvaluator
    main: str  # without the source
    prefix: str = ""  # of every name: two evaluators of a source may both have an accuracy
    # The items of some figures by the library's names, asked for right after the evaluator has run.
    items: Callable[[Any], Mapping[str, np.ndarray]] = lambda model: {}
    expected: np.ndarray | None = None
    sentences: bool = False  # encoded without a prompt, even where the evaluator asks for queries and documents

    def measure(self, model: _Encoded | _Predicted) -> Figures:
        """A model that gives what is no finite number has NaN as its main figure, and no other."""
        asked = _Sentences(model) if self.sentences and isinstance(model, _Encoded) else model
        try:
            found = cast("dict[str, float]", self.evaluator(cast("Any", asked)))
            items = self.items(asked)
        except _NotFiniteError:
            return {f"{self.source}/{self.main}": Figure(float("nan"))}
        return {
            f"{self.source}/{self.named(name)}": Figure(
                float(value), items.get(name), self.expected, "pearson" if name.startswith("pearson") else "spearman"
            )
            for name, value in found.items()
        }

    def named(self, name: str) -> str:
        plain = name.removeprefix("cosine_").removesuffix("_cosine").replace("base_", "bm25_").replace("@", "_at_")
        return self.prefix + _RENAMED.get(plain, plain)


class _Ran(BaseEvaluator):
    """A part as SequentialEvaluator runs it: keeps the figures, gives their values."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        self.figures: Figures = {}
        self.primary_metric = f"{part.source}/{part.main}"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        self.figures = self.part.measure(model)
        return {name: figure.value for name, figure in self.figures.items()}


@dataclass(frozen=True)
class EmbedderEvaluators:
    """What an embedder is measured by, as often as one likes."""

    parts: tuple[Part, ...]

    def __call__(self, model: SentenceTransformer, precision: ResolvedPrecision = "float32") -> dict[str, float]:
        """`<source>/<metric>` -> value, of a model in memory such as one in training. Writes and prints nothing."""
        return {name: figure.value for name, figure in self.measure(Embedder.around(model, precision)).items()}

    def measure(self, embedder: Embedder) -> Figures:
        """The same with the items behind the figures, so that two models can be compared."""
        return _measure(self.parts, _Encoded(embedder))

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """The names of the figures that matter most: the main one of each evaluator, in the order of the sources."""
        return tuple(f"{part.source}/{part.main}" for part in self.parts)


@dataclass(frozen=True)
class RerankerEvaluators:
    """What a reranker is measured by."""

    parts: tuple[Part, ...]

    def __call__(self, model: CrossEncoder, precision: ResolvedPrecision = "float32") -> dict[str, float]:
        """`<source>/<metric>` -> value, of a model in memory. Writes and prints nothing."""
        return {name: figure.value for name, figure in self.measure(Reranker.around(model, precision)).items()}

    def measure(self, reranker: Reranker) -> Figures:
        return _measure(self.parts, _Predicted(reranker))

    @property
    def main_metrics(self) -> tuple[str, ...]:
        return tuple(f"{part.source}/{part.main}" for part in self.parts)


def embedder_evaluators(
    sources: Sequence[MeasuredSource], split: str, *, seed: int, max_queries: int | None, max_passages: int | None
) -> EmbedderEvaluators | None:
    """The evaluators for `split` of each source; None where no source has anything to measure on.

    Of each source a seeded sample of at most `max_queries` queries or examples is taken, and of a corpus at most
    `max_passages` passages, more if the judged ones alone are more. Raises ArtifactError where a table is missing.
    """
    parts: list[Part] = []
    for source in sources:
        found = list(_embedder_parts(source, split, seed, max_queries, max_passages))
        if not found:
            logger.info("%s: nothing of split %s can be measured", source.name, split)
        parts += found
    return EmbedderEvaluators(tuple(parts)) if parts else None


def reranker_evaluators(
    sources: Sequence[MeasuredSource], split: str, *, seed: int, max_queries: int | None, max_passages: int | None
) -> RerankerEvaluators | None:
    """The same for a cross-encoder; parallel sentences and single texts say nothing of one."""
    parts = [part for source in sources for part in _reranker_parts(source, split, seed, max_queries, max_passages)]
    return RerankerEvaluators(tuple(parts)) if parts else None


def retrieval_part(
    source: str, queries: Mapping[str, str], passages: Mapping[str, str], relevant: Mapping[str, set[str]]
) -> Part:
    """The search of a corpus, with every figure of every query. Grades count as relevant or not."""
    evaluator = _Searching(
        dict(queries),
        dict(passages),
        dict(relevant),
        score_functions={"cosine": cos_sim},
        main_score_function="cosine",
    )
    return Part(source, evaluator, "ndcg_at_10", items=lambda _: evaluator.by_query)


def mean_part(source: str, parts: Sequence[Part]) -> Part:
    """The mean over parts of the same figures, such as those of several sets; no text is encoded twice for it."""
    evaluator = _Mean(parts)
    return Part(source, evaluator, parts[0].main, items=lambda _: evaluator.items)


# ----------------------------------------------------------------------------------------------- embedders


def _embedder_parts(
    source: MeasuredSource, split: str, seed: int, max_queries: int | None, max_passages: int | None
) -> Iterator[Part]:
    if source.kind in RETRIEVAL_KINDS:
        yield from _retrieval_parts(source, split, seed, max_queries, max_passages)
        return
    rows = _examples(source.folder, split, seed, max_queries)
    if source.kind == "scored":
        yield from _scored_parts(source.name, rows)
    elif source.kind == "parallel":
        yield from _parallel_parts(source, rows)
    elif rows and rows[0].second is None:
        yield from _text_class_parts(source.name, rows, seed)
    elif all(row.score is not None for row in rows):
        yield from _alike_parts(source.name, rows)
    else:
        yield from _pair_class_parts(source, rows, seed)


def _retrieval_parts(
    source: MeasuredSource, split: str, seed: int, max_queries: int | None, max_passages: int | None
) -> Iterator[Part]:
    asked = _Asked.read(source.folder, split, seed, max_queries, max_passages)
    if source.search and asked.queries:
        yield retrieval_part(source.name, asked.queries, asked.passages, asked.relevant)
    refused = {query: ids for query, ids in asked.refused.items() if ids}
    if not refused:
        return
    triplets = [
        (query, sorted(asked.relevant[query])[i % len(asked.relevant[query])], negative)
        for query, ids in refused.items()
        for i, negative in enumerate(ids)
    ]
    yield _triplet_part(
        source.name,
        [asked.queries[query] for query, _, _ in triplets],
        [asked.passages[positive] for _, positive, _ in triplets],
        [asked.passages[negative] for _, _, negative in triplets],
        sentences=False,
    )
    reranking = _Reranking(
        [
            {
                "query": asked.queries[query],
                "positive": [asked.passages[id] for id in sorted(asked.relevant[query])],
                "negative": [asked.passages[id] for id in ids],
            }
            for query, ids in refused.items()
        ]
    )
    yield Part(source.name, reranking, "reranking_ndcg_at_10", "reranking_", items=lambda _: reranking.by_query)


def _triplet_part(
    source: str, anchors: list[str], positives: list[str], negatives: list[str], *, sentences: bool
) -> Part:
    def items(model: Any) -> Mapping[str, np.ndarray]:
        of_anchors = model.encode_query(anchors)
        scores = [pairwise_cos_sim(of_anchors, model.encode_document(texts)) for texts in (positives, negatives)]
        return {"cosine_accuracy": (scores[0] > scores[1]).numpy().astype(np.float64)}

    evaluator = TripletEvaluator(anchors, positives, negatives, main_similarity_function="cosine")
    return Part(source, evaluator, "triplet_accuracy", "triplet_", items, sentences=sentences)


def _scored_parts(source: str, rows: Sequence[_Row]) -> Iterator[Part]:
    expected = np.array([row.score for row in rows], dtype=np.float64)
    if len(np.unique(expected)) < 2:
        return  # no rank correlation is defined
    first, second = _sides(rows)
    evaluator = EmbeddingSimilarityEvaluator(first, second, expected.tolist(), main_similarity="cosine")

    def items(model: Any) -> Mapping[str, np.ndarray]:
        similarity = pairwise_cos_sim(model.encode(first), model.encode(second)).numpy().astype(np.float64)
        return {"spearman_cosine": similarity, "pearson_cosine": similarity}

    yield Part(source, evaluator, "spearman", items=items, expected=expected)


def _alike_parts(source: str, rows: Sequence[_Row]) -> Iterator[Part]:
    labels = [int(row.score or 0.0) for row in rows]
    if len(set(labels)) < 2:
        return
    first, second = _sides(rows)
    yield Part(source, BinaryClassificationEvaluator(first, second, labels, similarity_fn_names=["cosine"]), "ap")
    sentences = sorted({*first, *second})
    if len(sentences) > PARAPHRASES:
        return
    number = {text: str(i) for i, text in enumerate(sentences)}
    alike = [
        (number[left], number[right])
        for left, right, label in zip(first, second, labels, strict=True)
        if label and left != right
    ]
    if alike:
        mining = ParaphraseMiningEvaluator({id: text for text, id in number.items()}, alike)
        yield Part(source, mining, "paraphrase_mining_ap", "paraphrase_mining_")


def _pair_class_parts(source: MeasuredSource, rows: Sequence[_Row], seed: int) -> Iterator[Part]:
    train = _examples(source.folder, "train", seed, TRAIN_ROWS)
    if rows and len({row.label for row in train}) > 1:
        evaluator = _LabelAccuracy(train, rows)
        yield Part(source.name, evaluator, "label_accuracy", items=lambda _: {"label_accuracy": evaluator.right})


def _text_class_parts(source: str, rows: Sequence[_Row], seed: int) -> Iterator[Part]:
    """One triplet a text: another one of its class, and one of another class."""
    by_class: dict[str | None, list[str]] = defaultdict(list)
    for row in rows:
        by_class[row.label].append(row.first)
    draw = np.random.default_rng([seed, 5])
    triplets = []
    for row in rows:
        alike = [text for text in by_class[row.label] if text != row.first]
        other = [text for label, texts in by_class.items() if label != row.label for text in texts]
        if alike and other:
            triplets.append((row.first, alike[draw.integers(len(alike))], other[draw.integers(len(other))]))
    if triplets:
        anchors, positives, negatives = (list(column) for column in zip(*triplets, strict=True))
        yield _triplet_part(source, anchors, positives, negatives, sentences=True)


def _parallel_parts(source: MeasuredSource, rows: Sequence[_Row]) -> Iterator[Part]:
    if len(rows) < 2:
        return
    first, second = _sides(rows)

    def found(model: Any) -> Mapping[str, np.ndarray]:
        similarity = cos_sim(model.encode(first), model.encode(second)).numpy()
        # As the evaluator does it: the same text twice is the same translation.
        right = {
            "src2trg_accuracy": [second[i] == second[j] for i, j in enumerate(similarity.argmax(axis=1))],
            "trg2src_accuracy": [first[i] == first[j] for i, j in enumerate(similarity.argmax(axis=0))],
        }
        items = {name: np.array(values, dtype=np.float64) for name, values in right.items()}
        return {**items, "mean_accuracy": (items["src2trg_accuracy"] + items["trg2src_accuracy"]) / 2}

    yield Part(source.name, TranslationEvaluator(first, second), "translation_accuracy", items=found)
    if source.teacher is not None:
        with _quiet():
            teacher = cast("Any", _Encoded(source.teacher))
            evaluator = _Mse(first, second, teacher_model=teacher)
        wanted = np.asarray(evaluator.source_embeddings)

        def errors(model: Any) -> Mapping[str, np.ndarray]:
            found = model.encode(second)
            if found.shape != wanted.shape:
                return {}
            return {"negative_mse": -100.0 * ((wanted - found) ** 2).mean(axis=1).astype(np.float64)}

        yield Part(source.name, evaluator, "negative_mse", items=errors)


class _Searching(InformationRetrievalEvaluator):
    """Keeps the figures of each query: those of the library's own formulas, asked for one query at a time."""

    by_query: Mapping[str, np.ndarray] = {}

    def compute_metrics(self, queries_result_list: list[Any]) -> Any:
        one, rows = copy(self), []
        for row, found in enumerate(queries_result_list):
            one.queries_ids, one.queries = [self.queries_ids[row]], [self.queries[row]]
            figures = super(_Searching, one).compute_metrics([found])
            rows.append(
                {
                    f"cosine_{name.replace('@k', f'@{k}')}": float(value)
                    for name, at in figures.items()
                    for k, value in at.items()
                }
            )
        self.by_query = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        return super().compute_metrics(queries_result_list)


class _Reranking(RerankingEvaluator):
    """Keeps the figures of each query."""

    by_query: Mapping[str, np.ndarray] = {}

    def compute_metrics(self, model: Any) -> dict[str, float]:
        one, rows = copy(self), []
        for sample in self.samples:
            one.samples = [sample]
            rows.append(one.compute_metrics_batched(model))
        names = {"map": "map", "mrr": f"mrr@{self.at_k}", "ndcg": f"ndcg@{self.at_k}"}
        self.by_query = {name: np.array([float(row[short]) for row in rows]) for short, name in names.items()}
        return {short: float(self.by_query[name].mean()) for short, name in names.items()}


class _Mean(BaseEvaluator):
    """Every figure as the mean over several sets."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = parts
        self.items: dict[str, np.ndarray] = {}
        self.primary_metric = parts[0].main

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        found = [
            {name.rpartition("/")[2]: figure for name, figure in part.measure(model).items()} for part in self.parts
        ]
        names = [name for name in found[0] if all(name in of_part for of_part in found)]
        self.items = {}
        for name in names:
            of_sets = [of_part[name].items for of_part in found]
            known = [items for items in of_sets if items is not None]
            if len(known) == len(of_sets):
                self.items[name] = _of_mean(known)
        return {name: float(np.mean([of_part[name].value for of_part in found])) for name in names}


def _of_mean(of_sets: Sequence[np.ndarray]) -> np.ndarray:
    """Each set's (n,) items -> (all,) items whose plain mean is the mean of the sets' means."""
    count = sum(len(items) for items in of_sets)
    return np.concatenate([items * (count / (len(of_sets) * len(items))) for items in of_sets])


class _Mse(MSEEvaluator):
    """NaN where the embeddings have another dimension than the teacher's, so that nothing can be told."""

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        if model.encode(self.target_sentences[:1]).shape[1] != self.source_embeddings.shape[1]:
            return {"negative_mse": float("nan")}
        return super().__call__(model)


class _LabelAccuracy(BaseEvaluator):
    """How many pairs a linear classifier over u, v and |u - v| puts into their class; it is fitted to train rows.

    These are SoftmaxLoss's own features (Reimers and Gurevych, EMNLP 2019).
    """

    def __init__(self, train: Sequence[_Row], rows: Sequence[_Row]) -> None:
        super().__init__()
        self.train, self.rows = train, rows
        self.primary_metric = "label_accuracy"
        self.right = np.empty(0)

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression

        classifier = LogisticRegression(C=10.0, max_iter=500)
        classifier.fit(_pair_features(model, self.train), [row.label for row in self.train])
        found = classifier.predict(_pair_features(model, self.rows))
        self.right = np.array([label == row.label for label, row in zip(found, self.rows, strict=True)], dtype=float)
        return {"label_accuracy": float(self.right.mean())}


def _pair_features(model: Any, rows: Sequence[_Row]) -> np.ndarray:
    first, second = _sides(rows)
    left, right = model.encode(first), model.encode(second)
    return np.hstack([left, right, np.abs(left - right)])


# ----------------------------------------------------------------------------------------------- rerankers


def _reranker_parts(
    source: MeasuredSource, split: str, seed: int, max_queries: int | None, max_passages: int | None
) -> Iterator[Part]:
    if source.kind in RETRIEVAL_KINDS:
        yield from _reordering_parts(source, split, seed, max_queries, max_passages)
        return
    rows = _examples(source.folder, split, seed, max_queries)
    if not rows or source.kind == "parallel" or any(row.score is None or row.second is None for row in rows):
        return
    pairs = [list(pair) for pair in zip(*_sides(rows), strict=True)]
    scores = np.array([row.score for row in rows], dtype=np.float64)
    if len(np.unique(scores)) < 2:
        return
    if source.kind == "scored":
        correlation = CrossEncoderCorrelationEvaluator(pairs, scores.tolist(), show_progress_bar=False)
        # The library's class leaves out its base's __init__.
        correlation.greater_is_better = True
        yield Part(
            source.name,
            correlation,
            "spearman",
            items=lambda model: dict.fromkeys(("pearson", "spearman"), model.predict(pairs).astype(np.float64)),
            expected=scores,
        )
    else:
        classes = CrossEncoderClassificationEvaluator(pairs, [int(score) for score in scores], show_progress_bar=False)
        yield Part(source.name, classes, "ap")


def _reordering_parts(
    source: MeasuredSource, split: str, seed: int, max_queries: int | None, max_passages: int | None
) -> Iterator[Part]:
    asked = _Asked.read(source.folder, split, seed, max_queries, max_passages)
    if not asked.queries:
        return
    ids, texts = list(asked.passages), list(asked.passages.values())
    found, _ = bm25_search(list(asked.queries.values()), texts, FIRST_PASSAGES, progress=False)
    samples: list[dict[str, str | list[str]]] = []
    for query, rows in zip(asked.queries, found.tolist(), strict=True):
        listed = [ids[row] for row in rows if row >= 0]
        listed += [id for id in asked.refused.get(query, ()) if id not in listed]
        positives = [asked.passages[id] for id in sorted(asked.relevant[query])]
        documents = [asked.passages[id] for id in listed] or positives
        samples.append({"query": asked.queries[query], "positive": positives, "documents": documents})
    evaluator = _Reordering(samples)
    yield Part(source.name, evaluator, "ndcg_at_10", items=lambda _: evaluator.by_query)


class _Reordering(CrossEncoderRerankingEvaluator):
    """Keeps the figures of each query: after reranking, and of BM25's own order."""

    by_query: Mapping[str, np.ndarray] = {}

    def __call__(self, *arguments: Any, **named: Any) -> dict[str, float]:
        self.rows: list[tuple[float, float, float]] = []
        found = super().__call__(*arguments, **named)
        after = np.array(self.rows[-len(self.samples) :], dtype=np.float64)
        names = (f"mrr@{self.at_k}", f"ndcg@{self.at_k}", "map")
        self.by_query = {name: after[:, column] for column, name in enumerate(names)}
        return found

    def compute_metrics(self, y_true: Any, y_pred: Any) -> tuple[float, float, float]:
        figures = super().compute_metrics(y_true, y_pred)
        self.rows.append(figures)
        return cast("tuple[float, float, float]", figures)


# ------------------------------------------------------------------------------------------------- a model


class _NotFiniteError(Exception):
    """A model gave something that is no finite number, which sklearn would answer with a traceback."""


@dataclass
class _Encoded:
    """An embedder as the library's evaluators ask it, which encodes no text twice: several ask for the same ones.

    It has the arithmetic and the cache of the embedder, and takes no figures into a model's card.
    """

    embedder: Embedder
    known: dict[str, dict[str, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))
    similarity_fn_name = "cosine"

    @property
    def model_card_data(self) -> _NoCard:
        return _NoCard()

    def encode_query(self, sentences: Sequence[str], **asked: Any) -> Any:
        return self._encode("query", self.embedder.encode_queries, sentences, **asked)

    def encode_document(self, sentences: Sequence[str], **asked: Any) -> Any:
        return self._encode("document", self.embedder.encode_passages, sentences, **asked)

    def encode(self, sentences: Sequence[str], **asked: Any) -> Any:
        return self._encode("sentence", self.embedder.encode_sentences, sentences, **asked)

    def _encode(
        self,
        task: str,
        encode: Callable[..., np.ndarray],
        texts: Sequence[str],
        *,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
        **_: Any,
    ) -> Any:
        known = self.known[task]
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            found = encode(new, progress=False)
            if not finite_rows(found).all():
                raise _NotFiniteError
            known.update(zip(new, found, strict=True))
        matrix = np.stack([known[text] for text in texts])
        if convert_to_tensor:
            return torch.from_numpy(matrix)
        return matrix if convert_to_numpy else list(torch.from_numpy(matrix))


@dataclass(frozen=True)
class _Sentences:
    """The same, where nothing is a query or a document."""

    encoded: _Encoded
    similarity_fn_name = "cosine"

    @property
    def model_card_data(self) -> _NoCard:
        return _NoCard()

    def encode(self, sentences: Sequence[str], **asked: Any) -> Any:
        return self.encoded.encode(sentences, **asked)

    encode_query = encode_document = encode


@dataclass
class _Predicted:
    """A reranker as the library's evaluators ask it: its scores are those of the model's own activation."""

    reranker: Reranker
    num_labels = 1

    @property
    def model_card_data(self) -> _NoCard:
        return _NoCard()

    def predict(self, sentences: Sequence[Sequence[str]], **_: Any) -> np.ndarray:
        pairs = [(pair[0], pair[1]) for pair in sentences]
        logits = torch.from_numpy(self.reranker.score(pairs, progress=False))
        if not torch.isfinite(logits).all():
            raise _NotFiniteError
        activation = self.reranker.model.activation_fn
        assert activation is not None
        scores: np.ndarray = activation(logits).numpy()
        return scores


class _NoCard:
    """The pipeline writes the card itself."""

    def set_evaluation_metrics(self, *_: Any) -> None:
        pass


def _measure(parts: Sequence[Part], model: _Encoded | _Predicted) -> Figures:
    ran = [_Ran(part) for part in parts]
    with _quiet():
        SequentialEvaluator(ran)(cast("Any", model))
    return {name: figure for one in ran for name, figure in one.figures.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """The evaluators log each figure that they return."""
    library = logging.getLogger("sentence_transformers")
    before = library.level
    library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        library.setLevel(before)


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class _Asked:
    """A sample of a split's queries with what is searched for them, in the order of the ids."""

    queries: dict[str, str]
    passages: dict[str, str]
    relevant: dict[str, set[str]]
    refused: dict[str, list[str]]  # judged as not relevant

    @classmethod
    def read(cls, folder: Path, split: str, seed: int, max_queries: int | None, max_passages: int | None) -> _Asked:
        collection = load_collection(folder, (split,))
        text_of = dict(zip(collection.query_ids.tolist(), collection.queries, strict=True))
        draw = np.random.default_rng([seed, 6])
        ids = _sample(sorted(text_of), max_queries, draw)
        qrels = collection.qrels()
        relevant = {query: {id for id, grade in qrels[query].items() if grade > 0} for query in ids}
        refused = {query: sorted(id for id, grade in qrels[query].items() if grade <= 0) for query in ids}
        texts = dict(zip(collection.passage_ids.tolist(), collection.texts, strict=True))
        judged = {id for query in ids for id in (*relevant[query], *refused[query])}
        others = sorted(set(texts) - judged)
        if max_passages is not None:
            others = _sample(others, max(0, max_passages - len(judged)), draw)
        searched = sorted([*judged, *others])
        return cls({id: text_of[id] for id in ids}, {id: texts[id] for id in searched}, relevant, refused)


@dataclass(frozen=True)
class _Row:
    first: str
    second: str | None
    score: float | None
    label: str | None


def _examples(folder: Path, split: str, seed: int, max_rows: int | None) -> list[_Row]:
    path = folder / EXAMPLES_FILE
    if not path.is_file():
        raise ArtifactError(
            f"no {EXAMPLES_FILE} in {folder}: expected the tables of a scored, labelled or parallel source. "
            "Materialize cleaned_pairs again"
        )
    table = pq.read_table(path, partitioning=None)
    rows = table.filter(pc.equal(table["split"], split)).sort_by("example_id").to_pylist()
    drawn = _sample(list(range(len(rows))), max_rows, np.random.default_rng([seed, 7]))
    return [_Row(*(rows[i][key] for key in ("sentence1", "sentence2", "score", "label"))) for i in drawn]


def _sample(ordered: list[Any], wanted: int | None, draw: np.random.Generator) -> list[Any]:
    if wanted is None or wanted >= len(ordered):
        return ordered
    return [ordered[i] for i in np.sort(draw.choice(len(ordered), size=wanted, replace=False))]


def _sides(rows: Sequence[_Row]) -> tuple[list[str], list[str]]:
    return [row.first for row in rows], [row.second or "" for row in rows]
