"""What an evaluation leaves: figures with intervals, and everything the report tells."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from embed_pipeline.evaluation.comparison import Comparison
from embed_pipeline.evaluation.gate import GateReport
from embed_pipeline.evaluation.guard_sets import MaybeNaN
from embed_pipeline.evaluation.history import HistoryPoint
from embed_pipeline.mining.report import ScoreSummary

SUMMARY_FILE = "summary.json"
DETAILS_FILE = "details.json"
MeasuredModel = Literal["embedder", "reranker"]
EVALUATORS_FILE = "evaluators.json"  # the library's evaluators on the test split of every source
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


class PairChange(_Part):
    """A pair of sentences that the fine-tuned embedder places better or worse among the others than its base."""

    sentence1: str
    sentence2: str
    score: float  # what people gave it, 0..1
    before: float  # cosine
    after: float
    change: float  # how much nearer it came to the place that people give it, as a share of all pairs


class SourceFigure(_Part):
    """One figure of one evaluator of the library on one source: base first, then fine-tuned, then the difference."""

    model: MeasuredModel
    source: str
    metric: str
    main: bool  # the figure that its evaluator is about
    base: MaybeNaN
    trained: MaybeNaN
    champion: MaybeNaN | None
    change: MaybeNaN  # trained - base
    interval_low: float | None  # of the change, by paired bootstrap, where the figure is made of single examples
    interval_high: float | None
    items: int | None  # queries, pairs or triplets behind it, where they are known

    @property
    def name(self) -> str:
        """sts/spearman"""
        return f"{self.source}/{self.metric}"

    @property
    def title(self) -> str:
        """The same, and whose it is where that is not the embedder."""
        return self.name if self.model == "embedder" else f"{self.model}: {self.name}"

    @property
    def verdict(self) -> str:
        """better, worse, or undecided where the interval holds 0 or there is none."""
        low, high = self.interval_low, self.interval_high
        return (
            "undecided"
            if low is None or high is None
            else "better"
            if low > 0
            else "worse"
            if high < 0
            else "undecided"
        )


class Details(_Part):
    kind: Literal["retrieval", "scored"]
    title: str
    gate: GateReport
    claim: str  # the verdict on the embedder in plain words
    figures: str  # its gain and interval
    systems: dict[str, str]  # system -> what it is
    notes: list[str]
    queries: int  # or pairs
    over_champion: list[Comparison]  # the candidate's embedder and pair over the champion's
    seen_by_champion: int  # test queries left out there: the champion was trained on them or on their answers
    history: list[HistoryPoint]  # of all evaluations, oldest first, this one last
    sources: list[SourceFigure]  # the library's evaluators, on every source that was trained on, and on NanoBEIR
    queries_better: int
    queries_worse: int
    seed: int
    bootstrap_samples: int
    confidence: float
    versions: dict[str, str]
    # Of retrieval alone:
    verdicts: dict[str, str] = {}  # system -> one plain sentence
    passages: int = 0
    queries_without_positive: int = 0
    reranked_queries: int = 0
    rerank_top_k: int = 0
    embedder_weight: float | None = None
    dev_ndcg_at_10_by_weight: dict[str, float] = {}
    over_embedder: list[Comparison] = []  # gains over the fine-tuned embedder on the same queries
    over_base_reranker: list[Comparison] = []  # of the fine-tuned reranker, each ranking by its own score alone
    milliseconds_per_query: dict[str, float] = {}  # of the pairs: embedder and reranker together
    scores: dict[str, ScoreSummary] = {}  # embedder -> similarity of positives and of each query's best other passage
    better: list[QueryChange] = []
    worse: list[QueryChange] = []
    # Of scored pairs alone:
    pairs_better: list[PairChange] = []
    pairs_worse: list[PairChange] = []

    @property
    def metric(self) -> str:
        """The one that the report tells first."""
        return "spearman" if self.kind == "scored" else "ndcg_at_10"

    @property
    def items(self) -> str:
        """What is measured one at a time."""
        return "pairs" if self.kind == "scored" else "questions"

    @property
    def source_metrics(self) -> dict[str, float]:
        """As MLflow has them: `embedder/sts/spearman`, `base_embedder/sts/spearman`, and the difference of the two."""
        rows = self.sources
        return {
            **{f"base_{row.model}/{row.name}": row.base for row in rows},
            **{f"{row.model}/{row.name}": row.trained for row in rows},
            **{f"{row.model}/{row.name}_gain_over_base": row.change for row in rows if row.main},
        }

    @property
    def headline(self) -> str:
        return f"{self.claim}: {self.figures}."


class EvaluationReport(_Part):
    """JSON-serialisable: what `summary.json` and `details.json` hold."""

    summary: list[Comparison]
    details: Details
