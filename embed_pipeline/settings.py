"""Everything a pipeline can be told, one model per stage; every default lives here and nowhere else.

A pipeline's YAML is a :class:`PipelineSettings`. Unknown keys, wrong types and impossible combinations are refused
when definitions load, before any work. This module imports neither torch nor dagster, so loading stays fast.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
import typing
import urllib.parse
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from embed_pipeline.library_arguments import ModelKind, check_arguments, check_loss_arguments
from embed_pipeline.losses import (
    DEFAULT_LOSSES,
    EMBEDDER_LOSSES,
    EXAMPLE_KINDS,
    NOT_OFFERED,
    RERANKER_LOSSES,
    RETRIEVAL_KINDS,
    WRAPPERS,
    BatchSampler,
    Loss,
    SourceKind,
    losses_for,
)
from embed_pipeline.masking import secret_in

Engine = Literal["sentence-transformers", "flag-embedding"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Auto = Literal["auto"]
PIPELINE_NAME = r"[a-z][a-z0-9_]*"
# Part of names of folders, jobs and registered models, of which the longest parts that are added leave so much.
LONGEST_NAME = 64
Name = Annotated[str, Field(pattern=f"^{PIPELINE_NAME}$", max_length=LONGEST_NAME)]
MOST_ROWS = 1_000_000_000
MOST_TOKENS = 1_048_576  # of a text
LONGEST_INTERFACE = 15  # characters of its name, in Linux


def _somewhere(given: Any) -> Any:
    """A path that names something: an empty one would be the folder itself, and the root the whole disk."""
    if not isinstance(given, str | os.PathLike):
        return given
    text = os.fspath(given)
    if not text.strip():
        raise ValueError("the path is empty. Expected one relative to the YAML file, or an absolute one")
    if re.match(r"/[/.]*(?:$|\*\*)", text):
        raise ValueError("the path is the root of the file system. Name the folder that the files lie in")
    return given


def _as_class(given: Any) -> Any:
    """A class as files hold it: YAML reads `1` as a number and `true` as a boolean."""
    if isinstance(given, bool):
        return str(given).lower()
    return str(given) if isinstance(given, int) else given


ClassName = Annotated[str, BeforeValidator(_as_class)]
PathText = Annotated[str, BeforeValidator(_somewhere)]  # may hold wildcards
Place = Annotated[Path, BeforeValidator(_somewhere)]
Metric = Literal[
    "ndcg_at_10",
    "mrr_at_10",
    "recall_at_1",
    "recall_at_5",
    "recall_at_10",
    "recall_at_100",
    "hit_rate_at_1",
    "hit_rate_at_5",
    "hit_rate_at_10",
    "map_at_100",
    "spearman",  # of a pipeline whose own source is scored pairs, and only there
]


class Settings(BaseModel):
    """Base of all settings: frozen, finite, and an unknown key is answered with the allowed ones.

    Settings are published with what they made, so nothing that looks like a password or a token is one. Pydantic's own
    errors show no input: `wrong_values` adds it where it can be no secret.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        populate_by_name=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        allowed: dict[str, str] = {}
        for name, field in cls.model_fields.items():
            allowed[name] = name
            if isinstance(field.validation_alias, AliasChoices):
                allowed |= {str(alias): name for alias in field.validation_alias.choices}
        for key in given:
            if key not in allowed:
                near = difflib.get_close_matches(str(key), allowed, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"unknown key '{key}'.{hint} Allowed here: {', '.join(sorted(cls.model_fields))}")
        told: dict[str, str] = {}
        for key, value in given.items():
            if (other := told.setdefault(allowed[key], key)) != key:
                raise ValueError(f"`{other}` and `{key}` are two names of one key. Leave one out")
            if problem := _unfit(value, key):
                raise ValueError(problem)
        return given

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, given: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1, so `epochs: yes` would be one epoch."""
        types = list(_types_in(cls.model_fields[str(info.field_name)].annotation))
        is_number = (int in types or float in types) and bool not in types and Any not in types
        if is_number and (found := _boolean_in(given)) is not None:
            expected = "text or a number" if str in types else "a number"
            raise ValueError(f"must be {expected}; found {str(found).lower()}")
        return given


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from _types_in(part)


def _boolean_in(given: Any) -> bool | None:
    if isinstance(given, bool):
        return given
    inside = given.values() if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else ()
    return next((found for item in inside if (found := _boolean_in(item)) is not None), None)


def _unfit(value: Any, where: str) -> str | None:
    """Why a value that was given at `where`, or one inside of it, can stand in no settings."""
    if isinstance(value, Mapping):
        return next((told for key, item in value.items() if (told := _unfit(item, f"{where}.{key}"))), None)
    if isinstance(value, list | tuple):
        return next((told for i, item in enumerate(value) if (told := _unfit(item, f"{where}[{i}]"))), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where}: found {value}, expected a finite number. For no limit leave the key out, or write null"
    if not isinstance(value, str):
        return None
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return f"{where}: the text holds a zero character or half of a surrogate pair. Expected Unicode text"
    if secret := secret_in(value):
        return (
            f"{where}: the text holds {secret}, and settings are published with every version. Leave it to the "
            "environment of Dagster (such as HF_TOKEN, MLFLOW_TRACKING_URI or RAY_ADDRESS)"
        )
    return None


# ----------------------------------------------------------------------------------------------- models


class ModelSource(Settings):
    """Where a base model comes from: exactly one of a Hub id, a local folder, or an installed Python package."""

    hub: str | None = Field(None, description="Hub id, e.g. BAAI/bge-small-en-v1.5; needs `revision`")
    revision: str | None = Field(None, description="commit hash of the Hub repository (a branch name can move)")
    path: Place | None = Field(None, description="local folder; relative to the YAML file")
    package: str | None = Field(None, description="import name of a package that carries the model")
    folder: str = Field("model", description="the model's folder inside `package`")
    sha256: str | None = Field(None, description="expected SHA-256 of the weights file; checked before use")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _one_place(self) -> ModelSource:
        given = [key for key in ("hub", "path", "package") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(f"a model needs exactly one of hub, path, package; found {found}")
        if self.hub is not None and not _is_commit(self.revision):
            raise ValueError(
                f"hub model '{self.hub}' needs `revision`: the 40-digit commit hash shown under 'Files and versions' "
                f"on its Hub page; found {self.revision!r}. A branch such as main can change under a trained model"
            )
        if self.hub is None and self.revision is not None:
            raise ValueError("`revision` belongs to a hub model only")
        if self.sha256 is not None and not _is_hex(self.sha256, 64):
            raise ValueError(f"sha256 must be 64 hexadecimal digits; found {self.sha256!r}")
        return self


class EncodingSettings(Settings):
    """How a text becomes an embedding. Saved with the trained model and used by every stage after it.

    What is left out is taken from the base model's own folder, so a base model is used as its authors meant it; the
    maximum lengths follow from the texts.
    FlagEmbedding's names are accepted as well.
    """

    query_prompt: str | None = Field(
        None,
        validation_alias=AliasChoices("query_prompt", "query_instruction_for_retrieval"),
        description="put before every query",
    )
    passage_prompt: str | None = Field(
        None,
        validation_alias=AliasChoices("passage_prompt", "passage_instruction_for_retrieval"),
        description="put before every passage",
    )
    query_max_length: int | None = Field(
        None,
        ge=4,
        le=MOST_TOKENS,
        validation_alias=AliasChoices("query_max_length", "query_max_len"),
        description="tokens, special ones included; longer queries are cut. Unset: as many as 95 % of the train "
        "queries have, rounded up to a multiple of 8, at least 32 and at most the base model's own maximum",
    )
    passage_max_length: int | None = Field(
        None,
        ge=4,
        le=MOST_TOKENS,
        validation_alias=AliasChoices("passage_max_length", "passage_max_len"),
        description="likewise, by all passages; time and memory grow with it",
    )
    pooling: Literal["cls", "mean", "lasttoken"] | None = Field(
        None,
        validation_alias=AliasChoices("pooling", "sentence_pooling_method"),
        description="which of the token embeddings stand for the text",
    )
    normalize: Literal[True] | None = Field(
        None,
        validation_alias=AliasChoices("normalize", "normalize_embeddings"),
        description="always true: every model is trained and searched by cosine similarity",
    )

    @field_validator("normalize", mode="before")
    @classmethod
    def _by_cosine(cls, given: Any) -> Any:
        if given is False:
            raise ValueError(
                "normalize: false is not possible: mining, training and evaluation rank by cosine similarity, so "
                "embeddings are always normalised. Leave it out"
            )
        return given


# ---------------------------------------------------------------------------------------------- sources


class ColumnSettings(Settings):
    """Which delivered column holds what. Only the names that differ from ours need to be given.

    The columns that default to none are optional: unset, a column of our own name is used where a file has one; set,
    every file must have it. The same goes for the two id columns of pairs and triplets.
    """

    query: str = Field("query", description="the question")
    passage: str = Field("passage", description="pairs: the text that answers it")
    positive: str = Field("positive", description="triplets: the passage that answers")
    negative: str = Field(
        "negative", description="triplets: the passage that does not; negative_1, negative_2, ... are taken as well"
    )
    query_id: str = Field("query_id", description="its own id, where it has one; else one is made from the text")
    passage_id: str = Field("passage_id", description="likewise")
    qrels_query_id: str | None = Field(None, description="beir: its name in qrels, where it is not `query_id`'s")
    qrels_passage_id: str | None = Field(None, description="beir: its name in qrels, where it is not `passage_id`'s")
    relevance: str | None = Field(None, description="graded relevance; BEIR qrels default to `score`")
    title: str | None = Field(None, description="put before the passage's text when encoding")
    document_id: str | None = Field(None, description="passages of one document never stand in two splits")
    split: str | None = Field(
        None,
        description="a delivered split is honoured: train, dev, test, or a common name of one (training, validation, "
        "val, testing, ...); any other value is refused",
    )
    text: str = Field("text", description="the text column of BEIR corpus and queries, and of an extra corpus")
    sentence1: str = Field("sentence1", description="scored, labelled, parallel: the first text")
    sentence2: str | None = Field(None, description="the second text; labelled texts may stand alone")
    score: str = Field("score", description="scored: how alike the two are")
    label: str = Field(
        "label", description="labelled: the class: text, whole numbers or booleans; letter case makes none"
    )


# The keys of `columns` that mean something to each kind of source; another key would be ignored, so it is refused.
_COLUMN_KEYS = {
    "pairs": {"query", "passage", "query_id", "passage_id", "relevance", "title", "document_id", "split"},
    "triplets": {"query", "positive", "negative", "query_id", "passage_id", "document_id", "split"},
    "beir": {
        *("text", "query_id", "passage_id", "qrels_query_id", "qrels_passage_id"),
        *("relevance", "title", "document_id", "split"),
    },
    "extra_corpus": {"text", "passage_id", "title", "document_id"},
    "flag-embedding": set(),  # its names are fixed: query, pos, neg, pos_scores, neg_scores, prompt
    "scored": {"sentence1", "sentence2", "score", "document_id", "split"},
    "labelled": {"sentence1", "sentence2", "label", "document_id", "split"},
    "parallel": {"sentence1", "sentence2", "document_id", "split"},
}


class SourceSettings(Settings):
    """The user's files of one data set."""

    kind: SourceKind = Field(
        "pairs",
        description="for retrieval: pairs, triplets, beir (corpus, queries and qrels) or flag-embedding (its jsonl of "
        "query, pos, neg); else scored (two sentences and how alike they are), labelled (one or two sentences and a "
        "class) or parallel (a sentence and its translation)",
    )
    path: PathText | None = Field(
        None, description="every kind but beir: a file, a folder or a glob, relative to the YAML; see data.md"
    )
    corpus: PathText | None = Field(None, description="beir: corpus parquet (file, folder or glob)")
    queries: PathText | None = Field(None, description="beir: queries parquet")
    qrels: PathText | None = Field(None, description="beir: qrels parquet")
    columns: ColumnSettings = ColumnSettings()
    extra_corpus: PathText | None = Field(None, description="more passages that nobody asked about yet")
    extra_corpus_columns: ColumnSettings = ColumnSettings()
    script: Place | None = Field(
        None, description="Python script run before reading, as `python script OUTPUT_FOLDER`, to build the files"
    )
    script_output: Place | None = Field(
        None,
        description="its files; replaced whole by what `script` writes each time. A folder that holds anything else is "
        "refused, and nothing is deleted",
    )
    score_range: tuple[float, ...] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="scored: the scale of the scores, e.g. [1, 5]; mapped to 0..1. Unset: they are on it already",
    )
    positive_label: ClassName | None = Field(
        None,
        description="labelled: which of two classes means that the two sentences are alike; unset: 1 of 0 and 1, true "
        "of false and true. Losses and figures over pairs that are alike or not need it",
    )
    license: str | None = Field(None, description="of the data, for the model card, e.g. cc-by-4.0")

    @property
    def where(self) -> str:
        """The place in the YAML, for messages."""
        return "source"

    @property
    def extra_name(self) -> str | None:
        """The name of an extra source; None: the pipeline's own."""
        return None

    @property
    def is_retrieval(self) -> bool:
        """Questions with passages that answer them: what is mined, and searched in an evaluation."""
        return self.kind in RETRIEVAL_KINDS

    @model_validator(mode="after")
    def _right_paths(self) -> SourceSettings:
        wanted = {"corpus", "queries", "qrels"} if self.kind == "beir" else {"path"}
        for key in ("path", "corpus", "queries", "qrels"):
            value = getattr(self, key)
            if key in wanted and value is None:
                raise ValueError(f"a source of kind '{self.kind}' needs `{key}`")
            if key not in wanted and value is not None:
                raise ValueError(f"`{key}` does not belong to a source of kind '{self.kind}'")
        if (self.script is None) != (self.script_output is None):
            raise ValueError("`script` and `script_output` go together")
        if self.extra_corpus is not None and not self.is_retrieval:
            raise ValueError(f"`extra_corpus` does not belong to a source of kind '{self.kind}': nothing is searched")
        if self.positive_label is not None and self.kind != "labelled":
            raise ValueError(f"`positive_label` does not belong to a source of kind '{self.kind}'")
        if self.score_range is not None:
            if self.kind != "scored":
                raise ValueError(f"`score_range` does not belong to a source of kind '{self.kind}'")
            if self.score_range[0] >= self.score_range[1]:
                raise ValueError(f"score_range: expected [lowest, highest]; found {list(self.score_range)}")
        return self

    @model_validator(mode="after")
    def _column_keys_of_this_kind(self) -> SourceSettings:
        for where, columns, kind in (
            ("columns", self.columns, self.kind),
            ("extra_corpus_columns", self.extra_corpus_columns, "extra_corpus"),
        ):
            told = {key for key, value in columns if value != ColumnSettings.model_fields[key].default}
            for key in sorted(told - _COLUMN_KEYS[kind]):
                allowed = ", ".join(sorted(_COLUMN_KEYS[kind]))
                raise ValueError(f"`{where}.{key}` means nothing to a source of kind '{kind}'. Allowed: {allowed}")
        return self


