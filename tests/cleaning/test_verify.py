"""A broken promise in the tables is seen, whatever cleaning itself believes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline import tables
from embed_pipeline.cleaning.clean import clean
from embed_pipeline.cleaning.verify import verify
from embed_pipeline.settings import CleaningSettings

Row = dict[str, Any]
Change = Callable[[list[Row]], list[Row]]


def passage(number: int, variant: int = 0) -> str:
    """Texts of one number are near-duplicates, texts of two numbers have nothing in common."""
    words = " ".join(f"{chr(97 + number % 26)}{number * 31 + i}{chr(97 + i % 26)}" for i in range(40))
    return words if variant == 0 else f"{words.capitalize()}! v{variant}"


def filler(start: int, count: int = 4, **columns: Any) -> list[Row]:
    return [
        {"kind": "pair", "source": "f", "query": f"why number {n}", "passage": passage(n), **columns}
        for n in range(start, start + count)
    ]


SPLIT = [row for n, split in enumerate(tables.SPLITS) for row in filler(100 + 10 * n, split=split)]
BEIR = [
    *({"kind": "passage", "source": "c", "passage_id": f"c{n}", "passage": passage(n)} for n in range(20)),
    {"kind": "passage", "source": "c", "passage_id": "near c0", "passage": passage(0, 1)},
    *({"kind": "query", "source": "q", "query_id": f"k{n}", "query": f"question {n}"} for n in range(20)),
    *({"kind": "judgement", "source": "j", "query_id": f"k{n}", "passage_id": f"c{n}"} for n in range(20)),
    {"kind": "judgement", "source": "j", "query_id": "k1", "passage_id": "near c0"},
    {"kind": "judgement", "source": "j", "query_id": "k1", "passage_id": "c5", "relevance": 0.0},
]


def cleaned(folder: Path, rows: list[Row], **settings: Any) -> tuple[Path, Path]:
    """The cleaned folder and the raw file; every judgement is one of relevance 1 that does not say otherwise."""
    for number, row in enumerate(rows):
        graded = {"relevance": 1.0} if row["kind"] == "judgement" else {}
        rows[number] = {**dict.fromkeys(tables.RAW.names), "row_number": number, **graded, **row}
    raw, out = folder / tables.RAW_FILE, folder / "out"
    out.mkdir()
    tables.write(pa.Table.from_pylist(rows, schema=tables.RAW), tables.RAW, raw)
    clean(raw, CleaningSettings.model_validate(settings), 42, out)
    assert verify(out, raw) == []
    return out, raw


def change(path: Path, how: Change) -> None:
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(how(table.to_pylist()), schema=table.schema), path)


def promises(out: Path, raw: Path) -> list[str]:
    return [violation.split(": broken")[0] for violation in verify(out, raw)]


def test_a_leak_through_the_second_document_of_a_passage(tmp_path: Path) -> None:
    twice = {"kind": "pair", "source": "d", "split": "train", "passage": passage(1)}
    rows = [
        {**twice, "query": "why so", "document_id": "a"},
        {**twice, "query": "who so", "document_id": "z"},
        {**twice, "query": "how so", "document_id": "z", "passage": passage(2)},
        *SPLIT,
    ]
    out, raw = cleaned(tmp_path, rows)
    move = lambda row: {**row, "split": "test", "group_id": "moved"} if row["query"] == "how so" else row  # noqa: E731
    change(out / tables.QUERIES_FILE, lambda queries: [move(row) for row in queries])
    assert promises(out, raw) == ["no delivered document stands in two splits"]


@pytest.mark.parametrize("given", [("k1", "c1"), ("k1", "near c0"), ("k1", "c5")])
def test_a_lost_judgement(tmp_path: Path, given: tuple[str, str]) -> None:
    out, raw = cleaned(tmp_path, list(BEIR))
    standing = {row["passage_id"]: row["merged_into"] for row in pq.read_table(out / tables.MERGED_FILE).to_pylist()}
    lost = {"query_id": given[0], "passage_id": standing.get(given[1], given[1])}
    change(out / tables.QRELS_FILE, lambda rows: [row for row in rows if not lost.items() <= row.items()])
    expected = ["a kept row's judgement stands in qrels", "what any row calls relevant is judged or withheld"]
    assert promises(out, raw) == (expected[:1] if given[1] == "c5" else expected)


def test_pairs_that_changed_places(tmp_path: Path) -> None:
    out, raw = cleaned(tmp_path, filler(0, 30))
    ids = [row["passage_id"] for row in pq.read_table(out / tables.QRELS_FILE).to_pylist()]
    turned = [*ids[1:], ids[0]]
    change(
        out / tables.QRELS_FILE,
        lambda rows: [{**row, "passage_id": id} for row, id in zip(rows, turned, strict=True)],
    )
    assert {"a kept row's judgement stands in qrels", "a judgement in qrels was delivered"} <= set(promises(out, raw))


def test_a_triplets_lost_negative_and_a_changed_grade(tmp_path: Path) -> None:
    rows = [{**row, "kind": "triplet", "negative": passage(50 + n)} for n, row in enumerate(filler(0, 30))]
    out, raw = cleaned(tmp_path, rows)
    before = (out / tables.QRELS_FILE).read_bytes()
    change(out / tables.QRELS_FILE, lambda rows: [row for row in rows if row["relevance"] > 0])
    assert promises(out, raw) == ["a kept row's judgement stands in qrels"]
    (out / tables.QRELS_FILE).write_bytes(before)
    change(out / tables.QRELS_FILE, lambda rows: [{**row, "relevance": 2 * row["relevance"]} for row in rows])
    assert promises(out, raw) == ["a judgement in qrels was delivered"]


def test_withheld_pairs(tmp_path: Path) -> None:
    rows = [
        {"kind": "pair", "source": "d", "split": "train", "query": "why so", "passage": passage(1)},
        {"kind": "pair", "source": "d", "split": "train", "query": "why so", "passage": passage(2)},
        {"kind": "pair", "source": "d", "split": "test", "query": "how so", "passage": passage(1)},
        *SPLIT,
    ]
    out, raw = cleaned(tmp_path, rows)
    change(out / tables.WITHHELD_FILE, lambda withheld: [])
    assert promises(out, raw) == ["what any row calls relevant is judged or withheld"]
    judged = pq.read_table(out / tables.QRELS_FILE).to_pylist()[0]
    odd = [{"query_id": judged["query_id"], "passage_id": judged["passage_id"]}, {"query_id": "x", "passage_id": "y"}]
    change(out / tables.WITHHELD_FILE, lambda withheld: odd)
    assert {
        "a withheld pair is not judged",
        "a withheld query stands in queries",
        "a withheld passage stands in passages",
    } <= set(promises(out, raw))


def test_merged_texts_of_triplets_are_told_apart(tmp_path: Path) -> None:
    """A negative that is the end of its positive, and a text that another file delivers with its title apart."""
    near = f"{passage(60)} and then some"
    rows = [{**row, "kind": "triplet", "negative": passage(150 + n)} for n, row in enumerate(filler(0, 30))]
    rows[0] |= {"passage": f"{passage(40)} {passage(41)} {passage(60)}", "negative": passage(60), "document_id": "a"}
    rows[1] |= {"passage": passage(0, 1), "negative": f"Title {passage(70)}"}
    corpus = {"kind": "passage", "source": "e"}
    rows += [{**corpus, "passage": near, "document_id": "b"}, {**corpus, "passage": f"{passage(70)} further on"}]
    rows += [{**corpus, "title": "Title", "passage": passage(70)}]
    out, _ = cleaned(tmp_path, rows)
    assert pq.read_table(out / tables.MERGED_FILE).num_rows == 2
