"""Exact search: every query against every passage."""

from __future__ import annotations

import numpy as np
import torch

from embed_pipeline.models.precision import default_device


def search(
    queries: np.ndarray, passages: np.ndarray, top_k: int, *, queries_per_step: int = 256, device: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `top_k` passages with the highest dot product for each query.

    queries (n, d) and passages (m, d) float32 -> indices (n, k) int64 and scores (n, k) float32, best first, where
    k = min(top_k, m). Equal scores are ordered by passage index, so a ranking does not depend on the machine.
    """
    device = device or default_device()
    k = min(top_k, len(passages))
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    matrix = torch.from_numpy(passages).to(device).T
    for start in range(0, len(queries), queries_per_step):
        step = slice(start, start + queries_per_step)
        values, found = torch.topk(torch.from_numpy(queries[step]).to(device) @ matrix, k, dim=1)
        by_index = torch.argsort(found, dim=1)
        values, found = values.gather(1, by_index), found.gather(1, by_index)
        by_score = torch.argsort(values, dim=1, descending=True, stable=True)
        indices[step] = found.gather(1, by_score).cpu().numpy()
        scores[step] = values.gather(1, by_score).cpu().numpy()
    return indices, scores