# --------------------------------------------------------------------------------------------- cleaning


class NearDuplicateSettings(Settings):
    """MinHash over character shingles finds candidates, their exact Jaccard similarity decides."""

    action: Literal["merge", "keep"] = Field(
        "merge", description="merge: one passage of a cluster stays and inherits the judgements of the others"
    )
    threshold: Share = Field(0.85, description="Jaccard similarity from which two passages are near-duplicates")
    shingle_characters: int = Field(
        5, ge=2, le=20, description="length of the pieces that two passages are compared by"
    )
    permutations: int = Field(128, ge=16, le=1024, description="of MinHash: more find more candidates and take longer")


class SplitSettings(Settings):
    """Shares of the groups; a group is what is linked by a query, a document or a near-duplicate cluster."""

    dev: Share = Field(0.1, description="of the groups: for early stopping and every choice that is made by looking")
    test: Share = Field(0.2, description="of the groups: for the gate alone")
    overlap_tokens: int = Field(13, ge=4, le=1_000, description="length of the word runs looked for across splits")
    max_overlap: Share = Field(
        0.2, description="a train passage that holds more of a dev or test positive's word runs leaves train"
    )

    @model_validator(mode="after")
    def _leave_train(self) -> SplitSettings:
        if self.dev + self.test >= 1.0:
            raise ValueError(f"dev + test must leave rows for train; found {self.dev} + {self.test}")
        return self


