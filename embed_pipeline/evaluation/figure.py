"""One figure of one model with the items behind it, and what chance may have to do with the difference of two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from embed_pipeline.evaluation.correlation import Method, bootstrap_difference, permutation_p_value
from embed_pipeline.evaluation.significance import paired_bootstrap, paired_permutation


@dataclass(frozen=True)
class Figure:
    """One figure of one model. Its items, where it has any, are the same ones for every model."""

    value: float
    items: np.ndarray | None = None  # (n,) float64: their mean is the value; with `expected`, what is correlated
    expected: np.ndarray | None = None  # (n,) float64
    method: Method = "spearman"  # the correlation, with `expected`


def interval(
    before: Figure, after: Figure, *, samples: int, confidence: float, seed: int
) -> tuple[float, float] | None:
    """Percentile interval of `after.value - before.value`; the items are drawn anew `samples` times.

    None where a figure has no items or is no finite number, or where no draw allows a correlation.
    """
    if before.items is None or after.items is None or not math.isfinite(after.value - before.value):
        return None
    if before.expected is not None:
        return bootstrap_difference(
            before.items,
            after.items,
            before.expected,
            samples=samples,
            confidence=confidence,
            seed=seed,
            method=before.method,
        )
    differences = (after.items - before.items)[:, None].astype(np.float64)
    found = paired_bootstrap(differences, samples=samples, confidence=confidence, seed=seed)
    return float(found.low[0]), float(found.high[0])


def p_value(before: Figure, after: Figure, *, samples: int, seed: int) -> float:
    """Two-sided p-value of the hypothesis that the two models are exchangeable on every item.

    Both figures need items. NaN where a model gives all items one value and these are correlated.
    """
    assert before.items is not None
    assert after.items is not None
    if before.expected is not None:
        return permutation_p_value(
            before.items, after.items, before.expected, samples=samples, seed=seed, method=before.method
        )
    differences = (after.items - before.items)[:, None].astype(np.float64)
    return float(paired_permutation(differences, samples=samples, seed=seed)[0])
