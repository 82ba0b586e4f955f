"""One ranking from two models' scores."""

from __future__ import annotations

import numpy as np


def blend(embedder_scores: np.ndarray, reranker_scores: np.ndarray, weight: float) -> np.ndarray:
    """weight * z(embedder) + (1 - weight) * z(reranker) for one query's candidates.

    Both (n,), in the same order -> (n,) float64, higher is better. z standardises within the query, since cosines
    and logits have different scales (score fusion by z-score, e.g. Montague and Aslam 2001). Equal scores become 0.
    """
    return weight * _standardised(embedder_scores) + (1.0 - weight) * _standardised(reranker_scores)


def _standardised(scores: np.ndarray) -> np.ndarray:
    centred = np.asarray(scores, dtype=np.float64) - np.mean(scores, dtype=np.float64)
    spread = centred.std()
    return centred / spread if spread > 0 else np.zeros_like(centred)
