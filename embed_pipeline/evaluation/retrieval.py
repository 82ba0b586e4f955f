"""nDCG@10 of an embedder on a few queries over a small corpus: what dev sets and guard sets are measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from embed_pipeline.evaluation.metrics import Qrels, ndcg_at_10
from embed_pipeline.models.search import finite_rows, search

if TYPE_CHECKING:
    from embed_pipeline.mining.mine import EncodesTexts


def ndcg_at_10_of(
    embedder: EncodesTexts,
    queries: Mapping[str, str],
    passages: Mapping[str, str],
    qrels: Qrels,
    *,
    device: str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Query id -> nDCG@10 of exact search; NaN for every query when an embedding is no number.

    `queries` and `passages` are texts by id, `qrels` judges those queries. `device` is where the search runs.
    """
    encoded_queries = embedder.encode_queries(list(queries.values()), progress=progress)
    encoded_passages = embedder.encode_passages(list(passages.values()), progress=progress)
    if not (finite_rows(encoded_queries).all() and finite_rows(encoded_passages).all()):
        return dict.fromkeys(queries, float("nan"))
    indices, scores = search(encoded_queries, encoded_passages, 10, device=device, progress=progress)
    ids = list(passages)
    run = {
        query: {ids[i]: float(score) for i, score in zip(row, row_scores, strict=True)}
        for query, row, row_scores in zip(queries, indices, scores, strict=True)
    }
    return ndcg_at_10(qrels, run)
