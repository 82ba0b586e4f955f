"""The data sets of a training: the pipeline's own source, and the extra ones, each with what it is learnt by."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from embed_pipeline.errors import TrainingError
from embed_pipeline.losses import EMBEDDER_LOSSES, RERANKER_LOSSES, RETRIEVAL_KINDS, Loss, SourceKind
from embed_pipeline.settings import EmbedderSettings, ExtraSourceSettings, LossSettings
from embed_pipeline.tables import EXAMPLES_FILE, extra_folder
from embed_pipeline.training.job import EmbedderJob, RerankerJob
from embed_pipeline.training.rows import TrainingQuery, read_table, read_training_queries

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A row of a scored, labelled or parallel source."""

    sentence1: str
    sentence2: str | None
    score: float | None  # 0..1; of labelled pairs with two classes, 1 for the class that means alike
    label: str | None


@dataclass(frozen=True)
class TrainingSource:
    """One data set, read, with the loss that it is learnt by. Either `queries` or `examples` is filled."""

    name: str
    kind: SourceKind
    loss: str  # the name in the library; its gradient-caching form where one was asked for
    facts: Loss
    arguments: dict[str, Any]
    wrapper: str | None = None
    wrapper_arguments: dict[str, Any] | None = None
    queries: tuple[TrainingQuery, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def size(self) -> int:
        return len(self.queries) or len(self.examples)


def read_embedder_sources(job: EmbedderJob) -> list[TrainingSource]:
    """The own source first, then the extra ones in the YAML's order. Raises TrainingError where one has no row."""
    settings = job.settings
    return [
        _for_embedder(job, job.source_name, job.source_kind, settings, settings, None),
        *(_for_embedder(job, extra.name, extra.kind, extra, settings, extra) for extra in job.extra_sources),
    ]


def read_reranker_sources(job: RerankerJob) -> list[TrainingSource]:
    """The same for a reranker, which learns of the extra sources only what has a `reranker_loss`."""
    own = _for_reranker(job, job.source_name, job.source_kind, job.settings.loss, job.settings.loss_arguments, None)
    return [
        own,
        *(
            _for_reranker(job, extra.name, extra.kind, extra.reranker_loss, extra.reranker_loss_arguments, extra)
            for extra in job.extra_sources
            if extra.reranker_loss is not None
        ),
    ]


def _for_reranker(
    job: RerankerJob,
    name: str,
    kind: SourceKind,
    loss: str,
    arguments: dict[str, Any],
    extra: ExtraSourceSettings | None,
) -> TrainingSource:
    return TrainingSource(name, kind, loss, RERANKER_LOSSES[loss], arguments, **_rows(job, name, kind, extra))


def _for_embedder(
    job: EmbedderJob,
    name: str,
    kind: SourceKind,
    learn: LossSettings,
    settings: EmbedderSettings,
    extra: ExtraSourceSettings | None,
) -> TrainingSource:
    loss = learn.loss_for(kind)
    if settings.parts is not None:
        loss = EMBEDDER_LOSSES[loss].cached or loss
    return TrainingSource(
        name,
        kind,
        loss,
        EMBEDDER_LOSSES[loss],
        learn.loss_arguments,
        learn.loss_wrapper,
        learn.loss_wrapper_arguments,
        **_rows(job, name, kind, extra),
    )


def _rows(
    job: EmbedderJob | RerankerJob, name: str, kind: SourceKind, extra: ExtraSourceSettings | None
) -> dict[str, Any]:
    cleaned, negatives = job.cleaned_pairs, job.hard_negatives
    wanted = job.settings.train_queries
    if extra is not None:
        cleaned, wanted = extra_folder(cleaned, name), extra.train_rows
        negatives = extra_folder(negatives, name) if negatives is not None else None
    if kind in RETRIEVAL_KINDS:
        assert negatives is not None, f"{name}: a retrieval source has hard negatives"
        return {"queries": tuple(read_training_queries(job.settings, job.seed, cleaned, negatives, wanted))}
    rows = read_table(cleaned / EXAMPLES_FILE).sort_by("example_id").to_pylist()
    rows = [row for row in rows if row["split"] == "train"]
    if not rows:
        raise TrainingError(
            f"{cleaned / EXAMPLES_FILE} has no row of split train: nothing of {name} to train on. See cleaned_pairs' "
            "rejected tables for what became of the raw rows"
        )
    if wanted is not None and wanted < len(rows):
        chosen = np.random.default_rng(job.seed).choice(len(rows), size=wanted, replace=False)
        rows = [rows[i] for i in np.sort(chosen)]
    keys = ("sentence1", "sentence2", "score", "label")
    return {"examples": tuple(Example(*(row[key] for key in keys)) for row in rows)}


def with_teacher_scores(source: TrainingSource) -> Iterator[TrainingQuery]:
    """The queries whose positives and negatives a teacher has all scored; tells how many are left out.

    Raises TrainingError when there is none.
    """
    scored = [query for query in source.queries if query.has_scores]
    if not scored:
        raise TrainingError(
            f"{source.loss} learns a teacher's scores, and no query of {source.name} has them. Name the teacher under "
            "mining.cross_encoder, or bring pos_scores and neg_scores for every text"
        )
    if left_out := len(source.queries) - len(scored):
        logger.warning(
            "%s: %d of %d queries are left out: not all of their texts have a teacher's score",
            source.name,
            left_out,
            len(source.queries),
        )
    return iter(scored)
