"""The figures of a model in training on the dev split of every source it learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

from embed_pipeline.evaluation.evaluators import (
    EmbedderEvaluators,
    Figures,
    MeasuredSource,
    RerankerEvaluators,
    embedder_evaluators,
    reranker_evaluators,
)
from embed_pipeline.losses import RETRIEVAL_KINDS
from embed_pipeline.models.blocks import BATCH_SIZE, Texts, blocks_of, lengths_of, of_rows
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.ranks import Ranks
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.tables import extra_folder
from embed_pipeline.training.dev_set import EmbedderDevSet, RerankerDevSet
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob
from embed_pipeline.training.process import Rank, arrays_from_all


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

    def measure(self, model: SentenceTransformer, rank: Rank) -> Figures:
        """Metric -> figure, the one of `dev_metric` first. Every rank comes here; rank 0's figures are the whole ones.

        The ranks share the encoding of the own source. The library's evaluators run on rank 0 while the others wait.
        """
        figures: Figures = {}
        if self.own is not None:
            figures["ndcg_at_10"] = self.own.ndcg_at_10(Embedder.around(model, rank.precision, _Together(rank=rank)))
        if self.evaluators is not None and rank.is_main:
            found = self.evaluators.measure(Embedder.around(model, rank.precision))
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

    def measure(self, model: CrossEncoder, rank: Rank) -> Figures:
        """As an embedder's."""
        own = self.own.ndcg_at_10(Reranker.around(model, rank.precision, _Together(rank=rank)))
        figures: Figures = {"ndcg_at_10": own}
        if self.evaluators is not None and rank.is_main:
            found = self.evaluators.measure(Reranker.around(model, rank.precision))
            figures |= {name: found[name] for name in self.evaluators.main_metrics if name in found}
        return figures


@dataclass(frozen=True, kw_only=True)
class _Together(Ranks):
    """The ranks of a training: all ask for the same texts, each computes a share of the batches, all get the whole.

    A batch is the same texts whoever computes it, so the figures do not depend on the number of ranks.
    """

    rank: Rank

    def compute(
        self, name: object, texts: Texts, work: Callable[[Texts], np.ndarray], job: object, **_: object
    ) -> np.ndarray:
        blocks = blocks_of(lengths_of(texts), BATCH_SIZE)
        mine = range(self.rank.rank, len(blocks), self.rank.world_size)
        shares = arrays_from_all([work(of_rows(texts, blocks[block])) for block in mine])
        whole = np.empty((len(texts[0]), *shares[0][0].shape[1:]), dtype=np.float32)
        for number, share in enumerate(shares):
            for of_block, found in zip(blocks[number :: self.rank.world_size], share, strict=True):
                whole[of_block] = found
        return whole


def _extra_sources(job: TrainingJob) -> list[MeasuredSource]:
    return [
        MeasuredSource(extra.name, extra.kind, extra_folder(job.cleaned_pairs, extra.name))
        for extra in job.extra_sources
    ]