class CleaningSettings(Settings):
    """What a row has to be to be kept, and how splits are cut."""

    query_min_characters: int = Field(
        2,
        ge=1,
        le=100_000_000,
        description="shorter ones are rejected; one character can be a word in Chinese, but hardly a question",
    )
    query_max_characters: int = Field(
        2_000, ge=1, le=100_000_000, description="longer ones are rejected: a document in the wrong column"
    )
    passage_min_characters: int = Field(2, ge=1, le=100_000_000, description="shorter ones are rejected")
    passage_max_characters: int = Field(
        100_000, ge=1, le=100_000_000, description="longer ones are rejected: no model reads them to their end"
    )
    missing_texts: tuple[str, ...] = Field(
        ("nan", "NaN", "NaT", "None", "NULL", "null", "N/A", "n/a", "NA", "<NA>", "#N/A"),
        description="a text, label or split that is exactly one of these stands for a missing one, as pandas' "
        "`astype(str)` and exports write it; of ids and documents only nan, NaN, NaT, None and <NA>. What was read so "
        "is counted and reported. []: all of them are texts",
    )
    max_missing_answers: Share = Field(
        0.05,
        description="the share of the answers, and of the questions, of a delivered dev or test split that may be lost "
        "because a text is missing or empty, and of any split's judgements that may name ids which do not exist; above "
        "it nothing is published",
    )
    near_duplicates: NearDuplicateSettings = NearDuplicateSettings()
    split: SplitSettings = SplitSettings()

    @model_validator(mode="after")
    def _least_below_most(self) -> CleaningSettings:
        for what in ("query", "passage"):
            least, most = getattr(self, f"{what}_min_characters"), getattr(self, f"{what}_max_characters")
            if least > most:
                raise ValueError(
                    f"{what}_min_characters ({least}) must not be above {what}_max_characters ({most}): every {what} "
                    "would be rejected"
                )
        return self


# ----------------------------------------------------------------------------------------------- mining


class CrossEncoderSettings(Settings):
    """A cross-encoder scores positives and the negatives that are left; losses that need a teacher learn its scores."""

    model: ModelSource
    max_score_ratio: Share | None = Field(
        0.95,
        description="a negative is refused when its score, mapped to 0..1, exceeds this share of the best-scored "
        "positive's; null: it refuses none and only teaches",
    )
    max_length: int = Field(512, ge=8, le=MOST_TOKENS, description="tokens of query and passage together")


class MiningSettings(Settings):
    """Positive-aware hard negatives (NV-Retriever, arXiv 2407.15831)."""

    top_k: int = Field(100, ge=1, le=100_000, description="passages retrieved per query; the depth of the search")
    range_min: int = Field(0, ge=0, le=100_000, description="skip this many of the best-ranked candidates")
    num_negatives: int = Field(
        8, ge=1, le=10_000, description="kept for each query; embedder.train_group_size - 1 of them are in a batch"
    )
    max_score_ratio: Share | None = Field(
        0.95, description="a negative may score at most this share of the query's lowest-scoring positive"
    )
    absolute_margin: float | None = Field(
        None, ge=0.0, le=2.0, description="a negative scores at least this much below"
    )
    sampling: Literal["top", "random"] = Field("top", description="the hardest that pass, or a seeded sample of them")
    fill_with_random: bool = Field(True, description="too few: add random passages, marked as such")
    cross_encoder: CrossEncoderSettings | None = None

    @model_validator(mode="after")
    def _window(self) -> MiningSettings:
        if self.range_min >= self.top_k:
            raise ValueError(f"range_min ({self.range_min}) must be below top_k ({self.top_k})")
        return self


# --------------------------------------------------------------------------------------------- training


class LossSettings(Settings):
    """What an embedder learns by from one source: a loss of sentence-transformers with its own arguments."""

    loss: str | None = Field(
        None,
        description="a loss of sentence-transformers; unset: MultipleNegativesRankingLoss for retrieval kinds, "
        "CoSENTLoss for scored, SoftmaxLoss for labelled, MSELoss for parallel",
    )
    loss_arguments: dict[str, Any] = Field(default_factory=dict, description="of the loss, by its own names")
    loss_wrapper: Literal["MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss"] | None = Field(
        None, description="a loss around the loss: embeddings that may be cut, models whose last layers may be"
    )
    loss_wrapper_arguments: dict[str, Any] = Field(
        default_factory=dict, description="of the wrapper, by its own names, e.g. matryoshka_dims"
    )
    guide: ModelSource | None = Field(None, description="GIST losses: an embedder that tells false negatives")
    teacher: ModelSource | None = Field(
        None, description="MSELoss, EmbedDistillLoss: an embedder whose embeddings are to be learnt"
    )

    def loss_for(self, kind: SourceKind) -> str:
        return self.loss or DEFAULT_LOSSES[kind]

    def problem_with(self, kind: SourceKind, cached: bool) -> str | None:
        """Why this loss cannot learn from a source of `kind`; None if it can."""
        name = self.loss_for(kind)
        if problem := _no_such_loss(name, kind, EMBEDDER_LOSSES):
            return problem
        loss = EMBEDDER_LOSSES[name]
        if cached and loss.cached is not None:
            name, loss = loss.cached, EMBEDDER_LOSSES[loss.cached]
        if problem := _wrong_arguments("embedder", name, self.loss_arguments, loss.arguments, "loss_arguments"):
            return problem
        if self.loss_wrapper is None:
            if self.loss_wrapper_arguments:
                return "`loss_wrapper_arguments` are given, but no `loss_wrapper`"
        else:
            given, allowed = self.loss_wrapper_arguments, WRAPPERS[self.loss_wrapper]
            if problem := _wrong_arguments("embedder", self.loss_wrapper, given, allowed, "loss_wrapper_arguments"):
                return problem
            if "matryoshka_dims" in allowed and not given.get("matryoshka_dims"):
                return f"{self.loss_wrapper} needs loss_wrapper_arguments.matryoshka_dims, e.g. [384, 192, 96]"
            if self.loss_wrapper != "MatryoshkaLoss" and not loss.layers:
                return f"{self.loss_wrapper} cannot be put around {name}: it runs the model several times a batch"
        for key in ("guide", "teacher"):
            if (key in loss.needs) != (getattr(self, key) is not None):
                return f"{name} needs `{key}`, an embedder" if key in loss.needs else f"{name} takes no `{key}`"
        return None


def _no_such_loss(name: str, kind: SourceKind, losses: Mapping[str, Loss]) -> str | None:
    fitting = f"Losses for a source of kind '{kind}': {', '.join(losses_for(kind, losses))}"
    if name in NOT_OFFERED:
        return f"{name} is not offered: it {NOT_OFFERED[name]}. {fitting}"
    if name not in losses:
        folded = {other.lower(): other for other in losses}
        near = difflib.get_close_matches(name.lower(), folded, n=1)
        hint = f" Did you mean '{folded[near[0]]}'?" if near else ""
        return f"no loss is called '{name}'.{hint} {fitting}"
    return None if kind in losses[name].rows else f"{name} does not fit the columns of kind '{kind}'. {fitting}"


