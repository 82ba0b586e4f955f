"""A model that gives every text the same answer: its figures are the order of ties, and mean nothing."""

from __future__ import annotations

import numpy as np

_ROUNDING = 1e-5  # of float32 scores, whatever the batch


def is_collapsed(scores: np.ndarray) -> bool:
    """(n, k) scores of k passages for each of n queries: whether those of most queries are all the same number.

    False where there is nothing to compare: no query, or one passage.
    """
    if scores.size == 0 or scores.shape[1] < 2:
        return False
    spread = scores.max(axis=1) - scores.min(axis=1)
    same = spread <= _ROUNDING * np.maximum(1.0, np.abs(scores).max(axis=1))
    return bool(same.mean() > 0.5)


def told(what: str) -> str:
    """`what` is the model with its article, for a sentence."""
    return (
        f"{what} has collapsed: it gives the passages of a question all the same score, so it ranks nothing. Lower its "
        "learning_rate or raise warmup_ratio, see the training curve for where it happened, and train it again"
    )
