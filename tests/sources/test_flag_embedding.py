"""FlagEmbedding's jsonl and sentence-transformers' n-tuples as sources: a row a text, found again by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from embed_pipeline.cleaning.clean import clean
from embed_pipeline.cleaning.verify import verify
from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import CleaningSettings, EncodingSettings, SourceSettings
from embed_pipeline.sources.read import SourceReport, read_sources, refuse_other_prompts
from embed_pipeline.tables import QRELS_FILE, QUERIES_FILE, RAW_FILE, REJECTED_FILE

JSONL = SourceSettings(kind="flag-embedding", path="raw")


def lines(folder: Path, *found: Any, name: str = "raw/a.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in found)
    path.write_text(text + "\n")
    return path


def read(folder: Path, settings: SourceSettings = JSONL) -> tuple[SourceReport, list[dict[str, Any]]]:
    report = read_sources(settings, folder, folder)
    return report, pq.read_table(folder / RAW_FILE).to_pylist()


def test_each_text_of_a_line_is_a_row(tmp_path: Path) -> None:
    lines(
        tmp_path,
        {"query": "why", "pos": ["so", "da rum"], "neg": ["no"], "pos_scores": [2.5, -1], "neg_scores": [0.5]},
        {"query": "who", "pos": ["she"], "neg": None, "id": 7, "prompt": ""},
    )
    report, rows = read(tmp_path)
    found = [(r["source"], r["row_number"], r["query"], r["passage"], r["relevance"], r["teacher_score"]) for r in rows]
    assert found == [
        ("raw/a.jsonl#pos[0]", 0, "why", "so", 1.0, 2.5),
        ("raw/a.jsonl#pos[1]", 0, "why", "da rum", 1.0, -1.0),
        ("raw/a.jsonl#neg[0]", 0, "why", "no", 0.0, 0.5),
        ("raw/a.jsonl#pos[0]", 1, "who", "she", 1.0, None),
    ]
    assert (report.rows, report.rows_by_kind, {row["kind"] for row in rows}) == (4, {"pair": 4}, {"pair"})


def test_many_lines_keep_their_order(tmp_path: Path) -> None:
    lines(tmp_path, *({"query": f"q{i}", "pos": [f"p{i} " * 20], "neg": [f"n{i}"]} for i in range(30_000)))
    _, rows = read(tmp_path)
    assert [(r["row_number"], r["query"]) for r in rows[::2]] == [(i, f"q{i}") for i in range(30_000)]


def test_a_null_among_texts_is_left_to_cleaning(tmp_path: Path) -> None:
    lines(tmp_path, {"query": "a", "pos": ["b", None]}, {"query": None, "pos": ["c"]})
    assert [(row["query"], row["passage"]) for row in read(tmp_path)[1]] == [("a", "b"), ("a", None), (None, "c")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x1f\x8b\x08\x00", r"is compressed \(gzip\), expected jsonl"),
        ('{"query": "a"}'.encode("utf-16"), "is UTF-16 text, expected jsonl"),
        (b'\n{"query": "' + b"x" * (40 << 20) + b'", "pos": ["a"]}\n', r"line 2 .*: is 40 MB long, and at most 16 MB"),
        (b'\xef\xbb\xbf{"query": "a", "pos": ["b"]}\n', "line 1 .*: starts with a byte-order mark"),
        (b'{"query": "a", "pos": ["b"]}\n{"query": "\xe4", "pos": ["b"]}\n', "line 2 .*: is not UTF-8"),
    ],
)
def test_files_of_another_format_or_encoding(tmp_path: Path, content: bytes, told: str) -> None:
    lines(tmp_path).write_bytes(content)
    with pytest.raises(SourceError, match=rf"a\.jsonl: {told}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"query": "a", "pos": ["b"', r"a\.jsonl: line 2 \(the first is 1\): is not JSON"),
        (["a"], "line 2 .*: holds a list, expected an object with query, pos, neg"),
        ({"query": "a", "pos": "b"}, "line 2 .*: `pos` is text, expected a list"),
        (
            {"query": "a", "pos": ["b"], "pos_scores": ["high"]},
            r"line 2 .*: `pos_scores\[0\]` is text, expected a number",
        ),
        (
            {"query": "a", "pos": ["b"], "neg": ["c", "d"], "neg_scores": [1.0]},
            "line 2 .*: `neg_scores` has 1 scores for 2 texts in `neg`; expected one for each",
        ),
        ({"query": {"text": "a"}, "pos": ["b"]}, "line 2 .*: `query` is an object, expected text"),
        ({"query": ["a"], "pos": ["b"]}, "line 2 .*: `query` is a list, expected text"),
        ({"query": True, "pos": ["b"]}, "line 2 .*: `query` is true or false, expected text"),
        ({"query": 7, "pos": ["b"]}, "line 2 .*: `query` is a number, expected text"),
        ({"query": "a", "pos": ["b", {"text": "c"}]}, r"line 2 .*: `pos\[1\]` is an object, expected text"),
        ({"query": "a", "pos": [["b"]]}, r"line 2 .*: `pos\[0\]` is a list, expected text"),
        ({"query": "a", "pos": ["b"], "neg": [1]}, r"line 2 .*: `neg\[0\]` is a number, expected text"),
        ({"query": "a", "pos": ["b"], "neg": [False]}, r"line 2 .*: `neg\[0\]` is true or false, expected text"),
        ({"query": "a", "pos": ["b"], "pos_scores": [True]}, r"line 2 .*: `pos_scores\[0\]` is true or false"),
        ({"query": "a", "pos": ["b"], "prompt": ["x"]}, "line 2 .*: `prompt` is a list, expected text"),
        ('{"query": "a", "query": "b", "pos": ["c"]}', "line 2 .*: has the key `query` twice"),
        (r'{"query": "a\ud83d", "pos": ["c"]}', r"line 2 .*: holds half a character, \\ud83d without its other half"),
        (
            {"query": "a", "pos": ["b"], "prompt": "another"},
            "different prompts, 'another' and 'one'.*query_instruction",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Any, told: str) -> None:
    lines(tmp_path, {"query": "q", "pos": ["p"], "prompt": "one"}, bad)
    with pytest.raises(SourceError, match=told):
        read(tmp_path)


def test_a_file_of_other_fields_is_refused(tmp_path: Path) -> None:
    lines(tmp_path, {"question": "a", "pos": ["b"]})
    with pytest.raises(SourceError, match=r"no line has `query`\. Expected FlagEmbedding's fields"):
        read(tmp_path)


def test_what_is_empty_in_a_line_is_rejected_with_its_place(tmp_path: Path) -> None:
    sound = [{"query": f"question {i} of many", "pos": [f"answer {i} {i * i} is here"]} for i in range(30)]
    holes = [{"query": "no answer", "pos": []}, {"query": "an empty one", "pos": ["fine enough", " "], "neg": [None]}]
    lines(tmp_path, *sound, *holes)
    read(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    clean(tmp_path / RAW_FILE, CleaningSettings(), 42, out)
    rejected = pq.read_table(out / REJECTED_FILE).to_pylist()
    assert [(row["source"], row["row_number"], row["reason"]) for row in rejected] == [
        ("raw/a.jsonl#neg[0]", 31, "null_or_empty_passage"),
        ("raw/a.jsonl#pos", 30, "null_or_empty_passage"),
        ("raw/a.jsonl#pos[1]", 31, "null_or_empty_passage"),
    ]
    assert verify(out, tmp_path / RAW_FILE) == []


def test_teacher_scores_follow_the_row_that_stands(tmp_path: Path) -> None:
    sound = [{"query": f"question {i} of many", "pos": [f"answer {i} {i * i} is here"]} for i in range(30)]
    long = "a long answer that is told twice, in almost the very same words as it was told before "
    repeated = [
        {"query": "twice", "pos": ["the answer"]},
        {"query": "twice", "pos": ["the answer"], "neg": ["nothing"], "pos_scores": [3.0], "neg_scores": [-2.0]},
        {"query": "merged", "pos": [long], "pos_scores": [4.0]},
        {"query": "merged", "pos": [long + "now"], "pos_scores": [5.0]},
    ]
    lines(tmp_path, *sound, *repeated)
    read(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    clean(tmp_path / RAW_FILE, CleaningSettings(), 42, out)
    query_of = {row["query_id"]: row["query"] for row in pq.read_table(out / QUERIES_FILE).to_pylist()}
    scores: dict[str, list[float | None]] = {}
    for row in pq.read_table(out / QRELS_FILE).to_pylist():
        scores.setdefault(query_of[row["query_id"]], []).append(row["teacher_score"])
    assert sorted(scores["twice"], key=str) == [-2.0, 3.0]
    assert scores["merged"] == [4.0]
    assert scores["question 1 of many"] == [None]


def test_the_prompt_of_the_lines_is_the_models(tmp_path: Path) -> None:
    lines(tmp_path, {"query": "a", "pos": ["b"], "prompt": "Search: "}, {"query": "c", "pos": ["d"]})
    report, _ = read(tmp_path)
    refuse_other_prompts(report.files, EncodingSettings(query_prompt="Search: "))
    for encoding, found in ((EncodingSettings(), "nothing"), (EncodingSettings(query_prompt="Find: "), "'Find: '")):
        told = rf"query_instruction_for_retrieval: found {found}, but .* of raw/a\.jsonl carry the prompt 'Search: '"
        with pytest.raises(ConfigurationError, match=told):
            refuse_other_prompts(report.files, encoding)


def test_negatives_of_n_tuples_are_rows_of_their_own(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    parquet("t.parquet", anchor=["a", "b"], positive=["p", "q"], negative_2=["x", None], negative_1=["m", "n"])
    parquet("u.parquet", query=["c"], positive=["r"], negative=["y"], negative_10=["z"], split=["test"])
    settings = SourceSettings(kind="triplets", path="*.parquet")
    report, rows = read(tmp_path, settings)
    told = [(r["source"], r["row_number"], r["kind"], r["query"], r["passage"], r["negative"]) for r in rows]
    assert told == [
        ("t.parquet", 0, "triplet", "a", "p", "m"),
        ("t.parquet", 1, "triplet", "b", "q", "n"),
        ("t.parquet#negative_2", 0, "pair", "a", "x", None),
        ("t.parquet#negative_2", 1, "pair", "b", None, None),
        ("u.parquet", 0, "triplet", "c", "r", "y"),
        ("u.parquet#negative_10", 0, "pair", "c", "z", None),
    ]
    assert [row["relevance"] for row in rows] == [None, None, 0.0, 0.0, None, 0.0]
    assert [row["split"] for row in rows[-2:]] == ["test", "test"]
    assert report.rows == 6