def _wrong_arguments(
    kind: ModelKind, name: str, given: Mapping[str, Any], allowed: Sequence[str], key: str
) -> str | None:
    if unknown := sorted(set(given) - set(allowed)):
        return f"{key}: {name} takes no {', '.join(unknown)}. Allowed: {', '.join(allowed) or 'none'}"
    problem = check_loss_arguments(kind, name, given)
    return f"{key}: {problem}" if problem else None


class LoraSettings(Settings):
    """Low-rank adapters (arXiv 2106.09685) by PEFT's names; merged into the weights when the training ends."""

    r: int = Field(16, ge=1, le=65_536, description="rank of the adapters")
    lora_alpha: int = Field(32, ge=1, le=1_000_000, description="their scale is lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="on their input, while training")
    target_modules: str | tuple[str, ...] | None = Field(
        None, description="unset: what PEFT knows of the architecture; all-linear: every linear layer"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r), for high ranks (arXiv 2312.03732)")
    use_dora: bool = Field(False, description="adapt magnitude and direction apart (arXiv 2402.09353)")


class FreezeSettings(Settings):
    """What of the base model stays as it is."""

    embeddings: bool = Field(False, description="of words, positions and types")
    layers: int = Field(0, ge=0, le=10_000, description="so many of the transformer's layers, from the first")


class TrainingSettings(Settings):
    """What both model kinds and both engines share. Names are those of the two libraries."""

    engine: Engine = Field("sentence-transformers", description="the library that trains")
    epochs: float = Field(1.0, ge=0.001, le=10_000, description="times that every row is seen; small sets bear up to 3")
    max_steps: int | None = Field(
        None, ge=1, le=MOST_ROWS, description="stop after this many optimizer steps (smoke tests)"
    )
    train_queries: int | None = Field(
        None, ge=1, le=MOST_ROWS, description="train on a seeded sample of this many queries"
    )
    train_group_size: Auto | Annotated[int, Field(ge=1, le=1_000)] = Field(
        "auto",
        description="passages per query in a batch: one positive and train_group_size - 1 hard negatives; auto: 5 on a "
        "GPU and 2 on a CPU",
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        "auto", description="queries per process and step; auto: 64, or as few as 16 where that makes too few steps"
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="batches whose gradients make one step; in-batch negatives stay those of one batch",
    )
    learning_rate: Auto | Annotated[float, Field(ge=1e-30, le=100)] = Field(
        "auto",
        description="its highest value; auto: 1e-4 for small models, 2e-5 for those of the size of BERT-base, 1e-5 for "
        "large ones, and ten times that for the adapters of `lora`",
    )
    weight_decay: float = Field(0.01, ge=0, le=10, description="of AdamW; biases and norms are left out")
    warmup_ratio: float = Field(0.1, ge=0.0, lt=1.0, description="share of the steps in which the rate rises")
    scheduler: Scheduler = Field(
        "linear", description="how the rate falls after the warm-up; lr_scheduler_kwargs go under arguments"
    )
    max_grad_norm: float = Field(1.0, ge=1e-6, le=1e9, description="longer gradients are cut to this length")
    precision: Precision = Field(
        "auto",
        description="auto: bfloat16 where the GPU has it or the CPU is faster in it, float16 with loss scaling on "
        "other NVIDIA GPUs, else float32",
    )
    dropout: float | None = Field(
        None, ge=0.0, lt=1.0, description="while training; unset: the base model's own. 0 saves a third of a CPU's step"
    )
    gradient_checkpointing: bool = Field(False, description="half the memory of activations for a third more time")
    logging_steps: int = Field(10, ge=1, le=MOST_ROWS, description="steps between two figures of the loss")
    evaluations: int = Field(4, ge=1, le=1_000, description="dev-set evaluations, evenly spaced over the training")
    early_stopping_patience: int = Field(
        3,
        ge=1,
        le=1_000,
        description="a training stops after so many evaluations in a row that are worse than the best on dev by more "
        "than chance",
    )
    dev_queries: int = Field(
        500, ge=1, le=MOST_ROWS, description="at most this many dev queries are used during training"
    )
    checkpoint_minutes: float | None = Field(
        15.0,
        ge=0,
        le=100_000,
        description="a training that was killed loses so much at most, and goes on to the same weights; "
        "0: a checkpoint at each logged step, null: none",
    )
    nproc_per_node: Literal["auto"] | Annotated[int, Field(ge=1, le=1_024)] = Field(
        "auto", description="auto: one process on a CPU, one per visible GPU otherwise"
    )
    collective_timeout_minutes: float = Field(
        30.0,
        ge=0.001,
        le=100_000,
        description="processes that wait so long for one of their number give up: it hangs. Longer than any dev "
        "evaluation, for which the others wait",
    )
    preflight: bool = Field(
        True,
        description="before the training: one step at the longest batch, and a forecast of time, memory and disk; what "
        "cannot work fails here. The weights are the same without",
    )
    find_batch_size: bool = Field(
        False,
        description="on a GPU: train with the largest of batch_size, its half, its quarter, ... that fits the memory",
    )

    lora: LoraSettings | None = None
    freeze: FreezeSettings = FreezeSettings()
    batch_sampler: BatchSampler | None = Field(
        None,
        description="sentence-transformers engine; unset: each loss has the one that suits it. group_by_length saves "
        "padding, for losses that look at each row by itself (others keep theirs: negatives of one length are told "
        "apart too easily); rerankers have it on a GPU",
    )
    multi_dataset_batch_sampler: Literal["proportional", "round_robin"] = Field(
        "proportional", description="with extra sources: batches by their sizes, or in turn until one has ended"
    )
    knowledge_distillation: bool = Field(
        False, description="flag-embedding engine: learn the scores of mining.cross_encoder, or those of its own jsonl"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="more training arguments of the engine's library, by its own names"
    )

    @model_validator(mode="after")
    def _keys_of_the_engine(self) -> TrainingSettings:
        other = {
            "flag-embedding": ("loss", "loss_arguments", "loss_wrapper", "guide", "teacher", "batch_sampler"),
            "sentence-transformers": ("knowledge_distillation",),
        }
        for key in other[self.engine]:
            field = type(self).model_fields.get(key)
            if field and getattr(self, key) != field.get_default(call_default_factory=True):
                belongs = next(engine for engine in other if engine != self.engine)
                raise ValueError(f"`{key}` belongs to engine {belongs}, not to {self.engine}")
        return self

    @model_validator(mode="after")
    def _something_to_train(self) -> TrainingSettings:
        if self.lora is not None and self.freeze != FreezeSettings():
            raise ValueError("`lora` freezes the whole base model already: leave `freeze` out")
        return self


class EmbedderSettings(TrainingSettings, LossSettings):
    """The bi-encoder's training."""

    base_model: ModelSource
    encoding: EncodingSettings = EncodingSettings()
    temperature: float = Field(
        0.02, ge=1e-4, le=1_000, description="divides the cosine similarities in the contrastive loss"
    )
    negatives_cross_device: bool = Field(
        True,
        description="use the other processes' passages as negatives too: several processes take the step that one with "
        "all their rows would",
    )
    sub_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        "auto",
        description="gradient caching: encode a batch in parts of this size, and keep the activations of one part. "
        "auto: a batch that does not fit the memory is encoded in the largest parts that do, where its loss has a form "
        "with gradient caching that takes the same step; null: never. Engine flag-embedding encodes in parts of a "
        "given size, each padded by itself, but keeps all, so auto does nothing there",
    )
    dev_passages: int = Field(2_000, ge=1, le=MOST_ROWS, description="corpus of the dev evaluation during training")

    @property
    def parts(self) -> int | None:
        """Texts that are encoded at a time, where that is known: `auto` is decided when a training starts."""
        return None if self.sub_batch_size == "auto" else self.sub_batch_size


