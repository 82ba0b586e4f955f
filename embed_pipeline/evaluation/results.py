"""What an evaluation leaves: figures with intervals, and everything the report tells."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from embed_pipeline.evaluation.comparison import Comparison
from embed_pipeline.evaluation.gate import GateReport
from embed_pipeline.evaluation.history import HistoryPoint
from embed_pipeline.mining.report import ScoreSummary

SUMMARY_FILE = "summary.json"
DETAILS_FILE = "details.json"
REPORT_FILE = "report.html"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


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
    gate: GateReport
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
    over_champion: list[Comparison]  # the candidate's embedder and pair over the champion's
    seen_by_champion: int  # test queries left out there: the champion was trained on them or on their answers
    history: list[HistoryPoint]  # of all evaluations, oldest first, this one last
    milliseconds_per_query: dict[str, float]  # of the pairs: embedder and reranker together
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
