"""The systems that are compared, each as a ranking of the whole corpus's best passages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from embed_pipeline.errors import ArtifactError, ModelError
from embed_pipeline.model_files import SERVING_FILE
from embed_pipeline.models.blend import blend
from embed_pipeline.models.collection import Collection
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.models.search import pair_scores, search
from embed_pipeline.tables import RANKINGS

DEPTH = 100
"""Passages of a ranking that are kept and measured: the deepest metrics end here."""

_LATENCY_QUERIES = 10


@dataclass(frozen=True)
class Ranking:
    """One system's passages for some of the collection's queries."""

    rows: np.ndarray  # (n,) int64 query rows
    passages: np.ndarray  # (n, k) int64 passage rows, best first; -1 after the last one found
    scores: np.ndarray  # (n, k) float32, falling; on the system's own scale

    def run(self, collection: Collection) -> dict[str, dict[str, float]]:
        """query_id -> passage_id -> a score that falls by 1 a rank, so no metric has ties of its own to settle."""
        depth = self.passages.shape[1]
        return {
            str(collection.query_ids[row]): {
                str(collection.passage_ids[passage]): float(depth - rank)
                for rank, passage in enumerate(found.tolist())
                if passage >= 0
            }
            for row, found in zip(self.rows, self.passages, strict=True)
        }

    def table(self, system: str, collection: Collection) -> pa.Table:
        """In `tables.RANKINGS`, ordered by query, then rank."""
        at = np.nonzero(self.passages >= 0)
        return pa.table(
            {
                "system": pa.array([system] * len(at[0]), pa.string()),
                "query_id": pa.array(collection.query_ids[self.rows[at[0]]], pa.string()),
                "rank": pa.array(at[1], pa.int32()),
                "passage_id": pa.array(collection.passage_ids[self.passages[at]], pa.string()),
                "score": pa.array(self.scores[at], pa.float32()),
            },
            schema=RANKINGS,
        )

    def top(self, depth: int) -> Ranking:
        return Ranking(self.rows, self.passages[:, :depth], self.scores[:, :depth])

    def of_rows(self, rows: np.ndarray) -> Ranking:
        """Of some of its queries; `rows` ascending, all of them ranked here."""
        at = np.searchsorted(self.rows, rows)
        return Ranking(rows, self.passages[at], self.scores[at])


@dataclass(frozen=True)
class Embedded:
    """What one embedder gives: its ranking, and how it scores positives and the passages it takes for them."""

    ranking: Ranking
    positive_scores: np.ndarray  # (p,) of all positives
    best_other_scores: np.ndarray  # (n,) of each query's highest-ranked passage that is no positive
    milliseconds_per_query: float


def rank_with_embedder(collection: Collection, embedder: Embedder, top_k: int, *, progress: bool) -> Embedded:
    """Encode everything (or read it from the embedder's cache) and search exactly. Raises ModelError on NaN."""
    passages = embedder.encode_passages(collection.texts, progress=progress)
    queries = embedder.encode_queries(collection.queries, progress=progress)
    indices, scores = embedder.ranks.search(queries, passages, top_k, progress=progress)
    ranking = Ranking(np.arange(len(queries)), indices, scores)
    positive_scores = pair_scores(queries, passages, *collection.positives())
    others = ~_is_positive(collection, indices)
    first = others.argmax(axis=1)
    at = np.flatnonzero(others.any(axis=1))
    return Embedded(ranking, positive_scores, scores[at, first[at]], _latency(collection, embedder, passages))


@dataclass(frozen=True)
class Reranked:
    """What one reranker gives for the first passages of each query."""

    logits: np.ndarray  # (n, window) float32, in the ranking's order
    milliseconds_per_query: float  # without the retrieval


def rerank(
    collection: Collection, ranking: Ranking, rerank_top_k: int, reranker: Reranker, *, progress: bool
) -> Reranked:
    """Score the best `rerank_top_k` passages of each query. Raises ModelError when a score is NaN."""
    window = ranking.passages[:, :rerank_top_k]
    pairs = [
        [(collection.queries[row], collection.texts[passage]) for passage in found]
        for row, found in zip(ranking.rows, window.tolist(), strict=True)
    ]
    logits = reranker.score([pair for of_query in pairs for pair in of_query], progress=progress)
    if np.isnan(logits).any():
        raise ModelError(
            f"{int(np.isnan(logits).sum())} of {len(logits)} scores of the reranker are NaN: its weights are "
            "broken, or the arithmetic overflows. Try `encode_precision: float32`, or train it again"
        )
    singly = pairs[: _LATENCY_QUERIES + 1]
    return Reranked(
        logits.reshape(window.shape),
        _median_milliseconds(lambda of_query: reranker.compute(*zip(*of_query, strict=True)), singly),
    )


def reordered(ranking: Ranking, logits: np.ndarray, embedder_weight: float) -> Ranking:
    """The ranking with its first passages in the order of the blended scores; see `models.blend`.

    What lies below the reranked window keeps the embedder's order after it, so that Recall@100 stays comparable; its
    scores go down by 1 a rank, since no reranker has seen it. Equal blended scores keep the embedder's order.
    """
    window = logits.shape[1]
    passages, scores = ranking.passages.copy(), np.empty_like(ranking.scores)
    for row, of_reranker in enumerate(logits):
        final = blend(ranking.scores[row, :window], of_reranker, embedder_weight)
        order = np.argsort(-final, kind="stable")
        passages[row, :window] = ranking.passages[row, :window][order]
        scores[row, :window] = final[order]
        scores[row, window:] = final.min() - np.arange(1, passages.shape[1] - window + 1)
    return Ranking(ranking.rows, passages, scores)


def read_serving(reranker: Path) -> tuple[float, dict[str, float]]:
    """The embedder's share in the final score, and dev nDCG@10 by share where the training tried several."""
    path = reranker / SERVING_FILE
    if not path.is_file():
        raise ArtifactError(f"no {SERVING_FILE} in {reranker}: expected the folder of a reranker version")
    serving = json.loads(path.read_text())
    weight = serving.get("embedder_weight")
    if not isinstance(weight, int | float) or not 0.0 <= weight <= 1.0:
        raise ArtifactError(
            f"{path}: expected `embedder_weight` from 0 to 1, found {weight!r}. Train the reranker again"
        )
    return float(weight), serving.get("dev_ndcg_at_10_by_weight", {})


def _is_positive(collection: Collection, indices: np.ndarray) -> np.ndarray:
    query, passage = collection.positives()
    count = np.int64(len(collection.texts))
    return np.isin(np.arange(len(indices))[:, None] * count + indices, query * count + passage)


def _latency(collection: Collection, embedder: Embedder, passages: np.ndarray) -> float:
    """Median milliseconds to encode one query and search the corpus, as a service would."""

    def answer(text: str) -> None:
        # Past the cache, which would answer instead of the model.
        search(embedder.compute([text], "query"), passages, 10)

    return _median_milliseconds(answer, collection.queries[: _LATENCY_QUERIES + 1])


T = TypeVar("T")


def _median_milliseconds(answer: Callable[[T], object], one_by_one: Sequence[T]) -> float:
    taken = []
    for request in one_by_one:
        started = time.perf_counter()
        answer(request)
        taken.append(time.perf_counter() - started)
    # The first call warms up.
    return float(np.median(taken[1:] or taken) * 1_000)