class RerankerSettings(TrainingSettings):
    """The cross-encoder's training, on what the fine-tuned embedder retrieves."""

    base_model: ModelSource | Literal["embedder"] = Field(
        description="a cross-encoder, any encoder (a fresh head is added), or the fine-tuned embedder's own weights"
    )
    query_max_length: int = Field(
        128,
        ge=4,
        le=MOST_TOKENS,
        validation_alias=AliasChoices("query_max_length", "query_max_len"),
        description="a pair may have query_max_length + passage_max_length tokens",
    )
    passage_max_length: int = Field(
        384,
        ge=4,
        le=MOST_TOKENS,
        validation_alias=AliasChoices("passage_max_length", "passage_max_len"),
        description="what the query leaves of them, the passage may have as well",
    )
    train_group_size: int = Field(
        5, ge=2, le=1_000, description="passages per query in a batch: one positive and train_group_size - 1 negatives"
    )
    random_negatives: Auto | Annotated[int, Field(ge=0, le=1_000)] = Field(
        "auto",
        description="of the train_group_size - 1 negatives, so many are random passages instead of mined ones. A fresh "
        "head must see easy negatives to learn what relevance is, before hard ones can teach it anything; auto: half "
        "of them for a fresh head, none for a base model that is a cross-encoder already",
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        "auto",
        description="queries (each with its group) per process and step; auto: 16, or as few as 4 where that makes too "
        "few steps",
    )
    learning_rate: Auto | Annotated[float, Field(ge=1e-30, le=100)] = Field(
        "auto",
        description="its highest value; auto: 3e-4 for a small model with a fresh head, 1e-5 for large models, else "
        "2e-5, and ten times that for the adapters of `lora`",
    )
    loss: str = Field("BinaryCrossEntropyLoss", description="a cross-encoder loss of sentence-transformers")
    loss_arguments: dict[str, Any] = Field(default_factory=dict, description="of the loss, by its own names")
    num_negatives: int = Field(
        8, ge=1, le=10_000, description="mined with the fine-tuned embedder for each train query"
    )
    embedder_weight: Literal["auto"] | Share = Field(
        "auto",
        description="share of the embedder's score in the final ranking; auto: chosen on dev, 0 = reranker alone",
    )
    dev_queries: int = Field(
        200,
        ge=1,
        le=MOST_ROWS,
        description="of each, evaluation.rerank_top_k candidates are reranked at every evaluation",
    )

    @model_validator(mode="after")
    def _enough_negatives(self) -> RerankerSettings:
        random = 0 if self.random_negatives == "auto" else self.random_negatives
        if random >= self.train_group_size:
            raise ValueError(
                f"random_negatives ({random}) must be below train_group_size ({self.train_group_size}): "
                "a group holds a positive too"
            )
        hard = self.train_group_size - 1 - random
        if hard > self.num_negatives:
            raise ValueError(
                f"a group takes {hard} mined negatives (train_group_size {self.train_group_size} - 1 - "
                f"random_negatives {random}), but num_negatives is {self.num_negatives}: they would "
                "repeat. Raise num_negatives or random_negatives, or lower train_group_size"
            )
        return self


# ---------------------------------------------------------------------------------------- extra sources


class ExtraSourceSettings(SourceSettings, LossSettings):
    """One more data set to learn from, beside the pipeline's own: cleaned, split and measured by the rules of its kind.

    Retrieval kinds are a collection of their own, mined as the pipeline's is. What the pipeline's own dev or test
    questions and answers hold is dropped from its train rows.
    """

    name: Name = Field(description="of its tables, its figures and its row in the model card")
    train_rows: int | None = Field(
        None, ge=1, le=MOST_ROWS, description="learn from a seeded sample of so many rows (queries)"
    )
    reranker_loss: str | None = Field(None, description="a cross-encoder loss; unset: the reranker does not learn it")
    reranker_loss_arguments: dict[str, Any] = Field(default_factory=dict, description="of that loss, by its own names")

    @property
    def where(self) -> str:
        return f"extra_sources.{self.name}"

    @property
    def extra_name(self) -> str | None:
        return self.name

    @model_validator(mode="after")
    def _losses_of_this_kind(self) -> ExtraSourceSettings:
        if self.extra_corpus is not None:
            raise ValueError("`extra_corpus` belongs to the pipeline's own source")
        if problem := self.problem_with(self.kind, cached=False):
            raise ValueError(problem)
        if self.reranker_loss is not None:
            if problem := _reranker_loss_problem(self.reranker_loss, self.reranker_loss_arguments, self.kind):
                raise ValueError(problem)
        elif self.reranker_loss_arguments:
            raise ValueError("`reranker_loss_arguments` are given, but no `reranker_loss`")
        return self


def _reranker_loss_problem(name: str, arguments: Mapping[str, Any], kind: SourceKind) -> str | None:
    if problem := _no_such_loss(name, kind, RERANKER_LOSSES):
        return problem
    return _wrong_arguments("reranker", name, arguments, RERANKER_LOSSES[name].arguments, "loss_arguments")


# ------------------------------------------------------------------------------------------- evaluation


class EvaluationSettings(Settings):
    """How the models are measured on the test split."""

    rerank_top_k: int = Field(
        100,
        ge=1,
        le=100_000,
        description="passages of the embedder's ranking that a reranker reorders, on dev while it is trained as well: "
        "the embedder's share in the final score is chosen for as many as it will be used on",
    )
    rerank_queries: int | None = Field(
        None, ge=1, le=MOST_ROWS, description="rerank a seeded sample of the test queries; all if unset"
    )
    bootstrap_samples: int = Field(10_000, ge=100, le=1_000_000, description="of the questions, for the intervals")
    confidence: Annotated[float, Field(gt=0.5, le=0.9999)] = Field(
        0.95, description="of the intervals, and of the permutation test"
    )
    examples: int = Field(
        15, ge=0, le=10_000, description="queries shown in the report that got better, and that got worse"
    )
    source_queries: int = Field(
        1_000,
        ge=1,
        le=MOST_ROWS,
        description="each source is also measured by sentence-transformers' evaluators, on a seeded sample of at most "
        "so many test questions or examples",
    )
    source_passages: int = Field(
        10_000, ge=10, le=MOST_ROWS, description="of an extra source's corpus, in those evaluators"
    )
    nano_beir: Place | None = Field(
        None, description="a folder with a local copy of NanoBEIR, one folder a set; relative to the YAML file"
    )


class GateSettings(Settings):
    """What a candidate must show on the test split before it takes the champion's place."""

    metric: Metric = Field(
        "ndcg_at_10", description="the primary metric: the one that has to get better; always spearman for scored pairs"
    )
    min_gain: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="smallest gain worth a promotion; whatever it is, chance must be excluded as well",
    )
    max_loss: dict[Metric, Share] = Field(
        {"recall_at_100": 0.01},
        description="guard metrics on the same questions: the candidate may lose at most so much of each",
    )
    min_queries: int = Field(
        100, ge=1, le=MOST_ROWS, description="with fewer test questions the answer is: too few to tell"
    )


class GuardSettings(Settings):
    """Another set, of a task that the fine-tuned embedder must not unlearn."""

    name: Name = Field(description="of its figures")
    kind: Literal["beir", "scored"] = Field(
        description="beir: a folder of corpus, queries and qrels, parquet or BEIR's own jsonl and tsv, measured by "
        "nDCG@10; scored: a parquet of sentence1, sentence2, score, measured by Spearman's rank correlation"
    )
    path: PathText = Field(description="the folder (beir) or file (scored); relative to the YAML file")
    split: str | None = Field("test", description="which split of it; null: all rows. Ignored where it has none")
    max_loss: Share = Field(0.02, description="the candidate may lose at most so much against the base embedder")
    max_queries: int | None = Field(
        None, ge=4, le=MOST_ROWS, description="measure on a seeded sample of this many queries or pairs"
    )
    max_passages: int | None = Field(
        None,
        ge=10,
        le=MOST_ROWS,
        description="beir: search among a seeded sample of this many passages, all relevant ones among them. Faster, "
        "easier (so not comparable with published figures), and still the same for base and candidate",
    )

    @model_validator(mode="after")
    def _passages_of_a_corpus(self) -> GuardSettings:
        if self.kind == "scored" and self.max_passages is not None:
            raise ValueError("max_passages belongs to a guard of kind beir: scored pairs have no corpus")
        return self


