"""The primary metric of every version so far, and who was champion when: read from the store."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.champions import History, read_history
from embed_pipeline.evaluation.comparison import BASE_EMBEDDER, BM25, EMBEDDER, RERANKER, Comparison


class Served(BaseModel):
    """A time in which a candidate was the champion; `until` None: it still is."""

    model_config = ConfigDict(frozen=True)

    since: str  # UTC, ISO 8601
    until: str | None


class HistoryPoint(BaseModel):
    """One evaluation, measured on the test split of its time: points on different splits compare only roughly."""

    model_config = ConfigDict(frozen=True)

    version: str  # of the evaluation
    at: str  # UTC, ISO 8601
    test_set: str  # version of the cleaned pairs
    queries: int
    metric: str
    values: dict[str, float]  # system -> primary metric: BM25, base embedder, embedder, reranker
    outcome: str  # the gate's
    served: list[Served]

    @property
    def serving(self) -> float:
        """The metric of what would serve: the reranker over the embedder, or the embedder alone."""
        return self.values.get(RERANKER, self.values[EMBEDDER])


THIS = "this one"  # the version of an evaluation that is being made
SHOWN = (BM25, BASE_EMBEDDER, EMBEDDER, RERANKER)


def history_of(store: PipelineStore) -> list[HistoryPoint]:
    """One point for each evaluation in the store, oldest first."""
    history = read_history(store)
    points = []
    for evaluation in store.versions("evaluation"):
        summary = [Comparison.model_validate(row) for row in evaluation.report["summary"]]
        points.append(
            point_of(
                evaluation.version,
                evaluation.manifest.created_at,
                evaluation.input("cleaned_pairs"),
                summary,
                evaluation.report["metric"],
                evaluation.report["gate"]["outcome"],
                served_by(history, evaluation.version),
            )
        )
    return points


def point_of(
    version: str,
    at: str,
    test_set: str,
    summary: Sequence[Comparison],
    metric: str,
    outcome: str,
    served: Sequence[Served] = (),
) -> HistoryPoint:
    """The point of one evaluation from its summary."""
    rows = {row.system: row for row in summary if row.metric == metric and row.system in SHOWN}
    return HistoryPoint(
        version=version,
        at=at,
        test_set=test_set,
        queries=rows[EMBEDDER].num_queries,
        metric=metric,
        values={system: row.value for system, row in rows.items()},
        outcome=outcome,
        served=list(served),
    )


def served_by(history: History, evaluation: str) -> list[Served]:
    """When what `evaluation` (a version) promoted was the champion."""
    served = []
    ends: list[str | None] = [promotion.at for promotion in history.promotions[1:]]
    for promotion, until in zip(history.promotions, [*ends, None], strict=False):
        if promotion.champion is not None and promotion.champion.evaluation == evaluation:
            served.append(Served(since=promotion.at, until=until))
    return served
