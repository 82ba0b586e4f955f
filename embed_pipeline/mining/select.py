"""Which retrieved passages become a query's hard negatives. Arrays in, arrays out: no files, no models.

Positive-aware mining after NV-Retriever (arXiv 2407.15831): what scores nearly as high as the query's positive is
probably an answer that nobody has judged.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from embed_pipeline.settings import MiningSettings

ORIGINS = ("given", "mined", "random")
REASONS = ("known_positive", "near_duplicate_of_positive", "above_threshold", "vetoed")
_GIVEN, _MINED, _RANDOM = range(3)
_KNOWN, _NEAR, _ABOVE, _VETOED = range(4)
# A candidate that is neither refused nor wanted: still free, outside the rank window, or a given negative.
_FREE, _OUTSIDE = -1, -2

# Chosen so that a step's arrays stay near 10 MB at 100 candidates a query; the result does not depend on it.
QUERIES_PER_STEP = 8_192

PairScores = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(query rows, passage rows), each (p,) -> (p,) float32 similarities"""
Veto = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(query rows, passage rows), each (p,) -> (p,) bool: True where the passage is taken for an answer"""


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from, for n queries and m passages."""

    indices: np.ndarray  # (n, k) int64 passage rows, best first
    scores: np.ndarray  # (n, k) float32
    query_ids: np.ndarray  # (n,) object; the seed of a query is its id
    clusters: np.ndarray  # (m,) int64, near-duplicates share a number
    positives: tuple[np.ndarray, np.ndarray]  # (query rows, passage rows), ordered by query row, one at least for each
    given: tuple[np.ndarray, np.ndarray]  # the same, of what a person judged as not relevant
    withheld: tuple[np.ndarray, np.ndarray]  # in any order: known as relevant, though no positive to learn from


@dataclass(frozen=True)
class Selection:
    """One row a taken negative, ordered by query, origin (given, mined, random), score; and one a refused candidate."""

    query: np.ndarray  # int64
    passage: np.ndarray  # int64
    score: np.ndarray  # float32
    origin: np.ndarray  # int64, position in ORIGINS
    refused_query: np.ndarray  # int64
    refused_passage: np.ndarray  # int64
    refused_rank: np.ndarray  # int64, 0-based
    refused_score: np.ndarray  # float32
    refused_reason: np.ndarray  # int64, position in REASONS


def thresholds(lowest_positive: np.ndarray, settings: MiningSettings) -> np.ndarray:
    """The highest score a mined negative may have: (n,) score of each query's lowest positive s -> (n,) float64.

    With `max_score_ratio` r it is s - (1 - r) * |s|. That is r * s for the usual s > 0. For s < 0 a plain r * s would
    lie above the positive itself; here the threshold stays below it by the same share. With `absolute_margin` it is at
    most s - margin. With neither there is none (infinity).
    """
    lowest = lowest_positive.astype(np.float64)
    allowed = np.full(lowest.shape, np.inf)
    if settings.max_score_ratio is not None:
        allowed = lowest - (1.0 - settings.max_score_ratio) * np.abs(lowest)
    if settings.absolute_margin is not None:
        allowed = np.minimum(allowed, lowest - settings.absolute_margin)
    return allowed


def select(
    candidates: Candidates,
    settings: MiningSettings,
    seed: int,
    scores_of: PairScores,
    veto: Veto | None = None,
    *,
    closed: np.ndarray | None = None,
    queries_per_step: int = QUERIES_PER_STEP,
) -> Selection:
    """Choose up to `num_negatives` for each query: given ones first, then mined, then random.

    Never taken: a positive of the query, withheld ones too, or a passage in the near-duplicate cluster of one. Given
    negatives are a person's judgement, so neither threshold, window nor veto applies to them; the hardest go first.
    Mined ones have a rank (0-based, positives counted) in [range_min, top_k) and a score up to `thresholds`. Random
    ones come from outside the retrieved top_k, since what is inside was passed over for a reason; a corpus too small
    gives fewer. Queries that are `closed`, (n,) bool, get given ones only.

    A query's negatives depend on its own candidates, the settings, and (seed, query_id): not on the order of the
    queries, on other queries, or on `queries_per_step`.

    Refused rows are the candidates of the window that were looked at, which ends at the last one taken, or with the
    window where too few were found.
    """
    forbidden = _Forbidden(candidates)
    positive_query, positive_passage = candidates.positives
    lowest = np.full(len(candidates.query_ids), np.inf)
    np.minimum.at(lowest, positive_query, scores_of(positive_query, positive_passage))
    allowed = thresholds(lowest, settings)
    parts = [_take_given(candidates, settings, forbidden, scores_of)]
    given_query, given_passage = parts[0].query, parts[0].passage
    judged = np.sort(forbidden.keys(given_query, given_passage))
    missing = settings.num_negatives - np.bincount(given_query, minlength=len(candidates.query_ids))
    if closed is not None:
        missing[closed] = 0
    for start in range(0, len(candidates.query_ids), queries_per_step):
        rows = np.arange(start, min(start + queries_per_step, len(candidates.query_ids)))
        mined = _mine_rows(rows, candidates, settings, seed, forbidden, judged, allowed, missing, veto)
        parts.append(mined)
        missing[rows] -= np.bincount(mined.query - start, minlength=len(rows))
    if settings.fill_with_random:
        parts.append(_take_random(candidates, forbidden, missing, (given_query, given_passage), seed, scores_of))
    return _concatenate(parts)


