"""The user's files as one raw table, and what a user is told when they cannot be."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.fingerprint import fingerprint, refuse_changed
from embed_pipeline.sources.read import read_sources
from embed_pipeline.tables import RAW, RAW_FILE

PAIRS = {"query": ["how", "why"], "passage": ["so", "because"]}


def read(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    report = read_sources(SourceSettings.model_validate(settings), folder, out)
    table = pq.read_table(out / RAW_FILE)
    assert table.schema.equals(RAW)
    assert report.rows == table.num_rows == sum(file.rows for file in report.files)
    return table.to_pylist()


def test_pairs_keep_file_and_row_in_order(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    parquet("raw/b.parquet", **PAIRS)
    parquet("raw/sub/a.parquet", query=["who"], passage=["she"], split=["test"], query_id=[7], title=["T"])
    rows = read(tmp_path, path="raw")
    assert [(r["source"], r["row_number"], r["query"]) for r in rows] == [
        ("raw/b.parquet", 0, "how"),
        ("raw/b.parquet", 1, "why"),
        ("raw/sub/a.parquet", 0, "who"),
    ]
    assert rows[2] | {"query_id": "7", "title": "T", "split": "test", "kind": "pair"} == rows[2]
    assert rows[0]["query_id"] is None


@pytest.mark.parametrize("pattern", ["raw", "raw/", "raw/*.parquet", "raw/**/*.parquet", "raw/a[1].parquet"])
def test_folder_glob_and_file_with_brackets(tmp_path: Path, parquet: Callable[..., Path], pattern: str) -> None:
    parquet("raw/a[1].parquet", **PAIRS)
    assert {row["source"] for row in read(tmp_path, path=pattern)} == {"raw/a[1].parquet"}


def test_triplets(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    parquet("t.parquet", anchor=["q"], positive=["p"], negative=["n"])
    (row,) = read(tmp_path, kind="triplets", path="t.parquet", columns={"query": "anchor"})
    assert (row["kind"], row["query"], row["passage"], row["negative"]) == ("triplet", "q", "p", "n")


def test_beir_names_and_ids_of_two_types_join(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    parquet("corpus.parquet", _id=["1", "2"], title=["", "t"], text=["a", "b"])
    parquet("queries.parquet", _id=[10, 11], text=["x", "y"])
    parquet("qrels.parquet", **{"query-id": [10, 11], "corpus-id": [1, 2], "score": [1, 2]})
    parquet("more.parquet", text=["nobody asked"])
    rows = read(
        tmp_path,
        kind="beir",
        corpus="corpus.parquet",
        queries="queries.parquet",
        qrels="qrels.parquet",
        extra_corpus="more.parquet",
        columns={
            "query_id": "_id",
            "passage_id": "_id",
            "qrels_query_id": "query-id",
            "qrels_passage_id": "corpus-id",
        },
    )
    assert [row["kind"] for row in rows] == ["passage"] * 2 + ["query"] * 2 + ["judgement"] * 2 + ["passage"]
    assert {row["passage_id"] for row in rows if row["kind"] == "judgement"} == {"1", "2"}
    assert [row["relevance"] for row in rows if row["kind"] == "judgement"] == [1.0, 2.0]


def test_many_row_groups_stay_in_order_and_give_the_same_bytes(tmp_path: Path) -> None:
    count = 50_001
    table = pa.table({"query": [f"q{i}" for i in range(count)], "passage": [f"p{i} " * 5 for i in range(count)]})
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=3_000)
    rows = read(tmp_path, path="big.parquet")
    first = (tmp_path / "out" / RAW_FILE).read_bytes()
    assert [row["row_number"] for row in rows] == list(range(count))
    assert rows[44_444]["query"] == "q44444"
    read(tmp_path, path="big.parquet")
    assert (tmp_path / "out" / RAW_FILE).read_bytes() == first


def test_a_null_in_one_row_is_left_to_cleaning(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    parquet("a.parquet", query=["q", None], passage=[None, "p"])
    assert [(r["query"], r["passage"]) for r in read(tmp_path, path="a.parquet")] == [("q", None), (None, "p")]


@pytest.mark.parametrize("name", ["file_row_number", "File_Row_Number", "filename", "row_number", "source"])
def test_a_column_named_as_one_that_readers_add(tmp_path: Path, parquet: Callable[..., Path], name: str) -> None:
    parquet("a.parquet", **PAIRS, **{name: ["x", "y"]})
    rows = read(tmp_path, path="a.parquet", columns={"document_id": name})
    assert [(r["source"], r["row_number"], r["query"], r["document_id"]) for r in rows] == [
        ("a.parquet", 0, "how", "x"),
        ("a.parquet", 1, "why", "y"),
    ]


def test_fingerprint_follows_content(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    settings = (SourceSettings(path="*.parquet"),)
    parquet("a.parquet", **PAIRS)
    before = fingerprint(settings, tmp_path)
    parquet("a.parquet", **PAIRS)
    assert fingerprint(settings, tmp_path) == before
    assert before[0]["source"] == "a.parquet"
    parquet("a.parquet", query=["how", "why"], passage=["so", "therefore"])
    assert fingerprint(settings, tmp_path) != before


def test_files_that_change_while_they_are_read_are_refused(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    settings = (SourceSettings(path="*.parquet"),)
    file = parquet("a.parquet", **PAIRS)
    before = fingerprint(settings, tmp_path)
    refuse_changed(before, settings, tmp_path)
    told = r"changed while it was read: .* Run again when the export is finished"
    more = parquet("b.parquet", **PAIRS)
    with pytest.raises(SourceError, match=rf"^b\.parquet \(in .*\) {told}"):
        refuse_changed(before, settings, tmp_path)
    more.unlink()
    parquet("a.parquet", query=["how", "why"], passage=["so", "therefore"])
    with pytest.raises(SourceError, match=rf"^a\.parquet \(in .*\) {told}"):
        refuse_changed(before, settings, tmp_path)
    file.unlink()
    with pytest.raises(SourceError, match=rf"^a\.parquet \(in .*\) {told}"):
        refuse_changed(before, settings, tmp_path)


PAIR = {"path": "a.parquet"}
BEIR = {"kind": "beir", "corpus": "corpus.parquet", "queries": "queries.parquet", "qrels": "qrels.parquet"}
BAD_COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no rows": ({"query": pa.array([], pa.string()), "passage": pa.array([], pa.string())}, PAIR, "no rows"),
    "missing column, near match": ({"Query": ["q"], "passage": ["p"]}, PAIR, "no column 'query'.*Did you mean 'Query'"),
    "missing column, listed": ({"query": ["q"], "zzz": ["p"]}, PAIR, r"columns\.passage.*It has: query, zzz"),
    "named optional column": (
        PAIRS,
        {**PAIR, "columns": {"document_id": "page"}},
        r"no column 'page' \(source.columns.document_id\)",
    ),
    "query is whole numbers": ({"query": [1], "passage": ["p"]}, PAIR, "'query'.*holds BIGINT, expected text"),
    "query is a list": ({"query": [["q"]], "passage": ["p"]}, PAIR, r"holds VARCHAR\[\], expected text"),
    "passage is a struct": ({"query": ["q"], "passage": [{"a": "p"}]}, PAIR, "'passage'.*holds STRUCT"),
    "passage is bytes": ({"query": ["q"], "passage": [b"p"]}, PAIR, "holds BLOB .*write the column as strings"),
    "relevance is text": (PAIRS | {"relevance": ["1", "2"]}, PAIR, "'relevance'.*holds VARCHAR, expected numbers"),
    "ids are floats": (PAIRS | {"query_id": [1.0, 2.0]}, PAIR, "'query_id'.*holds DOUBLE.*missing values"),
    "split is a number": (PAIRS | {"split": [0, 1]}, PAIR, "'split'.*expected text"),
    "query null in all rows": (
        {"query": pa.array([None, None], pa.string()), "passage": ["p", "r"]},
        PAIR,
        "'query'.*null in all 2 rows",
    ),
    "column without a type": ({"query": pa.nulls(2), "passage": ["p", "r"]}, PAIR, "null in all 2 rows"),
    "same name in two cases": ({"query": ["q"], "Query": ["r"], "passage": ["p"]}, PAIR, "same name, letter case"),
    "triplets without negative": (
        {"query": ["q"], "positive": ["p"]},
        {"kind": "triplets", **PAIR},
        r"no column 'negative' \(source.columns.negative\)",
    ),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_columns(tmp_path: Path, parquet: Callable[..., Path], case: str) -> None:
    columns, settings, message = BAD_COLUMNS[case]
    parquet("a.parquet", **columns)
    with pytest.raises(SourceError, match=re.compile(message, re.DOTALL)) as raised:
        read(tmp_path, **settings)
    assert str(tmp_path / "a.parquet") in str(raised.value)


def test_a_column_of_another_type_in_a_second_file_names_that_file(
    tmp_path: Path, parquet: Callable[..., Path]
) -> None:
    parquet("a.parquet", **PAIRS)
    parquet("b.parquet", query=[3, 4], passage=["p", "r"])
    with pytest.raises(SourceError, match=r"b\.parquet: column 'query'.*BIGINT"):
        read(tmp_path, path="*.parquet")


@pytest.mark.parametrize("missing", ["text", "passage_id", "score"])
def test_beir_lacks_a_column(tmp_path: Path, parquet: Callable[..., Path], missing: str) -> None:
    files = {
        "corpus.parquet": {"passage_id": ["p"], "text": ["t"]},
        "queries.parquet": {"query_id": ["q"], "text": ["t"]},
        "qrels.parquet": {"query_id": ["q"], "passage_id": ["p"], "score": [1]},
    }
    broken = "qrels.parquet" if missing == "score" else "corpus.parquet"
    for name, columns in files.items():
        parquet(name, **{key: value for key, value in columns.items() if (name, key) != (broken, missing)})
    with pytest.raises(SourceError, match=f"{broken}: no column '{missing}'"):
        read(tmp_path, **BEIR)


def damaged(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: b"", r"is empty \(0 bytes\)"),
        (lambda path: b"query,passage\nq,p\n", "not a parquet file .*pandas.read_csv"),
        (
            lambda path: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "a pointer of Git LFS.*lfs pull",
        ),
        (lambda path: gzip.compress(path.read_bytes()), r"compressed \(gzip\), expected parquet"),
        (lambda path: b"\n<!DOCTYPE html><html>", "HTML or XML, expected parquet"),
        (lambda path: b'{"query": "q"}', "JSON, expected parquet"),
        (lambda path: b"PARE" + path.read_bytes()[4:-4] + b"PARE", "encrypted parquet"),
        (lambda path: path.read_bytes()[:-40], "truncated parquet file"),
        (lambda path: path.read_bytes()[:60] + b"PAR1", "damaged"),
        (damaged, "damaged"),
    ],
    ids=["empty", "csv", "LFS", "gzip", "HTML", "JSON", "encrypted", "truncated", "no footer", "overwritten pages"],
)
def test_files_that_are_no_parquet(
    tmp_path: Path, parquet: Callable[..., Path], content: Callable[[Path], bytes], message: str
) -> None:
    path = parquet("a.parquet", query=[f"q{i}" for i in range(2_000)], passage=[f"p{i}" for i in range(2_000)])
    path.write_bytes(content(path))
    with pytest.raises(SourceError, match=message) as raised:
        read(tmp_path, path="a.parquet")
    assert str(path) in str(raised.value)


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    latin = pa.array(["caf\u00e9".encode("latin-1")], pa.binary())
    query = pa.Array.from_buffers(pa.string(), 1, latin.buffers())
    pq.write_table(pa.table({"query": query, "passage": ["p"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: a text is not UTF-8 \(.*caf\\xE9"):
        read(tmp_path, path="a.parquet")


@pytest.mark.parametrize("name", ["requ\u0065\u0302te", " requ\u00eate", "\ufeffrequ\u00eate"])
def test_a_column_whose_name_only_looks_right(tmp_path: Path, parquet: Callable[..., Path], name: str) -> None:
    parquet("a.parquet", **{name: ["q"], "passage": ["p"]})
    told = re.escape(f"{name!a} looks the same as 'requ\\xeate' and is not")
    with pytest.raises(SourceError, match=told):
        read(tmp_path, path="a.parquet", columns={"query": "requ\u00eate"})


def test_a_file_name_that_is_not_utf8(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    file = parquet("a.parquet", **PAIRS)
    file.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    with pytest.raises(ConfigurationError, match=r"the name of 'caf\\udce9\.parquet' is not UTF-8\. Rename the file"):
        read(tmp_path, path="*.parquet")


DELIVERED: dict[str, Any] = {
    "dictionary": pa.array(["how", "why"]).dictionary_encode(),
    "large text": pa.array(["how", "why"], pa.large_string()),
    "text view": pa.array(["how", "why"], pa.string_view()),
}


@pytest.mark.parametrize("case", DELIVERED)
def test_text_in_every_form_of_arrow(tmp_path: Path, parquet: Callable[..., Path], case: str) -> None:
    parquet("a.parquet", query=DELIVERED[case], passage=["so", "because"])
    assert [row["query"] for row in read(tmp_path, path="a.parquet")] == ["how", "why"]


def test_one_file_under_two_keys(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    parquet("a.parquet", query=["q"], passage=["p"], text=["t"])
    with pytest.raises(ConfigurationError, match=r"source\.extra_corpus and source\.path both name"):
        read(tmp_path, path="*.parquet", extra_corpus="a.parquet")


def test_a_column_key_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`columns\.positive` means nothing to a source of kind 'pairs'"):
        SourceSettings.model_validate({"path": "a", "columns": {"positive": "p"}})


def test_real_sets_are_read_whole(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("scifact")
    settings = SourceSettings.model_validate(BEIR)
    report = read_sources(settings, folder, tmp_path)
    assert report.rows_by_kind == {"passage": 5183, "query": 1109, "judgement": 1258}