class ForgettingSettings(Settings):
    """Guard sets against forgetting, and model merging as the remedy (LM-Cocktail, arXiv 2311.13534)."""

    guards: tuple[GuardSettings, ...] = ()
    merging: Literal["off", "offer", "auto"] = Field(
        "offer",
        description="where the embedder loses more than a guard allows, interpolate its weights with the base: offer "
        "shows the trade-off, auto goes on with the best coefficient, chosen on dev and on one half of each guard set "
        "while the gate judges by the other half",
    )
    coefficients: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = Field(
        (0.2, 0.4, 0.6, 0.8),
        min_length=1,
        max_length=99,
        description="shares of the fine-tuned weights that are tried; 0, the base, and 1 are measured in any case",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> ForgettingSettings:
        names = [guard.name for guard in self.guards]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"forgetting.guards: two sets are called '{min(repeated)}'; give each a name of its own")
        return self


class AutomationSettings(Settings):
    """What happens without a person. Everything is off until it is asked for."""

    watch: bool = Field(False, description="read and clean every new state of the raw files, once it has settled")
    watch_interval_seconds: int = Field(
        60,
        ge=1,
        le=604_800,
        description="time between two looks at the raw files; the daemon looks every 5 seconds at most",
    )
    retrain: str | None = Field(
        None,
        description="on_change: as soon as the content of the cleaned pairs changed; a cron line such as '0 2 * * *': "
        "at that time, if the raw files or the cleaned pairs are not those that the models were trained on; unset: "
        "never by itself",
    )
    timezone: str = Field("UTC", description="of the cron line, e.g. Europe/Berlin")
    retries: int = Field(1, ge=0, le=100, description="times a step is tried again when it failed for a passing reason")
    max_run_hours: float = Field(24.0, ge=0.001, le=8_760, description="a run that takes longer is ended")

    @field_validator("timezone")
    @classmethod
    def _a_real_zone(cls, given: str) -> str:
        try:
            zoneinfo.ZoneInfo(given)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            near = difflib.get_close_matches(given, zoneinfo.available_timezones(), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"no time zone is called '{given}'.{hint} Expected a name such as UTC or Europe/Berlin"
            ) from None
        return given

    @property
    def cron(self) -> str | None:
        """The cron line in `retrain`, if it is one."""
        return None if self.retrain == "on_change" else self.retrain

    @property
    def unattended(self) -> bool:
        """Whether anything starts without a person."""
        return self.watch or self.retrain is not None


class CardSettings(Settings):
    """What only people know of a model, for its card."""

    license: str | None = Field(None, description="of the trained models, e.g. apache-2.0; an identifier of the Hub")
    language: tuple[str, ...] = Field((), description="e.g. [en, zh]")
    datasets: tuple[str, ...] = Field((), description="data sets on the Hub that the sources came from, by their ids")
    intended_use: str | None = Field(None, description="what the models are for, and what they are not for")
    widget_examples: int = Field(
        3, ge=0, le=1_000, description="test questions with passages that show the model in the card"
    )


class ExportSettings(Settings):
    """Other forms of the champion's embedder, each measured on the test split against the original."""

    formats: tuple[Literal["onnx", "openvino", "onnx-int8", "openvino-int8"], ...] = Field(
        (), description="the model's graph for other runtimes; int8: with quantised weights"
    )
    embeddings: tuple[Literal["int8", "binary"], ...] = Field((), description="embeddings of 1 byte or 1 bit a number")
    dimensions: tuple[Annotated[int, Field(ge=2, le=1_000_000)], ...] = Field(
        (), description="embeddings cut to so many numbers; a model trained with MatryoshkaLoss bears it"
    )
    max_loss: Share = Field(0.01, description="a form that loses more nDCG@10 is measured, told, and not published")
    queries: int | None = Field(
        None, ge=1, le=MOST_ROWS, description="measure on a seeded sample of the test questions"
    )

    @property
    def wanted(self) -> bool:
        return bool(self.formats or self.embeddings or self.dimensions)


class HubSettings(Settings):
    """Where the champion is pushed to on the Hugging Face Hub; the token is HF_TOKEN's, never the YAML's."""

    embedder: str | None = Field(None, description="repository, e.g. your-company/support-embedder")
    reranker: str | None = Field(None, description="repository of the reranker")
    private: bool = Field(True, description="seen by your organisation alone; a public repository is refused then")

    @model_validator(mode="after")
    def _somewhere(self) -> HubSettings:
        for key in ("embedder", "reranker"):
            repository = getattr(self, key)
            if repository is not None and repository.count("/") != 1:
                raise ValueError(f"{key}: expected owner/name; found {repository!r}")
        if self.embedder is None and self.reranker is None:
            raise ValueError("hub: name a repository under `embedder`, `reranker` or both")
        return self


def _check_network(network: str) -> str:
    """Raises ValueError unless `network` is one (10.0.0.0/24), or can be the name of an interface.

    It becomes a part of torchrun's options, so it may hold nothing that ends one.
    """
    expected = "Expected the network that the nodes share (10.0.0.0/24), or the name of an interface (eth0)"
    if re.fullmatch(r"[0-9A-Fa-f:.]+/[0-9.]+", network):
        try:
            found = ipaddress.ip_network(network, strict=False)
        except ValueError:
            raise ValueError(f"{network!r} is no IPv4 or IPv6 network. {expected}") from None
        if found.prefixlen == 0:
            raise ValueError(f"{network} is every network. Name the one that the nodes share, e.g. 10.0.0.0/24")
        return network
    if not re.fullmatch(r"[A-Za-z0-9_.:@-]{1,39}", network):
        raise ValueError(f"{network!r} is neither a network nor the name of an interface. {expected}")
    try:
        address = ipaddress.ip_address(network)
    except ValueError:
        if len(network) > LONGEST_INTERFACE:
            raise ValueError(f"{network!r} is neither a network nor the name of an interface. {expected}") from None
        return network
    raise ValueError(f"{network} is an address. Name the network that the nodes share, e.g. {address}/24")


# What `launch.network` may be.
Network = Annotated[str, AfterValidator(_check_network)]