class _Forbidden:
    """Looks up whether (query, passage) pairs are positives (withheld ones are), or near-duplicates of one."""

    def __init__(self, candidates: Candidates) -> None:
        query, passage = (
            np.concatenate(columns) for columns in zip(candidates.positives, candidates.withheld, strict=True)
        )
        self.clusters = candidates.clusters
        self.positives = np.unique(self.keys(query, passage))
        self.near = np.unique(self.keys(query, self.clusters[passage]))

    def keys(self, query: np.ndarray, passage_or_cluster: np.ndarray) -> np.ndarray:
        # A cluster's number is below the number of passages, so one factor serves both.
        return query * np.int64(len(self.clusters)) + passage_or_cluster

    def is_positive(self, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        return _is_among(self.keys(query, passage), self.positives)

    def is_near(self, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        return _is_among(self.keys(query, self.clusters[passage]), self.near)

    def clusters_near(self, row: int) -> set[int]:
        first = row * len(self.clusters)
        start, end = np.searchsorted(self.near, [first, first + len(self.clusters)])
        return set((self.near[start:end] - first).tolist())


def _take_given(
    candidates: Candidates, settings: MiningSettings, forbidden: _Forbidden, scores_of: PairScores
) -> Selection:
    query, passage = candidates.given
    kept = ~forbidden.is_near(query, passage)
    query, passage = query[kept], passage[kept]
    score = scores_of(query, passage)
    order = np.lexsort((passage, -score, query))
    query, passage, score = query[order], passage[order], score[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)
    first = place < settings.num_negatives
    return _taken(query[first], passage[first], score[first], _GIVEN)


def _mine_rows(
    rows: np.ndarray,
    candidates: Candidates,
    settings: MiningSettings,
    seed: int,
    forbidden: _Forbidden,
    judged: np.ndarray,
    allowed: np.ndarray,
    missing: np.ndarray,
    veto: Veto | None,
) -> Selection:
    passage, score = candidates.indices[rows], candidates.scores[rows]
    query = np.broadcast_to(rows[:, None], passage.shape)
    rank = np.broadcast_to(np.arange(passage.shape[1]), passage.shape)
    state = np.full(passage.shape, _FREE, dtype=np.int8)
    state[score > allowed[rows, None]] = _ABOVE
    state[forbidden.is_near(query, passage)] = _NEAR
    state[forbidden.is_positive(query, passage)] = _KNOWN
    state[_is_among(forbidden.keys(query, passage), judged)] = _OUTSIDE
    state[rank < settings.range_min] = _OUTSIDE
    priority = rank if settings.sampling == "top" else _random_priorities(candidates.query_ids[rows], passage, seed)
    taken = _take(query, passage, state, priority, missing[rows], veto)
    # Looked at: up to the last one taken, or the whole window where that was not enough.
    last = np.where(taken, rank, -1).max(axis=1, initial=-1)
    found = taken.sum(axis=1)
    last = np.where(found < missing[rows], passage.shape[1], last)
    refused = (state >= 0) & (rank <= last[:, None]) & (missing[rows, None] > 0)
    selection = _taken(query[taken], passage[taken], score[taken], _MINED)
    return _with_refused(selection, query[refused], passage[refused], rank[refused], score[refused], state[refused])


def _take(
    query: np.ndarray,
    passage: np.ndarray,
    state: np.ndarray,
    priority: np.ndarray,
    missing: np.ndarray,
    veto: Veto | None,
) -> np.ndarray:
    """Mark (r, k) what is taken, lowest priority number first; what the veto refuses is replaced by the next."""
    taken = np.zeros(state.shape, dtype=bool)
    order = np.argsort(priority, axis=1, kind="stable")
    while True:
        still = missing - taken.sum(axis=1)
        free = np.take_along_axis((state == _FREE) & ~taken, order, axis=1)
        chosen = np.zeros(state.shape, dtype=bool)
        np.put_along_axis(chosen, order, free & (np.cumsum(free, axis=1) <= still[:, None]), axis=1)
        if not chosen.any():
            return taken
        if veto is not None:
            at = np.argwhere(chosen)[veto(query[chosen], passage[chosen])]
            state[at[:, 0], at[:, 1]] = _VETOED
            chosen[at[:, 0], at[:, 1]] = False
        taken |= chosen


def _take_random(
    candidates: Candidates,
    forbidden: _Forbidden,
    missing: np.ndarray,
    given: tuple[np.ndarray, np.ndarray],
    seed: int,
    scores_of: PairScores,
) -> Selection:
    sizes = np.bincount(candidates.clusters, minlength=len(candidates.clusters))
    queries: list[int] = []
    passages: list[int] = []
    for row in np.flatnonzero(missing > 0):
        clusters = forbidden.clusters_near(int(row))
        blocked = set(candidates.indices[row].tolist())
        blocked.update(given[1][slice(*np.searchsorted(given[0], [row, row + 1]))].tolist())
        draw = random.Random(f"{seed}:{candidates.query_ids[row]}")
        unusable = len(blocked) + int(sizes[list(clusters)].sum())
        drawn = _draw(draw, int(missing[row]), candidates.clusters, blocked, clusters, unusable)
        queries.extend([int(row)] * len(drawn))
        passages.extend(drawn)
    query, passage = np.array(queries, dtype=np.int64), np.array(passages, dtype=np.int64)
    score = scores_of(query, passage)
    order = np.lexsort((passage, -score, query))
    return _taken(query[order], passage[order], score[order], _RANDOM)


def _draw(
    draw: random.Random, wanted: int, clusters: np.ndarray, blocked: set[int], near: set[int], unusable: int
) -> list[int]:
    """Up to `wanted` different passages that are not blocked and in no forbidden cluster."""
    if len(clusters) < 2 * (unusable + wanted):
        # So small a corpus, or so large a cluster, that drawing blindly would often miss.
        left = [p for p in range(len(clusters)) if p not in blocked and clusters[p] not in near]
        return draw.sample(left, min(wanted, len(left)))
    drawn: dict[int, None] = {}
    while len(drawn) < wanted:
        passage = draw.randrange(len(clusters))
        if passage not in blocked and clusters[passage] not in near:
            drawn[passage] = None
    return list(drawn)


def _random_priorities(query_ids: np.ndarray, passage: np.ndarray, seed: int) -> np.ndarray:
    """(r, k) uint64: SplitMix64 of (seed, query_id) and the rank, so a query's sample is its own."""
    digests = [hashlib.blake2b(f"{seed}:{query_id}".encode(), digest_size=8).digest() for query_id in query_ids]
    start = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
    step = np.arange(1, passage.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = start[:, None] + step
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _is_among(keys: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.zeros(keys.shape, dtype=bool)
    at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return ordered[at] == keys


def _taken(query: np.ndarray, passage: np.ndarray, score: np.ndarray, origin: int) -> Selection:
    none = np.empty(0, dtype=np.int64)
    return Selection(
        query, passage, score, np.full(len(query), origin), none, none, none, np.empty(0, dtype=np.float32), none
    )


def _with_refused(
    taken: Selection, query: np.ndarray, passage: np.ndarray, rank: np.ndarray, score: np.ndarray, reason: np.ndarray
) -> Selection:
    return Selection(
        taken.query, taken.passage, taken.score, taken.origin, query, passage, rank, score, reason.astype(np.int64)
    )


def _concatenate(parts: list[Selection]) -> Selection:
    names = [field.name for field in fields(Selection)]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    # Stable: within a query and an origin the parts' own order, from the highest score, stays.
    order = np.lexsort((columns["origin"], columns["query"]))
    return Selection(
        **{name: column[order] if not name.startswith("refused") else column for name, column in columns.items()}
    )
