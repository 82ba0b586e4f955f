"""Promises of the selection that must hold whatever the scores, the clusters and the judgements are."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_pipeline.mining.select import ORIGINS, REASONS, Candidates, Selection, select, thresholds
from embed_pipeline.models.search import search
from embed_pipeline.settings import MiningSettings

GIVEN, MINED, RANDOM = range(len(ORIGINS))


class Case:
    """Random queries and passages with few distinct vectors, so that equal scores are common."""

    def __init__(self, seed: int, queries: int, passages: int, mining: MiningSettings) -> None:
        draw = np.random.default_rng(seed)
        self.mining, self.seed = mining, seed
        few = draw.normal(size=(6, 3))
        few = (few / np.linalg.norm(few, axis=1, keepdims=True)).astype(np.float32)
        self.queries, self.passages = few[draw.integers(0, 6, queries)], few[draw.integers(0, 6, passages)]
        self.query_ids = np.array([f"q{i}" for i in range(queries)], dtype=object)
        self.clusters = draw.integers(0, passages, passages)
        # 2: withheld
        grade = draw.choice([-1, 0, 1, 2], p=[0.6, 0.15, 0.15, 0.1], size=(queries, passages))
        grade[np.arange(queries), draw.integers(0, passages, queries)] = 1
        self.grade = grade

    def candidates(self, rows: np.ndarray) -> Candidates:
        indices, scores = search(self.queries[rows], self.passages, self.mining.top_k)
        positives, given_, withheld = (np.nonzero(self.grade[rows] == grade) for grade in (1, 0, 2))
        return Candidates(indices, scores, self.query_ids[rows], self.clusters, positives, given_, withheld)

    def scores(self, rows: np.ndarray, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        return (self.queries[rows][query].astype(float) * self.passages[passage]).sum(1).astype(np.float32)

    def select(self, rows: np.ndarray | None = None, veto: bool = False, **named: Any) -> Selection:
        rows = np.arange(len(self.query_ids)) if rows is None else rows
        refuse = lambda query, passage: (passage + rows[query]) % 3 == 0  # noqa: E731
        return select(
            self.candidates(rows),
            self.mining,
            self.seed,
            lambda query, passage: self.scores(rows, query, passage),
            refuse if veto else None,
            **named,
        )


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 12),
    passages=st.integers(1, 40),
    mining=st.builds(
        lambda **told: MiningSettings(**told),
        top_k=st.integers(5, 50),
        range_min=st.integers(0, 4),
        num_negatives=st.integers(1, 12),
        max_score_ratio=st.sampled_from([None, 0.5, 0.95]),
        absolute_margin=st.sampled_from([None, 0.0, 0.3]),
        sampling=st.sampled_from(["top", "random"]),
        fill_with_random=st.booleans(),
    ),
)


def rows_of(selection: Selection) -> dict[int, list[tuple[int, int, float]]]:
    taken: dict[int, list[tuple[int, int, float]]] = {}
    for query, passage, origin, score in zip(
        selection.query, selection.passage, selection.origin, selection.score, strict=True
    ):
        taken.setdefault(int(query), []).append((int(passage), int(origin), float(score)))
    return taken


@settings(max_examples=150, deadline=None)
@given(case=cases, veto=st.booleans())
def test_promises(case: Case, veto: bool) -> None:
    selection = case.select(veto=veto)
    taken = rows_of(selection)
    for query, rows in taken.items():
        positives = np.flatnonzero(case.grade[query] == 1)
        known = np.flatnonzero(case.grade[query] > 0)
        near = set(case.clusters[known].tolist())
        passages = [passage for passage, _, _ in rows]
        assert not set(passages) & set(known.tolist())
        assert not near & {int(case.clusters[passage]) for passage in passages}
        assert len(set(passages)) == len(passages) <= case.mining.num_negatives
        assert [origin for _, origin, _ in rows] == sorted(origin for _, origin, _ in rows)
        lowest = case.scores(np.arange(len(case.query_ids)), np.full(len(positives), query), positives).min()
        allowed = thresholds(np.array([lowest]), case.mining)[0]
        ranking = search(case.queries[[query]], case.passages, len(case.passages))[0][0].tolist()
        for passage, origin, score in rows:
            rank = ranking.index(passage)
            if origin == GIVEN:
                assert case.grade[query, passage] == 0
            if origin == MINED:
                assert score <= allowed
                assert case.mining.range_min <= rank < case.mining.top_k
                assert not (veto and (passage + query) % 3 == 0)
            if origin == RANDOM:
                assert case.mining.fill_with_random
                assert rank >= case.mining.top_k


def by_hand(
    case: Case, veto: bool, closed: np.ndarray
) -> tuple[dict[int, list[tuple[int, int, float]]], dict[int, set[int]], list[tuple[int, int, int, float, str]]]:
    """The rules, one query at a time: what is taken but for random ones, what those may be, and what is refused."""
    everyone = np.arange(len(case.query_ids))
    candidates, settings = case.candidates(everyone), case.mining
    taken: dict[int, list[tuple[int, int, float]]] = {}
    fillers: dict[int, set[int]] = {}
    refused: list[tuple[int, int, int, float, str]] = []
    for query in everyone.tolist():
        grade = case.grade[query]
        own = case.scores(everyone, np.full(len(case.passages), query), np.arange(len(case.passages)))
        near = set(case.clusters[grade > 0].tolist())
        judged = [p for p in np.flatnonzero(grade == 0).tolist() if case.clusters[p] not in near]
        judged = sorted(judged, key=lambda p: (-own[p], p))[: settings.num_negatives]
        rows = [(p, GIVEN, float(own[p])) for p in judged]
        allowed = thresholds(own[grade == 1].min(keepdims=True), settings)[0]
        passed_over, last = [], -1
        for rank, (passage, score) in enumerate(zip(candidates.indices[query], candidates.scores[query], strict=True)):
            if len(rows) == settings.num_negatives or closed[query]:
                break
            last = rank
            if rank < settings.range_min or passage in judged:
                continue
            if grade[passage] > 0:
                reason = "known_positive"
            elif case.clusters[passage] in near:
                reason = "near_duplicate_of_positive"
            elif score > allowed:
                reason = "above_threshold"
            elif veto and (passage + query) % 3 == 0:
                reason = "vetoed"
            else:
                rows.append((int(passage), MINED, float(score)))
                continue
            passed_over.append((query, int(passage), rank, float(score), reason))
        refused += [row for row in passed_over if row[2] <= last]
        if rows:
            taken[query] = rows
        fillers[query] = {
            p for p in range(len(case.passages)) if case.clusters[p] not in near and p not in judged
        } - set(candidates.indices[query].tolist())
        if closed[query] or not settings.fill_with_random:
            fillers[query] = set()
    return taken, fillers, refused


@settings(max_examples=150, deadline=None)
@given(case=cases, veto=st.booleans(), some_closed=st.booleans())
def test_the_hardest_are_taken_as_by_hand(case: Case, veto: bool, some_closed: bool) -> None:
    case.mining = case.mining.model_copy(update={"sampling": "top"})
    count = len(case.query_ids)
    closed = np.random.default_rng(case.seed).random(count) < 0.3 if some_closed else np.zeros(count, dtype=bool)
    selection = case.select(veto=veto, closed=closed if some_closed else None)
    taken, fillers, refused = by_hand(case, veto, closed)
    found = rows_of(selection)
    everyone = np.arange(count)
    for query in range(count):
        drawn = [row for row in found.get(query, []) if row[1] == RANDOM]
        assert [row for row in found.get(query, []) if row[1] != RANDOM] == taken.get(query, [])
        missing = case.mining.num_negatives - len(taken.get(query, []))
        assert len(drawn) == len({p for p, _, _ in drawn}) == min(missing, len(fillers[query]))
        assert {p for p, _, _ in drawn} <= fillers[query]
        own = case.scores(everyone, np.full(len(drawn), query), np.array([p for p, _, _ in drawn], dtype=np.int64))
        assert [score for _, _, score in drawn] == own.tolist()
        assert drawn == sorted(drawn, key=lambda row: (-row[2], row[0]))
    columns = [selection.refused_query, selection.refused_passage, selection.refused_rank, selection.refused_score]
    reasons = [REASONS[reason] for reason in selection.refused_reason]
    assert list(zip(*(column.tolist() for column in columns), reasons, strict=True)) == refused


@settings(max_examples=60, deadline=None)
@given(case=cases, veto=st.booleans())
def test_nobody_goes_short_without_need(case: Case, veto: bool) -> None:
    """A query has fewer than wanted only where every passage is taken or was passed over for a reason."""
    selection = case.select(veto=veto)
    taken = rows_of(selection)
    for query in range(len(case.query_ids)):
        rows = taken.get(query, [])
        if len(rows) == case.mining.num_negatives:
            continue
        near = set(case.clusters[case.grade[query] > 0].tolist())
        indices = case.candidates(np.arange(len(case.query_ids))).indices[query]
        free = set(range(len(case.passages))) - set(indices.tolist()) - {passage for passage, _, _ in rows}
        free = {passage for passage in free if case.clusters[passage] not in near}
        assert not (case.mining.fill_with_random and free)
        looked_at = set(selection.refused_passage[selection.refused_query == query].tolist())
        window = set(indices[case.mining.range_min :].tolist())
        assert window <= looked_at | {passage for passage, _, _ in rows}


@settings(max_examples=60, deadline=None)
@given(case=cases, step=st.integers(1, 12), veto=st.booleans())
def test_chunks_order_and_other_queries_change_nothing(case: Case, step: int, veto: bool) -> None:
    whole = case.select(veto=veto)
    stepped = case.select(veto=veto, queries_per_step=step)
    for field in fields(Selection):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(stepped, field.name))
    rows = np.random.default_rng(case.seed).permutation(len(case.query_ids))[: max(1, len(case.query_ids) // 2)]
    some, expected = rows_of(case.select(rows, veto=veto)), rows_of(whole)
    for at, row in enumerate(rows):
        assert some.get(at, []) == expected.get(int(row), [])


@settings(max_examples=60, deadline=None)
@given(case=cases, veto=st.booleans())
def test_refused_are_bounded_and_reasoned(case: Case, veto: bool) -> None:
    selection = case.select(veto=veto)
    ranks = {}
    for query, passages in enumerate(case.candidates(np.arange(len(case.query_ids))).indices):
        ranks |= {(query, int(passage)): rank for rank, passage in enumerate(passages)}
    mined = {
        (int(q), int(p))
        for q, p, o in zip(selection.query, selection.passage, selection.origin, strict=True)
        if o == MINED
    }
    for query, passage, rank, reason in zip(
        selection.refused_query,
        selection.refused_passage,
        selection.refused_rank,
        selection.refused_reason,
        strict=True,
    ):
        key = (int(query), int(passage))
        assert key not in mined
        assert ranks[key] == rank >= case.mining.range_min
        assert (REASONS[reason] == "known_positive") == (case.grade[key] > 0)
        own = int((selection.query == query).sum() - ((selection.query == query) & (selection.origin == RANDOM)).sum())
        if own == case.mining.num_negatives:
            assert rank < max(ranks[other] for other in mined if other[0] == query)


def test_thresholds_stay_below_a_negative_positive() -> None:
    lowest = np.array([0.8, 0.0, -0.2], dtype=np.float32)
    np.testing.assert_allclose(thresholds(lowest, MiningSettings(max_score_ratio=0.95)), [0.76, 0.0, -0.21], atol=1e-7)
    both = MiningSettings(max_score_ratio=0.95, absolute_margin=0.1)
    np.testing.assert_allclose(thresholds(lowest, both), [0.7, -0.1, -0.3], atol=1e-7)
    assert np.isinf(thresholds(lowest, MiningSettings(max_score_ratio=None))).all()


def test_random_sampling_differs_by_seed_and_covers_the_window() -> None:
    count, top_k = 400, 20
    scores = np.tile(np.linspace(0.5, 0.1, top_k, dtype=np.float32), (count, 1))
    candidates = Candidates(
        np.tile(np.arange(1, top_k + 1), (count, 1)),
        scores,
        np.array([f"q{i}" for i in range(count)], dtype=object),
        np.arange(30),
        (np.arange(count), np.zeros(count, dtype=np.int64)),
        (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)),
        (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)),
    )
    mining = MiningSettings(top_k=top_k, num_negatives=5, sampling="random", max_score_ratio=None)
    flat = lambda query, passage: np.full(len(query), 0.9, dtype=np.float32)  # noqa: E731
    one, other = (select(candidates, mining, seed, flat) for seed in (1, 2))
    assert not np.array_equal(one.passage, other.passage)
    often = np.bincount(one.passage, minlength=top_k + 1)[1:]
    # Each of 20 places is expected 100 times with a deviation of 9.
    assert often.min() == pytest.approx(100, abs=45)
    assert often.max() == pytest.approx(100, abs=45)


def none_judged() -> tuple[np.ndarray, np.ndarray]:
    return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)


def one_query(passages: int, top_k: int) -> Candidates:
    """Passage 0 is its positive, 1 to `top_k` are retrieved."""
    return Candidates(
        np.arange(1, top_k + 1)[None, :],
        np.linspace(0.5, 0.1, top_k, dtype=np.float32)[None, :],
        np.array(["q17"], dtype=object),
        np.arange(passages),
        (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)),
        none_judged(),
        none_judged(),
    )


def test_a_seed_gives_the_same_negatives_on_every_machine() -> None:
    """Where these change, the same recipe gives other negatives: `stages.CODE_VERSIONS` has to change as well."""
    flat = lambda query, passage: np.full(len(query), 0.9, dtype=np.float32)  # noqa: E731
    mining = MiningSettings(top_k=20, num_negatives=6, sampling="random", max_score_ratio=None)
    assert select(one_query(30, 20), mining, 3, flat).passage.tolist() == [1, 7, 9, 14, 15, 19]
    # All that is retrieved lies above the threshold, so all six are drawn: from what is left, or blindly.
    mining = MiningSettings(top_k=5, num_negatives=6, max_score_ratio=0.01)
    assert select(one_query(14, 5), mining, 3, flat).passage.tolist() == [7, 8, 9, 10, 11, 13]
    assert select(one_query(1_000, 5), mining, 3, flat).passage.tolist() == [165, 232, 317, 451, 626, 725]