class LaunchSettings(Settings):
    """Where the jobs of a pipeline run. Their code and their results are the same everywhere."""

    kind: Literal["local", "nodes", "slurm", "ray"] = Field(
        "local",
        description="local: on this machine; nodes: here and on the machines that run `embed-pipeline join`; slurm: in "
        "an allocation of a Slurm cluster; ray: on one node of a Ray cluster",
    )
    nnodes: int = Field(
        1, ge=1, le=10_000, description="nodes, slurm: machines that take part, this one included for nodes"
    )
    network: Network | None = Field(
        None,
        description="nodes, slurm: the network between the machines, as addresses (10.0.0.0/24) or the name that an "
        "interface has on each (eth0); gloo and NCCL use no other. Needed where there are several nodes",
    )
    wait_minutes: float = Field(
        15.0, ge=0.001, le=100_000, description="nodes: a job fails when the others have not joined by then"
    )
    max_restarts: int = Field(
        0,
        ge=0,
        le=100,
        description="times that torchrun starts all processes again, from the last checkpoint, whatever ended them. 0 "
        "leaves it to automation.retries, which knows a passing cause from a lasting one",
    )
    gpus_per_node: int | None = Field(
        None, ge=1, le=1_024, description="slurm, ray: asked for; nproc_per_node: auto is one process for each of them"
    )
    address: str | None = Field(
        None, description="ray: of its dashboard, e.g. http://head:8265; unset: RAY_ADDRESS, which may hold a password"
    )
    sbatch: dict[str, str | int] = Field(
        default_factory=dict,
        description='slurm: options of sbatch by their long names, e.g. {partition: gpu, time: "12:00:00", mem: 64G}',
    )
    setup: str = Field("", description="slurm: shell lines before the job, e.g. module load cuda")
    environment: tuple[str, ...] = Field(
        (),
        description="names of variables that jobs are given besides those listed in docs/jobs.md, e.g. one that a "
        "model's own code reads; their values are no part of a version",
    )

    @property
    def elsewhere(self) -> bool:
        """Whether this machine's own GPUs say nothing about those that a job will have."""
        return self.kind in ("slurm", "ray")

    @model_validator(mode="after")
    def _keys_of_this_kind(self) -> LaunchSettings:
        belong = {
            "nnodes": ("nodes", "slurm"),
            "network": ("nodes", "slurm"),
            "wait_minutes": ("nodes",),
            "gpus_per_node": ("slurm", "ray"),
            "address": ("ray",),
            "sbatch": ("slurm",),
            "setup": ("slurm",),
        }
        for key, kinds in belong.items():
            default = type(self).model_fields[key].get_default(call_default_factory=True)
            if self.kind not in kinds and getattr(self, key) != default:
                raise ValueError(f"`{key}` belongs to launch.kind {' or '.join(kinds)}, not to {self.kind}")
        if self.kind == "nodes" and self.nnodes < 2:
            raise ValueError("launch.kind nodes needs `nnodes`: how many machines take part, 2 or more")
        if self.nnodes > 1 and self.network is None:
            raise ValueError(
                f"launch.kind {self.kind} with {self.nnodes} nodes needs `network`: the network that they share, e.g. "
                "10.0.0.0/24, or the name of their interface to it, e.g. eth0. What they exchange is neither "
                "encrypted nor authenticated, so it should be a network of their own"
            )
        if self.address is not None and not _is_dashboard(self.address):
            raise ValueError(
                "launch.address: expected the address of the cluster's dashboard, such as http://head:8265, without "
                "user or password: it is published. Where it needs them, leave it out and set RAY_ADDRESS"
            )
        for key, value in self.sbatch.items():
            if re.fullmatch(r"-{0,2}[A-Za-z][A-Za-z0-9-]*", key) is None:
                raise ValueError("launch.sbatch: expected long names of sbatch's options as keys, such as partition")
            if any(not character.isprintable() for character in str(value)):
                raise ValueError(
                    f"launch.sbatch.{key}: expected one line of text; found a line break or control character"
                )
        if own := sorted(SBATCH_OWN & {key.lstrip("-") for key in self.sbatch}):
            raise ValueError(f"launch.sbatch: {', '.join(own)} are set by the pipeline itself. Leave them out")
        return self


