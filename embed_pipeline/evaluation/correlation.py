"""Spearman's and Pearson's correlation, and how far chance may have moved the difference of two of them."""

from __future__ import annotations

from typing import Literal

import numpy as np

Method = Literal["spearman", "pearson"]

# Pairs drawn at a time, over all resamples: bounds memory to some 200 MB.
_DRAWS_PER_STEP = 2_000_000


def spearman(found: np.ndarray, expected: np.ndarray) -> float:
    """Spearman's rho of two (n,) arrays, equal values sharing their mean rank; NaN where one of them is constant or
    holds a value that is no number."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("nan")
    return float(_rho(_Ranked(found), _Ranked(expected), np.ones((1, len(found))))[0])


def pearson(found: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's r of two (n,) arrays; NaN as for `spearman`."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("nan")
    return float(_rho(_Valued(found), _Valued(expected), np.ones((1, len(found))))[0])


def bootstrap_difference(
    base: np.ndarray,
    candidate: np.ndarray,
    expected: np.ndarray,
    *,
    samples: int,
    confidence: float,
    seed: int,
    method: Method = "spearman",
) -> tuple[float, float] | None:
    """Percentile interval of rho(candidate, expected) - rho(base, expected), all (n,) over the same pairs.

    Pairs are drawn with replacement and ranked anew in every draw, as the statistic is defined (Efron and Tibshirani
    1993, chapter 13). None where no draw has two different values in each of the three.
    """
    count = len(expected)
    draw = np.random.default_rng(seed)
    ranked = [_of(method)(values) for values in (base, candidate, expected)]
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


def permutation_p_value(
    base: np.ndarray,
    candidate: np.ndarray,
    expected: np.ndarray,
    *,
    samples: int,
    seed: int,
    method: Method = "spearman",
) -> float:
    """Two-sided p-value of the hypothesis that two systems' similarities are exchangeable on every pair, all (n,).

    In each of `samples` draws a coin decides for every pair whether the two systems swap what they say of it; p is the
    share of draws, the observed one among them, in which the correlations differ by at least as much as observed
    (Fisher's randomisation test). A cosine of 0.8 means another thing to each system, so what is swapped is its rank
    among the system's own, or for Pearson's correlation its distance from the system's mean in standard deviations.
    NaN where a system gives all pairs one similarity.
    """
    count = len(expected)
    sides = [_standing(values, method) for values in (base, candidate)]
    if any(side is None for side in sides):
        return float("nan")
    both = _of(method)(np.concatenate([side for side in sides if side is not None]))
    wanted = _of(method)(np.concatenate([expected, expected]))
    observed = abs(
        _rho(both, wanted, _halves(np.zeros((1, count))))[0] - _rho(both, wanted, _halves(np.ones((1, count))))[0]
    )
    draw = np.random.default_rng(seed)
    step = max(1, _DRAWS_PER_STEP // (2 * count))
    extreme = 1
    for start in range(0, samples, step):
        swapped = draw.integers(0, 2, size=(min(step, samples - start), count), dtype=np.int8).astype(np.float64)
        difference = _rho(both, wanted, _halves(swapped)) - _rho(both, wanted, _halves(1.0 - swapped))
        # Sums that are equal but for the order of their terms count as equal.
        extreme += int((np.abs(difference) >= observed - 1e-12).sum())
    return extreme / (samples + 1)


def _halves(swapped: np.ndarray) -> np.ndarray:
    """(draws, n) of 0 and 1 -> (draws, 2n): which of both systems' values one of them has after the swap."""
    return np.hstack([1.0 - swapped, swapped])


def _standing(values: np.ndarray, method: Method) -> np.ndarray | None:
    """What one system says, on a scale that two systems share; None where it says one thing of all pairs."""
    if not len(np.unique(values)) > 1:
        return None
    if method == "spearman":
        ranks: np.ndarray = _Ranked(values).ranks(np.ones((1, len(values))))[0]
        return ranks
    standardised: np.ndarray = (values - values.mean()) / values.std()
    return standardised


def _of(method: Method) -> type[_Ranked] | type[_Valued]:
    return _Ranked if method == "spearman" else _Valued


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


class _Valued:
    """One variable as it stands, for Pearson's correlation."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values - values.mean()  # no digits are lost to a large mean

    def ranks(self, often: np.ndarray) -> np.ndarray:
        """(resamples, n) times each value was drawn -> the values less the mean of each resample."""
        mean = often @ self.values / often.sum(axis=1)
        return self.values[None, :] - mean[:, None]


def _rho(left: _Ranked | _Valued, right: _Ranked | _Valued, often: np.ndarray) -> np.ndarray:
    x, y = left.ranks(often), right.ranks(often)
    spread = np.sqrt((often * x * x).sum(axis=1) * (often * y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, (often * x * y).sum(axis=1) / spread, np.nan)
