"""Is a gain more than chance? Paired bootstrap and paired permutation test over the queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Queries drawn at a time: bounds memory to some 64 MB whatever the number of queries and samples.
_DRAWS_PER_STEP = 4_000_000


@dataclass(frozen=True)
class Intervals:
    """Mean differences and the percentile intervals around them; each (m,) float64, one entry a metric."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def paired_bootstrap(differences: np.ndarray, *, samples: int, confidence: float, seed: int) -> Intervals:
    """Percentile interval of the mean of per-query differences between two systems on the same queries.

    differences (n queries, m metrics). Queries are drawn with replacement, `samples` times, and all metrics see the
    same draws. The paired bootstrap test of information retrieval: Sakai, SIGIR 2006; intervals: Efron and
    Tibshirani 1993, chapter 13. Raises ValueError when there is no query or a difference is not finite.
    """
    _check(differences)
    count = len(differences)
    draw = np.random.default_rng(seed)
    step = max(1, _DRAWS_PER_STEP // count)
    means = np.empty((samples, differences.shape[1]))
    for start in range(0, samples, step):
        resamples = min(step, samples - start)
        drawn = draw.integers(0, count, size=(resamples, count))
        drawn += np.arange(resamples)[:, None] * count
        # How often each query was drawn, times its differences: one product for all metrics.
        often = np.bincount(drawn.reshape(-1), minlength=resamples * count).reshape(resamples, count)
        means[start : start + resamples] = often @ differences / count
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return Intervals(differences.mean(axis=0), low, high)


def paired_permutation(differences: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Two-sided p-values (m,) of the hypothesis that two systems are exchangeable on every query.

    differences (n queries, m metrics). The signs of the queries' differences are drawn `samples` times, the same for
    all metrics; p is the share of draws, the observed one among them, whose mean is at least as far from 0 as the
    observed. Fisher's randomisation test, the one to use for retrieval metrics by Smucker, Allan and Carterette, CIKM
    2007. Raises ValueError when there is no query or a difference is not finite.
    """
    _check(differences)
    count = len(differences)
    draw = np.random.default_rng(seed)
    observed = np.abs(differences.sum(axis=0))
    # Sums that are equal but for the order of their terms count as equal.
    threshold = observed - 1e-9 * np.abs(differences).sum(axis=0)
    step = max(1, _DRAWS_PER_STEP // count)
    extreme = np.ones(differences.shape[1], dtype=np.int64)
    for start in range(0, samples, step):
        signs = draw.integers(0, 2, size=(min(step, samples - start), count), dtype=np.int8) * 2 - 1
        extreme += (np.abs(signs @ differences) >= threshold).sum(axis=0)
    return extreme / (samples + 1)


def _check(differences: np.ndarray) -> None:
    if differences.ndim != 2 or not len(differences):
        raise ValueError(f"expected differences of shape (queries, metrics) with a query; found {differences.shape}")
    if not np.isfinite(differences).all():
        raise ValueError("a difference between two systems is not a finite number")
