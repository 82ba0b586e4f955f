"""What mining tells a person: how many of each kind, how the scores lie, and a few queries in full."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict

from embed_pipeline.mining.select import ORIGINS, REASONS, Selection
from embed_pipeline.models.collection import Collection

_BINS = 50
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXAMPLES = 5


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class MiningTimes(_Part):
    """Seconds. Encodings read back from the cache take next to none."""

    encode: float
    search: float
    select: float


class ScoreSummary(_Part):
    """Similarities of several kinds of pairs, over shared bins of equal width."""

    edges: list[float]  # bins + 1
    counts: dict[str, list[int]]  # kind -> pairs in each bin
    quantiles: dict[str, dict[str, float]]  # kind -> "0.05" -> similarity; kinds without a pair are left out


class ExamplePassage(_Part):
    text: str
    score: float
    why: str  # positive, or the origin of a negative, or the reason of a refusal


class MiningExample(_Part):
    query: str
    positives: list[ExamplePassage]
    negatives: list[ExamplePassage]
    refused: list[ExamplePassage]


class MiningReport(_Part):
    """Everything here is JSON-serialisable (`model_dump(mode="json")`)."""

    queries: int
    queries_without_positive: int  # of the split, left out
    passages: int
    num_negatives: int  # wanted for each query
    taken: dict[str, int]  # by origin
    refused: dict[str, int]  # by reason, all that were looked at
    queries_with_fewer: int
    queries_with_none: int
    scores: ScoreSummary
    seconds: MiningTimes
    passages_per_second: float
    precision: str
    examples: list[MiningExample]

    def sentence(self) -> str:
        taken = ", ".join(f"{count:,} {origin}" for origin, count in self.taken.items() if count)
        refused = ", ".join(f"{count:,} {reason}" for reason, count in self.refused.items() if count)
        return (
            f"{self.queries:,} queries got {taken or 'no'} negatives; refused: {refused or 'none'}; "
            f"{self.queries_with_fewer:,} queries have fewer than {self.num_negatives}"
        )


def score_summary(scores: Mapping[str, np.ndarray]) -> ScoreSummary:
    """Histograms over the common range of all kinds, and quantiles; each value is (n,) similarities."""
    all_scores = np.concatenate(list(scores.values()))
    low, high = (float(all_scores.min()), float(all_scores.max())) if len(all_scores) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1e-3, _BINS + 1)
    counts = {kind: np.histogram(np.clip(values, low, high), edges)[0].tolist() for kind, values in scores.items()}
    quantiles = {
        kind: {
            str(share): float(value) for share, value in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)
        }
        for kind, values in scores.items()
        if len(values)
    }
    return ScoreSummary(edges=edges.tolist(), counts=counts, quantiles=quantiles)


def examples_of(collection: Collection, selection: Selection, positive_scores: np.ndarray) -> list[MiningExample]:
    """A few queries spread evenly over the table, those first of which something besides a positive was refused."""
    told = np.zeros(len(collection.query_ids), dtype=bool)
    told[selection.refused_query[selection.refused_reason > 0]] = True
    rows = np.flatnonzero(told) if told.any() else np.arange(len(told))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).astype(int))]
    positive_query, positive_passage = collection.positives()

    def shown(at: np.ndarray, passages: np.ndarray, scores: np.ndarray, why: list[str]) -> list[ExamplePassage]:
        return [
            ExamplePassage(text=excerpt(collection.texts[passages[i]]), score=float(scores[i]), why=reason)
            for i, reason in zip(at, why, strict=True)
        ]

    examples = []
    for row in rows:
        positive = np.flatnonzero(positive_query == row)[:3]
        negative = np.flatnonzero(selection.query == row)[:5]
        refused = np.flatnonzero((selection.refused_query == row) & (selection.refused_reason > 0))[:5]
        reasons = [REASONS[selection.refused_reason[i]] for i in refused]
        examples.append(
            MiningExample(
                query=collection.queries[row],
                positives=shown(positive, positive_passage, positive_scores, ["positive"] * len(positive)),
                negatives=shown(
                    negative, selection.passage, selection.score, [ORIGINS[selection.origin[i]] for i in negative]
                ),
                refused=shown(refused, selection.refused_passage, selection.refused_score, reasons),
            )
        )
    return examples


def excerpt(text: str, characters: int = 240) -> str:
    """The beginning of a text on one line, cut by characters: a language without spaces has no words to cut at."""
    line = " ".join(text.split())
    return line if len(line) <= characters else f"{line[: characters - 1]}…"
