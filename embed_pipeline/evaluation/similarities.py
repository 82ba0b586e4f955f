"""Embedders on pairs of sentences whose likeness people have scored: correlations, gains, intervals and p-values."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embed_pipeline.errors import ArtifactError, ModelError
from embed_pipeline.evaluation.comparison import Comparison
from embed_pipeline.evaluation.correlation import (
    Method,
    bootstrap_difference,
    pearson,
    permutation_p_value,
    spearman,
)
from embed_pipeline.settings import EvaluationSettings
from embed_pipeline.tables import EXAMPLES_FILE, SIMILARITIES

if TYPE_CHECKING:
    from embed_pipeline.models.embedder import Embedder

METRICS: tuple[Method, ...] = ("spearman", "pearson")


@dataclass(frozen=True)
class Similarities:
    """What each system says of how alike the sentences of each pair are, beside what people said."""

    ids: tuple[str, ...]  # of the examples, ascending
    pairs: tuple[tuple[str, str], ...]
    expected: np.ndarray  # (n,) float64, 0..1
    by_system: dict[str, np.ndarray] = field(default_factory=dict)  # (n,) float64 cosines

    @classmethod
    def of_test(cls, cleaned: Path) -> Similarities:
        """The test pairs of a `cleaned_pairs` folder. Raises ArtifactError where they allow no rank correlation."""
        path = cleaned / EXAMPLES_FILE
        if not path.is_file():
            raise ArtifactError(f"no {EXAMPLES_FILE} in {cleaned}: expected the cleaned pairs of a scored source")
        table = pq.read_table(path, partitioning=None)
        rows = table.filter(pc.equal(table["split"], "test")).sort_by("example_id").to_pylist()
        expected = np.array([row["score"] for row in rows], dtype=np.float64)
        if len(np.unique(expected)) < 2:
            raise ArtifactError(
                f"{path}: {len(rows)} pairs of split test with {len(np.unique(expected))} different scores, so no rank "
                "correlation can be measured. Raise `cleaning.split.test`, or mend the split and score columns"
            )
        pairs = tuple((row["sentence1"], row["sentence2"]) for row in rows)
        return cls(tuple(row["example_id"] for row in rows), pairs, expected)

    def __contains__(self, system: str) -> bool:
        return system in self.by_system

    def measure(self, system: str, embedder: Embedder, *, progress: bool) -> None:
        """Encode the sentences without a prompt, as they are trained on, and keep the pairs' cosines.

        Raises ModelError where they are no numbers, or the same for all pairs.
        """
        texts = sorted({text for pair in self.pairs for text in pair})  # many stand in several pairs
        row_of = {text: row for row, text in enumerate(texts)}
        embeddings = embedder.encode_sentences(texts, progress=progress).astype(np.float64)
        left, right = (embeddings[[row_of[pair[side]] for pair in self.pairs]] for side in (0, 1))
        # Beyond float32's precision there is nothing to rank: equal texts are equally alike, on every machine.
        found = np.round((left * right).sum(axis=1), 6)
        if wrong := int((~np.isfinite(found)).sum()):
            raise ModelError(
                f"{wrong} of {len(found)} similarities of the model in {embedder.folder} are not finite numbers: its "
                "weights are broken, or the arithmetic overflows. Try `encode_precision: float32`, or train it again"
            )
        if len(np.unique(found)) < 2:
            raise ModelError(
                f"the model in {embedder.folder} takes all {len(found)} pairs for equally alike ({found[0]:.3f}): its "
                "embeddings have collapsed into one. Lower the learning rate, and train it again"
            )
        self.by_system[system] = found

    def table(self) -> pa.Table:
        """In `tables.SIMILARITIES`."""
        systems = list(self.by_system)
        return pa.table(
            {
                "system": pa.array(np.repeat(systems, len(self.ids)).tolist(), pa.string()),
                "example_id": pa.array([*self.ids] * len(systems), pa.string()),
                "similarity": pa.array(np.concatenate([self.by_system[system] for system in systems])),
                "score": pa.array(np.tile(self.expected, len(systems))),
            },
            schema=SIMILARITIES,
        )


def compare_similarities(
    similarities: Similarities,
    systems: Sequence[str],
    baseline: str,
    settings: EvaluationSettings,
    seed: int,
    *,
    without: Collection[str] = (),
    metrics: Sequence[Method] = METRICS,
) -> list[Comparison]:
    """The correlations of `systems`, with the gain over `baseline` on the same pairs; those in `without` left out.

    A system has no row where fewer than two pairs, or pairs of one score only, are left.
    """
    left_out = set(without)
    kept = np.array([id not in left_out for id in similarities.ids])
    expected = similarities.expected[kept]
    if len(np.unique(expected)) < 2:
        return []
    rows = []
    before = similarities.by_system[baseline][kept]
    samples = settings.bootstrap_samples
    for system in systems:
        after = similarities.by_system[system][kept]
        for metric in metrics:
            correlate = spearman if metric == "spearman" else pearson
            value = correlate(after, expected)
            gain = value - correlate(before, expected)
            if system == baseline:
                low = high = 0.0
                p_value = 1.0
            else:
                found = bootstrap_difference(
                    before, after, expected, samples=samples, confidence=settings.confidence, seed=seed, method=metric
                )
                low, high = found or (math.nan, math.nan)
                p_value = permutation_p_value(before, after, expected, samples=samples, seed=seed, method=metric)
            rows.append(
                Comparison(
                    system=system,
                    metric=metric,
                    value=value,
                    gain=gain,
                    interval_low=low,
                    interval_high=high,
                    p_value=p_value,
                    num_queries=len(expected),
                )
            )
    return rows
