"""What a rejected row calls relevant stays known, so that nothing takes it for a negative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Row = dict[str, Any]


def passage(number: int, variant: int = 0) -> str:
    """Texts of one number are near-duplicates, texts of two numbers have nothing in common."""
    words = " ".join(f"{chr(97 + number % 26)}{number * 31 + i}{chr(97 + i % 26)}" for i in range(40))
    return words if variant == 0 else f"{words.capitalize()}! v{variant}"


def filler(start: int, split: str) -> list[Row]:
    return [{"query": f"why number {n}", "passage": passage(n), "split": split} for n in range(start, start + 3)]


SOUND = [*filler(100, "train"), *filler(110, "dev"), *filler(120, "test")]
BOILERPLATE = " ".join(f"shared{n}" for n in range(30))
ASKED = {"query": "why so", "passage": passage(2), "split": "train"}
# The first row is rejected for the reason, and "why so" stands by `ASKED`.
CASES: dict[str, list[Row]] = {
    "split_leak": [
        {"query": "why so", "passage": passage(1), "split": "train", "document_id": "manual"},
        {"query": "how so", "passage": passage(3), "split": "test", "document_id": "manual"},
    ],
    "overlap_leak": [
        {"query": "why so", "passage": f"{passage(1)} {BOILERPLATE}", "split": "train"},
        {"query": "how so", "passage": f"{BOILERPLATE} {passage(3)}", "split": "test"},
    ],
    "contradiction": [
        {"query": "why so", "passage": passage(1), "split": "train"},
        {"query": "why so", "passage": passage(1), "split": "train", "relevance": 0.0, "source": "other.parquet"},
        {"query": "how so", "passage": passage(1), "split": "train"},
    ],
    "invalid_relevance": [
        {"query": "why so", "passage": passage(1), "split": "train", "relevance": 1e-320, "source": "other.parquet"},
        {"query": "how so", "passage": passage(1), "split": "train"},
    ],
    "null_or_empty_passage": [
        {"query": "why so", "passage": passage(1), "negative": None, "split": "train"},
        {"query": "how so", "passage": passage(1), "split": "train"},
    ],
}


@pytest.mark.parametrize("reason", CASES)
def test_relevant_pairs_of_rejected_rows_are_withheld(cleaned: Callable[..., Any], reason: str) -> None:
    rows = CASES[reason]
    result = cleaned([*rows, ASKED, *SOUND])
    assert result.reasons[0] == reason
    text_of = {row["passage_id"]: row["text"] for row in result.passages}
    query_of = {row["query_id"]: row["query"] for row in result.queries}
    withheld = [(query_of[row["query_id"]], text_of[row["passage_id"]]) for row in result.withheld]
    assert withheld == [("why so", rows[0]["passage"])]
    assert result.report.withheld_pairs == 1
    assert result.violations == []


@pytest.mark.parametrize("action", ["merge", "keep"])
def test_a_withheld_passage_follows_its_cluster(cleaned: Callable[..., Any], action: str) -> None:
    rows = [
        {"query": "why so", "passage": passage(1, 1), "split": "train"},
        {"query": "how so", "passage": passage(1), "split": "test"},
        ASKED,
    ]
    result = cleaned([*rows, *SOUND], near_duplicates={"action": action})
    assert result.reasons == {0: "split_leak"}
    text_of = {row["passage_id"]: row["text"] for row in result.passages}
    kept = passage(1, 1)  # the longer one
    assert [text_of[row["passage_id"]] for row in result.withheld] == [kept]


def test_what_is_judged_or_gone_is_not_withheld(cleaned: Callable[..., Any]) -> None:
    rows = [
        ASKED,
        {**ASKED, "query": "why  so"},  # a duplicate: judged
        {"query": "gone", "passage": passage(1), "split": "train", "document_id": "manual"},  # its query goes
        {"query": "how so", "passage": passage(3), "split": "test", "document_id": "manual"},
    ]
    result = cleaned([*rows, *SOUND])
    assert result.reasons == {1: "duplicate", 2: "split_leak"}
    assert result.withheld == []


def test_a_passage_stands_in_all_its_documents(cleaned: Callable[..., Any]) -> None:
    """Also in that of a row that was dropped for its query."""
    rows = [
        {"query": "why so", "passage": passage(1), "split": "train", "document_id": "a"},
        {"query": None, "passage": passage(1), "split": "train", "document_id": "z"},
        {"query": "how so", "passage": passage(3), "split": "test", "document_id": "z"},
    ]
    assert cleaned([*rows, *SOUND]).reasons == {0: "split_leak", 1: "null_or_empty_query"}
