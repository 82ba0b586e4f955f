"""Two systems on the same queries: means, gains, intervals and p-values; and the names of the systems.

What only reads comparisons (`embed-pipeline history`) loads no numerical library: `compare` imports them itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np

    from embed_pipeline.settings import EvaluationSettings

BM25 = "bm25"
BASE_EMBEDDER = "base_embedder"
EMBEDDER = "embedder"
BASE_RERANKER = "base_reranker"  # over the fine-tuned embedder's passages
RERANKER = "reranker"  # over the fine-tuned embedder's passages: the pair that would serve
RERANKER_ALONE = "reranker_alone"  # shown only where the embedder's score is blended in
BASE_PAIR = "base_pair"  # the base reranker over the base embedder's passages, where it is a reranker already
CHAMPION_EMBEDDER = "champion_embedder"
CHAMPION_PAIR = "champion_pair"  # the champion's reranker over its own embedder's passages: what serves today

Values = Mapping[str, Mapping[str, Mapping[str, float]]]
"""system -> metric -> query_id -> value"""


class Comparison(BaseModel):
    """One system on one metric, against a baseline on the same queries."""

    model_config = ConfigDict(frozen=True)

    system: str
    metric: str
    value: float
    gain: float
    interval_low: float
    interval_high: float
    p_value: float  # two-sided, of the paired permutation test
    num_queries: int

    @property
    def verdict(self) -> str:
        """better, worse, or undecided where the interval holds 0."""
        return "better" if self.interval_low > 0 else "worse" if self.interval_high < 0 else "undecided"

    @property
    def baseline_value(self) -> float:
        return self.value - self.gain


def compare(
    values: Values,
    systems: Sequence[str],
    baseline: str,
    settings: EvaluationSettings,
    seed: int,
    *,
    without: Collection[str] = (),
) -> list[Comparison]:
    """Every metric of `systems`, with the gain over `baseline` on the queries that both were measured on.

    Queries in `without` are left out; a system with no query left has no row. Raises ValueError on NaN.
    """
    from embed_pipeline.evaluation.metrics import METRICS
    from embed_pipeline.evaluation.significance import paired_bootstrap, paired_permutation

    rows = []
    for system in systems:
        measured, left_out = values[baseline][METRICS[0]], set(without)
        queries = [query for query in values[system][METRICS[0]] if query in measured and query not in left_out]
        if not queries:
            continue
        own = _matrix(values[system], queries, METRICS)
        differences = own - _matrix(values[baseline], queries, METRICS)
        samples = settings.bootstrap_samples
        intervals = paired_bootstrap(differences, samples=samples, confidence=settings.confidence, seed=seed)
        p_values = paired_permutation(differences, samples=samples, seed=seed)
        for column, metric in enumerate(METRICS):
            rows.append(
                Comparison(
                    system=system,
                    metric=metric,
                    value=float(own[:, column].mean()),
                    gain=float(intervals.mean[column]),
                    interval_low=float(intervals.low[column]),
                    interval_high=float(intervals.high[column]),
                    p_value=float(p_values[column]),
                    num_queries=len(queries),
                )
            )
    return rows


def _matrix(of_system: Mapping[str, Mapping[str, float]], queries: Sequence[str], metrics: Sequence[str]) -> np.ndarray:
    import numpy as np

    return np.array([[of_system[metric][query] for metric in metrics] for query in queries])