# Options of sbatch that follow from other settings, or without which a job could not be followed.
SBATCH_OWN = {
    *("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "job-name", "output", "error", "open-mode", "wrap"),
    *("array", "requeue", "no-requeue", "export", "parsable", "wait", "input", "chdir"),
}


class TrackingSettings(Settings):
    """What goes to MLflow."""

    experiment: str | None = Field(None, description="MLflow experiment; the pipeline's name if unset")
    log_model: bool = Field(True, description="upload the model folder to MLflow as well")
    system_metrics: bool = Field(True, description="memory, processor and GPU over time, in MLflow")


class PipelineSettings(Settings):
    """One domain's pipeline: the attributes of `type: embed_pipeline.RetrievalPipeline`."""

    name: Name = Field(description="prefix of the asset keys and folder in the store")
    description: str = Field("", description="shown in the Dagster UI")
    seed: int = Field(42, ge=0, lt=2**31, description="of splits, samples, fresh weights and the order of rows")
    encode_precision: Precision = Field(
        "auto",
        description="arithmetic when encoding for mining and evaluation; auto: bfloat16 where the GPU has it or the "
        "CPU is faster in it, float16 on other NVIDIA GPUs, else float32",
    )
    encode_processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1_024)] = Field(
        "auto",
        description="that encode, score and search for mining and evaluation; auto: one on a CPU, one per visible GPU "
        "otherwise. Started where they save more than their start costs; results are the same",
    )
    retrain_after_library_upgrade: bool = Field(
        False,
        description="another version of torch, transformers, sentence-transformers or FlagEmbedding makes the models "
        "and what they compute anew (as does switching this on); off: it is told, by the assets and by "
        "`embed-pipeline check`",
    )
    source: SourceSettings
    extra_sources: tuple[ExtraSourceSettings, ...] = ()
    cleaning: CleaningSettings = CleaningSettings()
    mining: MiningSettings = MiningSettings()
    embedder: EmbedderSettings
    reranker: RerankerSettings | None = Field(None, description="left out: the pipeline ends with the embedder")
    evaluation: EvaluationSettings = EvaluationSettings()
    forgetting: ForgettingSettings = ForgettingSettings()
    gate: GateSettings = GateSettings()
    launch: LaunchSettings = LaunchSettings()
    automation: AutomationSettings = AutomationSettings()
    tracking: TrackingSettings = TrackingSettings()
    card: CardSettings = CardSettings()
    exports: ExportSettings = ExportSettings()
    hub: HubSettings | None = None

    @property
    def sources(self) -> tuple[SourceSettings, ...]:
        """The pipeline's own source, then the extra ones: the order in which they are read and cleaned."""
        return (self.source, *self.extra_sources)

    @property
    def mines(self) -> bool:
        """Whether there is a source to mine hard negatives for."""
        return any(source.is_retrieval for source in self.sources)

    @property
    def learns_given_scores(self) -> bool:
        """Whether a loss learns the teacher's scores that the rows came with: there is no cross-encoder to give any."""
        if self.mining.cross_encoder is not None:
            return False
        told = [(self.embedder.loss_for(self.source.kind), EMBEDDER_LOSSES)]
        told += [(extra.loss_for(extra.kind), EMBEDDER_LOSSES) for extra in self.extra_sources]
        told += [(self.reranker.loss, RERANKER_LOSSES)] if self.reranker is not None else []
        told += [(e.reranker_loss, RERANKER_LOSSES) for e in self.extra_sources if e.reranker_loss is not None]
        stages = (self.embedder, self.reranker)
        return any("teacher_scores" in losses[name].needs for name, losses in told) or any(
            stage.knowledge_distillation for stage in stages if stage is not None
        )

    @property
    def final_embedder(self) -> Literal["embedder", "merged_embedder"]:
        """The asset whose model goes on to the reranker, the evaluation and the gate."""
        return "merged_embedder" if self.forgetting.guards and self.forgetting.merging != "off" else "embedder"

    @model_validator(mode="after")
    def _nothing_to_watch(self) -> PipelineSettings:
        built = [source.where for source in self.sources if source.script is not None]
        if self.automation.watch and built:
            raise ValueError(
                f"automation.watch: {built[0]}.script builds the raw files anew in every run, so watching them would "
                "never rest. Leave `watch` out; `retrain` with a cron line runs the script at that time"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _metric_of_scored_pairs(cls, given: Any) -> Any:
        """A pipeline of scored pairs has one figure, so it need not be named."""
        if isinstance(given, dict) and _kind_of(given.get("source")) == "scored":
            gate = given.get("gate") or {}
            gate = gate if isinstance(gate, dict) else gate.model_dump(exclude_unset=True)
            return {**given, "gate": {"metric": "spearman", "max_loss": {}, **gate}}
        return given

    @model_validator(mode="after")
    def _parts_of_this_kind(self) -> PipelineSettings:
        kind = self.source.kind
        if kind in ("labelled", "parallel"):
            raise ValueError(
                f"source.kind: a pipeline of its own is for retrieval ({', '.join(RETRIEVAL_KINDS)}) or for scored "
                f"pairs; a {kind} data set goes under `extra_sources`"
            )
        if kind == "scored":
            if self.reranker is not None:
                raise ValueError("`reranker`: scored pairs have no corpus, so there is nothing to rerank. Leave it out")
            if self.mining != MiningSettings() and not self.mines:
                raise ValueError("`mining`: scored pairs are not mined. Leave it out")
            if self.embedder.engine == "flag-embedding":
                raise ValueError("embedder.engine: flag-embedding learns from retrieval kinds only, not scored pairs")
        metrics = {self.gate.metric, *self.gate.max_loss}
        if (kind == "scored") != ("spearman" in metrics) or (kind == "scored" and len(metrics) > 1):
            raise ValueError(
                f"gate: {', '.join(sorted(metrics))} cannot be measured on a source of kind '{kind}'. "
                + ("Expected spearman alone" if kind == "scored" else "spearman is for scored pairs")
            )
        if self.hub is not None and self.hub.reranker is not None and self.reranker is None:
            raise ValueError("hub.reranker: this pipeline has no reranker")
        return self

    @model_validator(mode="after")
    def _arguments_of_the_libraries(self) -> PipelineSettings:
        if problem := check_arguments("embedder", self.embedder):
            raise ValueError(f"embedder.arguments: {problem}")
        if self.reranker is not None and (problem := check_arguments("reranker", self.reranker)):
            raise ValueError(f"reranker.arguments: {problem}")
        return self

    @model_validator(mode="after")
    def _losses_fit_their_sources(self) -> PipelineSettings:
        cached = self.embedder.parts is not None
        if problem := self.embedder.problem_with(self.source.kind, cached):
            raise ValueError(f"embedder.loss: {problem}")
        if self.reranker is not None:
            told = self.reranker
            if problem := _reranker_loss_problem(told.loss, told.loss_arguments, self.source.kind):
                raise ValueError(f"reranker.loss: {problem}")
        names = [extra.name for extra in self.extra_sources]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"extra_sources: two are called '{min(repeated)}'; give each a name of its own")
        if taken := {self.name, "nano_beir"} & set(names):
            raise ValueError(
                f"extra_sources: '{min(taken)}' is the name of the pipeline or of NanoBEIR, by which figures are told "
                "apart; choose another"
            )
        for extra in self.extra_sources:
            where = f"extra_sources: {extra.name}"
            if problem := extra.problem_with(extra.kind, cached):
                raise ValueError(f"{where}: {problem}")
            if extra.reranker_loss is not None and self.reranker is None:
                raise ValueError(f"{where}: `reranker_loss` is given, but the pipeline has no reranker")
            for engine, loss in ((self.embedder.engine, extra.loss), (self._reranker_engine, extra.reranker_loss)):
                if engine == "flag-embedding" and (loss is not None or extra.kind in EXAMPLE_KINDS):
                    raise ValueError(
                        f"{where}: engine flag-embedding has one loss and learns from retrieval kinds only. Choose "
                        "engine sentence-transformers, or leave the loss out and bring pairs, triplets or beir"
                    )
        return self

    @model_validator(mode="after")
    def _teachers_are_there(self) -> PipelineSettings:
        """What learns a teacher's scores needs mining.cross_encoder, or a source that brings them."""
        if self.mining.cross_encoder is not None:
            return self
        sources = [("embedder.loss", self.embedder.loss_for(self.source.kind), EMBEDDER_LOSSES, self.source)]
        if self.reranker is not None:
            sources.append(("reranker.loss", self.reranker.loss, RERANKER_LOSSES, self.source))
        for extra in self.extra_sources:
            sources.append((f"extra_sources: {extra.name}", extra.loss_for(extra.kind), EMBEDDER_LOSSES, extra))
            if extra.reranker_loss is not None:
                sources.append((f"extra_sources: {extra.name}", extra.reranker_loss, RERANKER_LOSSES, extra))
        for where, name, losses, source in sources:
            if source.is_retrieval and "teacher_scores" in losses[name].needs and source.kind != "flag-embedding":
                raise ValueError(
                    f"{where}: {name} learns a teacher's scores. Name the teacher under mining.cross_encoder, or bring "
                    "a source of kind flag-embedding with pos_scores and neg_scores"
                )
        for stage in ("embedder", "reranker"):
            told = getattr(self, stage)
            if told is not None and told.knowledge_distillation and self.source.kind != "flag-embedding":
                raise ValueError(
                    f"{stage}.knowledge_distillation: name the teacher under mining.cross_encoder, or bring a source "
                    "of kind flag-embedding with pos_scores and neg_scores"
                )
        return self

    @property
    def _reranker_engine(self) -> Engine | None:
        return self.reranker.engine if self.reranker is not None else None

    @model_validator(mode="after")
    def _enough_negatives(self) -> PipelineSettings:
        size, mined = self.embedder.train_group_size, self.mining.num_negatives
        needed = 0 if size == "auto" else size - 1
        if self.source.is_retrieval and needed > mined:
            raise ValueError(
                f"embedder.train_group_size ({size}) takes {needed} negatives a query, but "
                f"mining.num_negatives is {mined}: they would repeat. Raise mining.num_negatives or lower "
                "embedder.train_group_size"
            )
        return self


# --------------------------------------------------------------------------------------------- smoke test

SMOKE_TEST_QUERIES = 200  # of the raw rows; 20 of them are dev and 40 are test, where the splits are the default ones


def smoke_test_of(settings: PipelineSettings) -> PipelineSettings:
    """The same pipeline in small: every stage does its work, and nothing it makes is any good.

    What a pipeline is (sources, models, engines, losses, rules) stays; how much it does is capped.
    """
    training = {
        "max_steps": 4,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "evaluations": 1,
        "train_queries": 64,
        "dev_queries": 10,
    }
    guards = [_smoke_test_guard(guard) for guard in settings.forgetting.guards]
    small = {
        "mining": _capped(settings.mining, {"top_k": settings.mining.range_min + 20}),
        "embedder": _capped(settings.embedder, {**training, "dev_passages": 100}),
        "reranker": _capped(settings.reranker, training) if settings.reranker is not None else None,
        "evaluation": _capped(settings.evaluation, {"rerank_top_k": 5, "rerank_queries": 10, "bootstrap_samples": 200}),
        "forgetting": {**settings.forgetting.model_dump(), "guards": guards, "coefficients": [0.5]},
        "tracking": {
            **settings.tracking.model_dump(),
            "experiment": f"{settings.tracking.experiment or settings.name}-smoke-test",
        },
        "exports": _capped(settings.exports, {"queries": 20}),
        "hub": None,  # what a smoke test makes is for nobody
        # Nothing starts by itself, and a failure is told at once.
        "automation": {"retries": 0},
    }
    return PipelineSettings.model_validate({**settings.model_dump(), **small})


def _smoke_test_guard(guard: GuardSettings) -> dict[str, Any]:
    return _capped(guard, {"max_queries": 50, **({"max_passages": 200} if guard.kind == "beir" else {})})


def _capped(settings: Settings, most: dict[str, int]) -> dict[str, Any]:
    """The settings with each number lowered to what it may be at most; unset means without a limit, and auto any."""
    given = settings.model_dump()
    return {
        **given,
        **{key: cap if given[key] in (None, "auto") else min(given[key], cap) for key, cap in most.items()},
    }


def _is_dashboard(address: str) -> bool:
    try:
        found = urllib.parse.urlsplit(address)
        return (
            found.scheme in ("http", "https") and bool(found.hostname) and "@" not in found.netloc and found.port != 0
        )
    except ValueError:  # no such port
        return False


def _kind_of(source: Any) -> Any:
    return source.get("kind") if isinstance(source, dict) else getattr(source, "kind", None)


def _is_hex(value: str | None, digits: int) -> bool:
    return value is not None and len(value) == digits and all(c in "0123456789abcdef" for c in value.lower())


def _is_commit(value: str | None) -> bool:
    return _is_hex(value, 40)
