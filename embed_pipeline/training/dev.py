"""The figures of a model in training on the dev split of every source it learns from."""

from __future__ import annotations

from dataclasses import dataclass

from sentence_transformers import CrossEncoder, SentenceTransformer

from embed_pipeline.evaluation.evaluators import (
    EmbedderEvaluators,
    MeasuredSource,
    RerankerEvaluators,
    embedder_evaluators,
    reranker_evaluators,
)
from embed_pipeline.losses import RETRIEVAL_KINDS
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.precision import ResolvedPrecision
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.tables import extra_folder
from embed_pipeline.training.dev_set import EmbedderDevSet, RerankerDevSet
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob


def dev_metric(job: EmbedderJob) -> str:
    """What the best weights are chosen by: the own source's main figure, whatever the extra sources say."""
    return "ndcg_at_10" if job.source_kind in RETRIEVAL_KINDS else "spearman"


@dataclass(frozen=True)
class EmbedderDev:
    """The own source's figures under their plain names, the extra sources' main ones as `<source>/<metric>`."""

    source: str
    own: EmbedderDevSet | None  # of a retrieval source; pairs of sentences are among the evaluators
    evaluators: EmbedderEvaluators | None

    @classmethod
    def read(cls, job: EmbedderJob) -> EmbedderDev | None:
        """None when the own source has no dev split."""
        own = EmbedderDevSet.read(job) if job.source_kind in RETRIEVAL_KINDS else None
        sources = [] if own is not None else [MeasuredSource(job.source_name, job.source_kind, job.cleaned_pairs)]
        evaluators = embedder_evaluators(
            [*sources, *_extra_sources(job)],
            "dev",
            seed=job.seed,
            max_queries=job.settings.dev_queries,
            max_passages=job.settings.dev_passages,
        )
        found = cls(job.source_name, own, evaluators)
        measured = own is not None or f"{job.source_name}/{dev_metric(job)}" in found.main_metrics
        return found if measured else None

    @property
    def main_metrics(self) -> tuple[str, ...]:
        return self.evaluators.main_metrics if self.evaluators else ()

    @property
    def size(self) -> int:
        """Questions, or pairs, of the own source."""
        return len(self.own.queries) if self.own is not None else self.pairs

    @property
    def pairs(self) -> int:
        assert self.evaluators is not None
        expected = self.evaluators.parts[0].expected
        return 0 if expected is None else len(expected)

    def measure(self, model: SentenceTransformer, precision: ResolvedPrecision) -> dict[str, float]:
        """Metric -> value, the one of `dev_metric` first."""
        figures = {}
        if self.own is not None:
            figures["ndcg_at_10"] = self.own.ndcg_at_10(Embedder.around(model, precision))
        if self.evaluators is not None:
            found = self.evaluators(model, precision)
            mine = f"{self.source}/"
            figures |= {name.removeprefix(mine): found[name] for name in self.main_metrics if name in found}
        return figures


@dataclass(frozen=True)
class RerankerDev:
    """The same for a reranker: its own order of what the embedder retrieves, and the extra sources that it learns."""

    own: RerankerDevSet
    evaluators: RerankerEvaluators | None

    @classmethod
    def read(cls, job: RerankerJob) -> RerankerDev | None:
        """None when the own source has no dev split."""
        own = RerankerDevSet.read(job)
        if own is None:
            return None
        learnt = {extra.name for extra in job.extra_sources if extra.reranker_loss is not None}
        sources = [source for source in _extra_sources(job) if source.name in learnt]
        evaluators = reranker_evaluators(
            sources, "dev", seed=job.seed, max_queries=job.settings.dev_queries, max_passages=None
        )
        return cls(own, evaluators)

    def measure(self, model: CrossEncoder, precision: ResolvedPrecision) -> dict[str, float]:
        figures = {"ndcg_at_10": self.own.ndcg_at_10(Reranker.around(model, precision))}
        if self.evaluators is not None:
            found = self.evaluators(model, precision)
            figures |= {name: found[name] for name in self.evaluators.main_metrics if name in found}
        return figures


def _extra_sources(job: TrainingJob) -> list[MeasuredSource]:
    return [
        MeasuredSource(extra.name, extra.kind, extra_folder(job.cleaned_pairs, extra.name))
        for extra in job.extra_sources
    ]
