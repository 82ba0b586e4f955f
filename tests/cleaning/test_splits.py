"""No query, document or near-duplicate in two splits: whatever links the rows, whoever delivered the splits."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embed_pipeline.cleaning.splits import assign_groups, linked_groups

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


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


PLACE_OF_D = 0.21714292308956937
SHARES = {"test": 0.2, "dev": 0.1}


@pytest.mark.parametrize(
    ("keys", "sizes", "expected"),
    [
        # A share starts where the one before it ends, and its own end is the next one's.
        (
            [0.0, 0.19, 0.2, 0.29, 0.31, 0.99],
            [1] * 6,
            ["test", "test", "dev", "dev", "train", "train"],
        ),
        # Six queries and more are many: the group trains, whatever its key.
        ([0.01, 0.02, 0.25, 0.5], [6, 5, 1, 1], ["train", "test", "dev", "train"]),
        # Where there are many, it is 5 % of the queries and more.
        ([0.01, 0.02, 0.25, 0.5], [11, 10, 1, 178], ["train", "test", "dev", "train"]),
        # An empty split takes the lowest key, test before dev before train.
        ([0.7, 0.5, 0.6], [1, 1, 1], ["train", "test", "dev"]),
        ([0.01, 0.02, 0.1, 0.15], [1, 1, 1, 1], ["dev", "train", "test", "test"]),
        # It takes none that is the only one of its split,
        ([0.21, 0.22, 0.9], [1, 1, 1], ["test", "dev", "train"]),
        ([0.05, 0.35, 0.4], [1, 1, 1], ["test", "dev", "train"]),
        # and a large one only where no small one can be spared.
        ([0.5, 0.6, 0.7], [50, 1, 1], ["train", "test", "dev"]),
        ([0.9, 0.5, 0.7], [50, 50, 1], ["train", "dev", "test"]),
        ([0.4, 0.5], [1, 1], None),
        ([0.4, 0.5, 0.1], [1, 1, 1], ["dev", "train", "test"]),
    ],
)
def test_which_split_a_group_gets(keys: list[float], sizes: list[int], expected: list[str] | None) -> None:
    chosen = assign_groups(np.array(keys), np.array(sizes), SHARES)
    assert (None if chosen is None else chosen.tolist()) == expected


def groups_of(*links: tuple[str, str, str], seed: int = 42) -> dict[str, tuple[int, float]]:
    """query_id -> number and place of its group; a link is (query_id, what, key)."""
    values = ", ".join(f"('{query}', '{what}', '{key}')" for query, what, key in links)
    with duckdb.connect() as connection:
        connection.execute(f"CREATE TABLE told AS SELECT * FROM (VALUES {values}) AS l(query_id, what, key)")
        queries, labels, places = linked_groups(connection, "FROM told", seed)
    assert len(places) == labels.max() + 1
    return {query: (int(label), float(places[label])) for query, label in zip(queries, labels, strict=True)}


def test_what_shares_a_link_is_one_group_and_nothing_else() -> None:
    found = groups_of(
        ("d", "query", "x"),
        ("a", "document", "x"),
        ("b", "document", "x"),
        ("b", "cluster", "y"),
        ("c", "cluster", "y"),
        ("e", "document", "y"),
        ("e", "query", "z"),
    )
    assert list(found) == ["a", "b", "c", "d", "e"]
    labels = [label for label, _ in found.values()]
    assert labels[0] == labels[1] == labels[2]
    assert len({labels[0], labels[3], labels[4]}) == 3


def test_a_groups_place_is_its_documents_else_its_clusters_whatever_joins_it() -> None:
    documents = [f"d{n}" for n in range(400)]
    alone = groups_of(
        ("cluster", "cluster", "c"),
        ("query", "query", "k"),
        *((document, "document", document) for document in documents),
    )
    place = {name: place for name, (_, place) in alone.items()}
    assert len(set(place.values())) == 402
    # 20 groups of 20 documents: in each, one of them decides, in whatever order they come.
    several = [(f"q{n // 20}", "document", document) for n, document in enumerate(documents)]
    links = [
        *several,
        *(("a", "query", "k1"), ("a", "cluster", "c1"), ("b", "cluster", "c1"), ("b", "document", "d")),
        *(("e", "query", "k"), ("e", "cluster", "c"), ("f", "cluster", "c")),
        ("g", "query", "other"),
    ]
    joined = groups_of(*links)
    assert joined == groups_of(*links[::-1])
    assert joined["a"][1] == joined["b"][1] == pytest.approx(PLACE_OF_D, abs=1e-12)
    assert joined["e"] == joined["f"]
    assert joined["e"][1] == place["cluster"]
    for n in range(20):
        assert joined[f"q{n}"][1] in {place[document] for document in documents[20 * n : 20 * n + 20]}
    # The one that decides is not the one with the lowest place: else groups of many documents would all be tested.
    assert max(joined[f"q{n}"][1] for n in range(20)) > 0.5


def test_a_groups_place_stays_from_version_to_version_and_comes_of_the_seed() -> None:
    """Whoever cleans the same rows with a later version measures on the same test questions."""
    links = [("q", "document", "d"), *((f"q{n}", "document", str(n)) for n in range(200))]
    found, other = groups_of(*links), groups_of(*links, seed=43)
    assert found["q"][1] == pytest.approx(PLACE_OF_D, abs=1e-12)
    assert all(found[query][1] != other[query][1] for query in found)
    places = [place for _, place in found.values()]
    assert 0.0 <= min(places) < 0.05
    assert 0.95 < max(places) < 1.0


def test_a_group_is_called_by_its_first_query(cleaned: Callable[..., Any]) -> None:
    linked = [{**row, "query_id": id, "document_id": "d"} for row, id in zip(filler(0, 3), "cab", strict=True)]
    result = cleaned([*linked, *filler(10, 20)])
    groups = {row["query_id"]: row["group_id"] for row in result.queries}
    assert {groups[id] for id in "abc"} == {"a"}
    assert len(set(groups.values())) == 21
    assert all(group <= query for query, group in groups.items())


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"test": 0.0, "dev": 0.3}, {"train", "dev"}),
        ({"test": 0.3, "dev": 0.0}, {"train", "test"}),
        ({"test": 0.0, "dev": 0.0}, {"train"}),
    ],
)
def test_a_split_without_a_share_is_not_cut(
    cleaned: Callable[..., Any], shares: dict[str, float], expected: set[str]
) -> None:
    assert set(cleaned(filler(0, 30), split=shares).split_of.values()) == expected


def test_who_gives_way_to_whom(cleaned: Callable[..., Any]) -> None:
    """dev to test, train to both, and nobody to a row that gave way itself."""
    document = "d" * 100
    rows = [
        {"query": question(1), "passage": passage(1), "split": "test", "query_id": "t1", "document_id": document},
        {"query": question(2), "passage": passage(2), "split": "dev", "query_id": "d1", "document_id": document},
        {"query": question(3), "passage": passage(3), "split": "train", "query_id": "r1", "document_id": document},
        # Only through the dev row that went, so it stays,
        {"query": question(2, 1), "passage": passage(4), "split": "train", "query_id": "r2"},
        # and this one for a dev row that stayed goes.
        {"query": question(5), "passage": passage(5), "split": "dev", "query_id": "d2"},
        {"query": question(6), "passage": passage(5, 1), "split": "train", "query_id": "r3"},
        # In both: the strongest is named.
        {"query": question(7), "passage": passage(7), "split": "test", "query_id": "t2"},
        {"query": question(8), "passage": passage(8), "split": "dev", "query_id": "d3"},
        {"query": question(8, 1), "passage": passage(7, 1), "split": "train", "query_id": "r4"},
        *filler(20, 3, split="dev"),
        *filler(30, 3, split="train"),
    ]
    result = cleaned(rows, near_duplicates={"action": "keep"})
    assert result.reasons == dict.fromkeys((1, 2, 5, 8), "split_leak")
    detail = {row["row_number"]: row["detail"] for row in result.rejected}
    assert detail[1] == detail[2] == f'shares document "{"d" * 80}" with test query t1'
    assert detail[5].startswith('shares cluster "p-')
    assert detail[5].endswith('" with dev query d2')
    assert detail[8].startswith('shares cluster "p-')
    assert detail[8].endswith('" with test query t2')


def test_what_does_not_answer_links_nothing(cleaned: Callable[..., Any]) -> None:
    """A passage that was judged for a train and a test question, and answers one of them or none."""
    judged = {"document_id": "d", "relevance": 0.0, "passage": passage(9)}
    rows = [
        {"query": question(1), "passage": passage(1), "split": "test"},
        {"query": question(1), "split": "test", **judged},
        {"query": question(2), "passage": passage(2), "split": "train"},
        {"query": question(2), "split": "train", **judged},
        *filler(10, 3, split="dev"),
    ]
    result = cleaned([{"relevance": 1.0, **row} for row in rows])
    assert result.reasons == {}
    assert len({row["group_id"] for row in result.queries}) == 5
