"""Spearman's rank correlation, and how far chance may have moved the difference of two of them."""

from __future__ import annotations

import numpy as np

# Pairs drawn at a time, over all resamples: bounds memory to some 200 MB.
_DRAWS_PER_STEP = 2_000_000


def spearman(found: np.ndarray, expected: np.ndarray) -> float:
    """Spearman's rho of two (n,) arrays, equal values sharing their mean rank; NaN where one of them is constant or
    holds a value that is no number."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("nan")
    return float(_rho(_Ranked(found), _Ranked(expected), np.ones((1, len(found))))[0])


def bootstrap_difference(
    base: np.ndarray, candidate: np.ndarray, expected: np.ndarray, *, samples: int, confidence: float, seed: int
) -> tuple[float, float] | None:
    """Percentile interval of rho(candidate, expected) - rho(base, expected), all (n,) over the same pairs.

    Pairs are drawn with replacement and ranked anew in every draw, as the statistic is defined (Efron and Tibshirani
    1993, chapter 13). None where no draw has two different values in each of the three.
    """
    count = len(expected)
    draw = np.random.default_rng(seed)
    ranked = [_Ranked(values) for values in (base, candidate, expected)]
    step = max(1, _DRAWS_PER_STEP // count)
    differences = []
    for start in range(0, samples, step):
        resamples = min(step, samples - start)
        drawn = draw.integers(0, count, size=(resamples, count)) + np.arange(resamples)[:, None] * count
        often = np.bincount(drawn.reshape(-1), minlength=resamples * count).reshape(resamples, count).astype(np.float64)
        differences.append(_rho(ranked[1], ranked[2], often) - _rho(ranked[0], ranked[2], often))
    found = np.concatenate(differences)
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return float(low), float(high)


class _Ranked:
    """One variable, sorted once, so that each resample is ranked by sums alone."""

    def __init__(self, values: np.ndarray) -> None:
        _, self.group = np.unique(values, return_inverse=True)  # of equal values, ascending
        self.order = np.argsort(self.group, kind="stable")
        self.starts = np.flatnonzero(np.diff(self.group[self.order], prepend=-1))

    def ranks(self, often: np.ndarray) -> np.ndarray:
        """(resamples, n) times each value was drawn -> its mean rank in each resample, less the mean of all ranks."""
        in_group = np.add.reduceat(often[:, self.order], self.starts, axis=1)
        upto = np.cumsum(in_group, axis=1)
        return (upto - (in_group - 1.0) / 2.0 - (often.sum(axis=1, keepdims=True) + 1.0) / 2.0)[:, self.group]


def _rho(left: _Ranked, right: _Ranked, often: np.ndarray) -> np.ndarray:
    x, y = left.ranks(often), right.ranks(often)
    spread = np.sqrt((often * x * x).sum(axis=1) * (often * y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (often * x * y).sum(axis=1) / spread, np.nan)
