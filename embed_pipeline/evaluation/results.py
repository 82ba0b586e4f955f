"""What an evaluation leaves: figures with intervals, and everything the report tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from embed_pipeline.evaluation.metrics import METRICS
from embed_pipeline.evaluation.significance import paired_bootstrap
from embed_pipeline.mining.report import ScoreSummary
from embed_pipeline.settings import EvaluationSettings

BM25 = "bm25"
BASE_EMBEDDER = "base_embedder"
EMBEDDER = "embedder"
BASE_RERANKER = "base_reranker"
RERANKER = "reranker"
RERANKER_ALONE = "reranker_alone"  # shown only where the embedder's score is blended in

SUMMARY_FILE = "summary.json"
DETAILS_FILE = "details.json"
REPORT_FILE = "report.html"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Comparison(_Part):
    """One system on one metric, against a baseline on the same queries."""

    system: str
    metric: str
    value: float
    gain: float
    interval_low: float
    interval_high: float
    num_queries: int

    @property
    def verdict(self) -> str:
        """better, worse, or undecided where the interval holds 0."""
        return "better" if self.interval_low > 0 else "worse" if self.interval_high < 0 else "undecided"


class QueryChange(_Part):
    """A query on which the fine-tuned embedder does better or worse than its base."""

    query: str
    positive: str  # the relevant passage that the better of the two ranks highest
    change: float  # of nDCG@10
    rank_before: int | None  # 1-based rank of the first relevant passage; None below 100
    rank_after: int | None
    first_before: str  # what stood first
    first_after: str
    first_before_relevant: bool
    first_after_relevant: bool


class Details(_Part):
    title: str
    claim: str  # the verdict on the embedder in plain words
    figures: str  # its gain and interval
    verdicts: dict[str, str]  # system -> one plain sentence
    systems: dict[str, str]  # system -> what it is
    notes: list[str]
    passages: int
    queries: int
    queries_without_positive: int
    reranked_queries: int
    rerank_top_k: int
    embedder_weight: float | None
    dev_ndcg_at_10_by_weight: dict[str, float]
    over_embedder: list[Comparison]  # gains over the fine-tuned embedder on the same queries
    over_base_reranker: list[Comparison]  # of the fine-tuned reranker, each ranking by its own score alone
    milliseconds_per_query: dict[str, float]
    scores: dict[str, ScoreSummary]  # embedder -> similarity of positives and of each query's best other passage
    better: list[QueryChange]
    worse: list[QueryChange]
    queries_better: int
    queries_worse: int
    seed: int
    bootstrap_samples: int
    confidence: float
    versions: dict[str, str]

    @property
    def headline(self) -> str:
        return f"{self.claim}: {self.figures}."


class EvaluationReport(_Part):
    """JSON-serialisable: what `summary.json` and `details.json` hold."""

    summary: list[Comparison]
    details: Details


Values = Mapping[str, Mapping[str, Mapping[str, float]]]
"""system -> metric -> query_id -> value"""


def compare(
    values: Values, systems: Sequence[str], baseline: str, settings: EvaluationSettings, seed: int
) -> list[Comparison]:
    """Every metric of `systems`, with the gain over `baseline` on the queries that the system was measured on."""
    rows = []
    for system in systems:
        queries = list(values[system][METRICS[0]])
        own = _matrix(values[system], queries)
        intervals = paired_bootstrap(
            own - _matrix(values[baseline], queries),
            samples=settings.bootstrap_samples,
            confidence=settings.confidence,
            seed=seed,
        )
        for column, metric in enumerate(METRICS):
            rows.append(
                Comparison(
                    system=system,
                    metric=metric,
                    value=float(own[:, column].mean()),
                    gain=float(intervals.mean[column]),
                    interval_low=float(intervals.low[column]),
                    interval_high=float(intervals.high[column]),
                    num_queries=len(queries),
                )
            )
    return rows


def _matrix(of_system: Mapping[str, Mapping[str, float]], queries: Sequence[str]) -> np.ndarray:
    return np.array([[of_system[metric][query] for metric in METRICS] for query in queries])
