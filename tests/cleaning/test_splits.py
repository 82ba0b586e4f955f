"""No query, document or near-duplicate in two splits: whatever links the rows, whoever delivered the splits."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embed_pipeline.cleaning.splits import assign_groups

Row = dict[str, Any]
RANK = {"test": 0, "dev": 1, "train": 2}
LIMITED = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def passage(number: int, variant: int = 0) -> str:
    """Texts of one number are near-duplicates, texts of two numbers have nothing in common."""
    words = " ".join(f"{chr(97 + number % 26)}{number * 31 + i}{chr(97 + i % 26)}" for i in range(40))
    return words if variant == 0 else f"{words.capitalize()}! v{variant}"


def question(number: int, variant: int = 0) -> str:
    """Questions of one number differ in case, punctuation and word order only."""
    return (f"why number {number}", f"Number {number}, why?", f"WHY: number {number}!")[variant]


def filler(start: int, count: int, **columns: Any) -> list[Row]:
    return [{"query": question(n), "passage": passage(n), **columns} for n in range(start, start + count)]


rows_of_a_graph = st.lists(
    st.builds(
        lambda q, qv, p, pv, d, s: {
            "query": question(q, qv),
            "passage": passage(p, pv),
            "document_id": None if d == 0 else f"doc {d}",
            "split": s,
        },
        st.integers(0, 12),
        st.integers(0, 2),
        st.integers(0, 12),
        st.integers(0, 2),
        st.integers(0, 8),
        st.sampled_from(["train", "Train", "validation", "dev", "test", None]),
    ),
    min_size=1,
    max_size=30,
)


def key(query: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"\w+", query.lower())))


def shingles(text: str) -> set[str]:
    letters = re.sub(r"[\W_]+", "", text.lower())
    return {letters[i : i + 5] for i in range(len(letters) - 4)}


def similar(left: str, right: str) -> bool:
    a, b = shingles(left), shingles(right)
    return len(a & b) >= 0.85 * len(a | b)


def leaks(rows: list[Row], split_of: dict[str, str]) -> list[tuple[Row, Row]]:
    """Pairs of rows in different splits that share query key, document, or (nearly) the passage: the long way."""
    return [
        (left, right)
        for left, right in combinations(rows, 2)
        if split_of[left["query"]] != split_of[right["query"]]
        and (
            key(left["query"]) == key(right["query"])
            or (left["document_id"] is not None and left["document_id"] == right["document_id"])
            or similar(left["passage"], right["passage"])
        )
    ]


@LIMITED
@given(graph=rows_of_a_graph, action=st.sampled_from(["merge", "keep"]))
def test_no_leak_across_splits_that_were_cut(cleaned: Callable[..., Any], graph: list[Row], action: str) -> None:
    rows = [{**row, "split": None} for row in graph] + filler(100, 15, document_id=None)
    result = cleaned(rows, near_duplicates={"action": action})
    kept = [row for number, row in enumerate(rows) if number not in result.reasons]
    assert leaks(kept, result.split_of) == []
    assert set(result.reasons.values()) <= {"duplicate"}
    assert set(result.split_of.values()) == {"train", "dev", "test"}
    assert result.violations == []


@LIMITED
@given(graph=rows_of_a_graph, action=st.sampled_from(["merge", "keep"]))
def test_no_leak_across_delivered_splits(cleaned: Callable[..., Any], graph: list[Row], action: str) -> None:
    sound = [row for n, s in enumerate(RANK) for row in filler(100 + 10 * n, 3, document_id=None, split=s)]
    rows = graph + sound
    result = cleaned(rows, near_duplicates={"action": action})
    kept = [row for number, row in enumerate(rows) if number not in result.reasons]
    named = {"validation": "dev", "Train": "train", None: "train"}
    delivered = [named.get(row["split"], row["split"]) for row in rows]
    assert leaks(kept, result.split_of) == []
    for number, row in enumerate(rows):
        if number not in result.reasons:
            assert result.split_of[row["query"]] == delivered[number]
        elif result.reasons[number] == "split_leak":
            stronger = [other for n, other in enumerate(rows) if RANK[delivered[n]] < RANK[delivered[number]]]
            assert stronger
            assert delivered[number] != "test"
    assert result.violations == []


@LIMITED
@given(graph=rows_of_a_graph)
def test_cleaning_what_was_cleaned_changes_nothing(cleaned: Callable[..., Any], graph: list[Row]) -> None:
    once = cleaned([{**row, "split": None} for row in graph] + filler(100, 15))
    split = {row["query_id"]: row["split"] for row in once.queries}
    again: list[Row] = [{"kind": "query", "query_id": q["query_id"], "query": q["query"]} for q in once.queries]
    again += [
        {"kind": "passage", "source": "p", "passage": p["text"], **{k: p[k] for k in ("passage_id", "document_id")}}
        for p in once.passages
    ]
    again += [{"kind": "judgement", "source": "j", "split": split[r["query_id"]], **r} for r in once.qrels]
    twice = cleaned(again)
    assert twice.rejected == []
    assert twice.qrels == once.qrels
    assert [p | {"document_id": 0} for p in twice.passages] == [p | {"document_id": 0} for p in once.passages]
    # A passage that came with several documents is listed under one, so groups can only become finer.
    assert [(q["query"], q["split"]) for q in twice.queries] == [(q["query"], q["split"]) for q in once.queries]


def test_rows_added_later_move_nothing(cleaned: Callable[..., Any]) -> None:
    before = cleaned(filler(0, 60))
    # Some of what is added joins a group that was there: a new question about an old passage.
    more = [{"query": question(200 + n), "passage": passage(n)} for n in range(20)]
    after = cleaned(filler(100, 60) + more + filler(0, 60))
    assert before.split_of.items() <= after.split_of.items()
    assert all(after.split_of[question(200 + n)] == before.split_of[question(n)] for n in range(20))


def test_a_query_delivered_in_two_splits_stays_in_test(cleaned: Callable[..., Any]) -> None:
    rows = [
        {"query": question(1, 1), "passage": passage(1), "split": "train"},
        {"query": question(1), "passage": passage(2), "split": "TEST"},
        *filler(10, 3, split="dev"),
        *filler(20, 3, split="train"),
    ]
    result = cleaned(rows)
    assert result.reasons == {0: "split_leak"}
    assert 'shares query "1 number why" with test query' in result.rejected[0]["detail"]
    # Its passage is still part of what has to be searched.
    assert passage(1) in {row["text"] for row in result.passages}


def test_a_split_that_was_not_delivered_is_cut_from_train(cleaned: Callable[..., Any]) -> None:
    rows = filler(0, 20, split="train") + filler(50, 5, split="test")
    result = cleaned(rows)
    assert {result.split_of[question(n)] for n in range(20)} == {"train", "dev"}
    assert {result.split_of[question(n)] for n in range(50, 55)} == {"test"}


@pytest.mark.parametrize("action", ["merge", "keep"])
def test_boilerplate_in_longer_texts_is_a_leak(cleaned: Callable[..., Any], action: str) -> None:
    shared = " ".join(f"shared{n}" for n in range(30))
    rows = [
        {"query": question(1), "passage": f"{shared} {passage(1)}", "split": "test"},
        {"query": question(2), "passage": f"{passage(2)} {shared} {passage(3)}", "split": "train"},
        *filler(10, 3, split="dev"),
        *filler(20, 3, split="train"),
    ]
    result = cleaned(rows, near_duplicates={"action": action})
    assert result.reasons == {1: "overlap_leak"}
    assert "31 % of the 13-word runs" in result.rejected[0]["detail"]
    assert cleaned(rows, split={"max_overlap": 0.5}).reasons == {}


def test_chinese_boilerplate_is_a_leak(cleaned: Callable[..., Any]) -> None:
    shared, own = "请先检查网络设置是否正确然后确认用户名和密码没有过期", "打印机缺纸时请打开下方纸盒装入新的纸张"
    rows = [
        {"query": question(1), "passage": shared, "split": "test"},
        {"query": question(2), "passage": shared + own, "split": "train"},
        *filler(10, 3, split="dev"),
        *filler(20, 3, split="train"),
    ]
    assert cleaned(rows).reasons == {1: "overlap_leak"}


@given(
    keys=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=40, unique=True),
    large=st.integers(0, 3),
    both=st.booleans(),
)
def test_every_split_gets_a_group_where_there_are_enough(keys: list[float], large: int, both: bool) -> None:
    wanted = {"test": 0.2, "dev": 0.1} if both else {"dev": 0.1}
    sizes = np.array([50 if n < large else 1 for n in range(len(keys))])
    chosen = assign_groups(np.array(keys), sizes, wanted)
    if len(keys) <= len(wanted):
        assert chosen is None
    else:
        assert chosen is not None
        assert set(chosen) == {*wanted, "train"}
