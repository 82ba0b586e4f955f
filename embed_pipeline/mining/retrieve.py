"""What an embedder retrieves: the candidates that a reranker is tried on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from embed_pipeline.mining.mine import EncodesTexts
from embed_pipeline.models.collection import load_collection
from embed_pipeline.models.ranks import ALONE, Ranks
from embed_pipeline.tables import CANDIDATES


def retrieve(
    cleaned: Path,
    embedder: EncodesTexts,
    split: str,
    top_k: int,
    max_queries: int | None,
    seed: int,
    *,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> pa.Table:
    """The `top_k` best passages for the queries of `split` that have a positive, or a seeded sample of them.

    Returns a table in `tables.CANDIDATES`, ordered by the queries table, then rank. A positive that is not among the
    top k is not added: a reranker is to be judged on what it will be given. A split without a query that has a positive
    gives no rows.
    """
    collection = load_collection(cleaned, (split,))
    if not len(collection.query_ids):
        return CANDIDATES.empty_table()
    rows = sample_rows(len(collection.query_ids), max_queries, seed)
    passages = embedder.encode_passages(collection.texts, progress=progress)
    # All of the split, so that a cached encoding serves whatever the sample.
    queries = embedder.encode_queries(collection.queries, progress=progress)[rows]
    indices, scores = ranks.search(queries, passages, top_k, progress=progress)
    return pa.table(
        {
            "query_id": pa.array(np.repeat(collection.query_ids[rows], indices.shape[1]), pa.string()),
            "rank": pa.array(np.tile(np.arange(indices.shape[1], dtype=np.int32), len(rows))),
            "passage_id": pa.array(collection.passage_ids[indices.reshape(-1)], pa.string()),
            "score": pa.array(scores.reshape(-1)),
        },
        schema=CANDIDATES,
    )


def sample_rows(count: int, wanted: int | None, seed: int) -> np.ndarray:
    """`wanted` of `count` row numbers, seeded and ascending; all of them if there are no more."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=wanted, replace=False))
