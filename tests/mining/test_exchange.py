"""Mined sets as other trainers read them, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.errors import ArtifactError, ConfigurationError
from embed_pipeline.mining.exchange import Format, export_negatives
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.read import read_sources
from embed_pipeline.tables import HARD_NEGATIVES, HARD_NEGATIVES_FILE, RAW_FILE
from tests.cleaned_folder import write_cleaned

TEXTS = [f'answer {p}, with a quote \' and "more"' for p in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Query a has two positives and two negatives, b one and one, c one and none."""
    write_cleaned(
        tmp_path,
        [("c", "wer?"), ("a", "为什么"), ("b", "who\nthere")],
        [(f"p{i}", text) for i, text in enumerate(TEXTS)],
        [],
    )
    write_mined(tmp_path, scored=True)
    return tmp_path


def write_mined(folder: Path, scored: bool) -> None:
    found = {"c": (["p0"], []), "a": (["p1", "p0"], ["p3", "p2"]), "b": (["p2"], ["p4"])}
    rows = [
        {
            "query_id": query_id,
            "positive_ids": positive,
            "negative_ids": negative,
            "positive_scores": [0.5] * len(positive),
            "negative_scores": [0.25] * len(negative),
            "negative_origins": ["mined"] * len(negative),
            "positive_teacher_scores": [float(p[1:]) for p in positive] if scored and query_id != "b" else None,
            "negative_teacher_scores": [-float(p[1:]) for p in negative] if scored and query_id != "b" else None,
        }
        for query_id, (positive, negative) in found.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=HARD_NEGATIVES), folder / HARD_NEGATIVES_FILE)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_flag_embeddings_jsonl_and_back(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "mined.jsonl"
    output.parent.mkdir()
    done = export_negatives(folder, folder, "flag-embedding", output, prompt="Frage's: ")
    assert (done.rows, done.queries, done.left_out, done.with_teacher_scores) == (2, 2, 1, 1)
    assert "knowledge_distillation needs them on every line" in done.sentence
    assert lines(output) == [
        {
            "query": "为什么",
            "pos": [TEXTS[1], TEXTS[0]],
            "neg": [TEXTS[3], TEXTS[2]],
            "pos_scores": [1.0, 0.0],
            "neg_scores": [-3.0, -2.0],
            "prompt": "Frage's: ",
        },
        {
            "query": "who\nthere",
            "pos": [TEXTS[2]],
            "neg": [TEXTS[4]],
            "pos_scores": None,
            "neg_scores": None,
            "prompt": "Frage's: ",
        },
    ]
    assert [path.name for path in output.parent.iterdir()] == ["mined.jsonl"]

    read_sources(SourceSettings(kind="flag-embedding", path="out"), tmp_path, tmp_path)
    rows = pq.read_table(tmp_path / RAW_FILE).to_pylist()
    assert [(r["query"], r["passage"], r["relevance"], r["teacher_score"]) for r in rows] == [
        ("为什么", TEXTS[1], 1.0, 1.0),
        ("为什么", TEXTS[0], 1.0, 0.0),
        ("为什么", TEXTS[3], 0.0, -3.0),
        ("为什么", TEXTS[2], 0.0, -2.0),
        ("who\nthere", TEXTS[2], 1.0, None),
        ("who\nthere", TEXTS[4], 0.0, None),
    ]


@pytest.mark.parametrize("prompt", [None, "Frage: "])
def test_flag_embedding_trains_on_it(folder: Path, tmp_path: Path, prompt: str | None) -> None:
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderDataArguments
    from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderTrainDataset

    output = tmp_path / "mined.jsonl"
    write_mined(folder, scored=False)
    export_negatives(folder, folder, "flag-embedding", output, prompt=prompt)
    assert {*lines(output)[0]} == {"query", "pos", "neg", *(["prompt"] if prompt else [])}
    arguments = AbsEmbedderDataArguments(
        train_data=[str(output)],
        cache_path=str(tmp_path / "cache"),
        train_group_size=3,
        query_instruction_for_retrieval="Frage: ",
    )
    data = AbsEmbedderTrainDataset(arguments, tokenizer=None)
    found = [data[i] for i in range(len(data))]
    assert [query for query, _, _ in found] == ["Frage: 为什么", "Frage: who\nthere"]
    assert set(found[0][1][1:]) == {TEXTS[2], TEXTS[3]}
    assert found[1][1] == [TEXTS[2], TEXTS[4], TEXTS[4]]


EXPECTED: dict[Format, list[tuple[str, ...]]] = {
    "pairs": [("wer?", "0"), ("为什么", "1"), ("为什么", "0"), ("who\nthere", "2")],
    "triplets": [
        *(("为什么", "1", "3"), ("为什么", "1", "2"), ("为什么", "0", "3"), ("为什么", "0", "2")),
        ("who\nthere", "2", "4"),
    ],
    "tuples": [("为什么", "1", "3", "2"), ("为什么", "0", "3", "2")],
}
COLUMNS = {
    "pairs": ["query", "positive"],
    "triplets": ["query", "positive", "negative"],
    "tuples": ["query", "positive", "negative_1", "negative_2"],
}


@pytest.mark.parametrize("format", EXPECTED)
def test_sentence_transformers_parquet(folder: Path, tmp_path: Path, format: Format) -> None:
    from datasets import load_dataset

    output = tmp_path / "mined.parquet"
    done = export_negatives(folder, folder, format, output)
    data = load_dataset("parquet", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.column_names == COLUMNS[format]
    expected = [(query, *(TEXTS[int(number)] for number in others)) for query, *others in EXPECTED[format]]
    assert [tuple(row.values()) for row in data] == expected
    assert done.rows == len(expected)
    assert (done.left_out, done.with_teacher_scores) == ({"pairs": 0, "triplets": 1, "tuples": 2}[format], None)


def test_fewer_negatives_leave_fewer_queries_out(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined.parquet"
    done = export_negatives(folder, folder, "tuples", output, num_negatives=1)
    assert (done.queries, done.left_out, pq.read_schema(output).names[-1]) == (2, 1, "negative_1")
    (tmp_path / "back").mkdir()
    read_sources(SourceSettings(kind="triplets", path="mined.parquet"), tmp_path, tmp_path / "back")
    rows = pq.read_table(tmp_path / "back" / RAW_FILE).to_pylist()
    assert [(row["passage"], row["negative"]) for row in rows] == [
        (TEXTS[1], TEXTS[3]),
        (TEXTS[0], TEXTS[3]),
        (TEXTS[2], TEXTS[4]),
    ]


def test_nothing_is_written_where_something_is_wrong(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "mined.parquet"
    output.write_text("as it was")
    with pytest.raises(ArtifactError, match=r"none of the 3 queries in .* has 3 negative\(s\)"):
        export_negatives(folder, folder, "tuples", output, num_negatives=3)
    with pytest.raises(ConfigurationError, match=r"format flag-embedding is written as \.jsonl; found '\.parquet'"):
        export_negatives(folder, folder, "flag-embedding", output)
    with pytest.raises(ConfigurationError, match="there is no folder"):
        export_negatives(folder, folder, "pairs", tmp_path / "none" / "mined.parquet")
    with pytest.raises(ArtifactError, match=r"no hard_negatives\.parquet in .*: the source was not mined"):
        export_negatives(folder, tmp_path / "extra" / "zh", "pairs", output)
    assert output.read_text() == "as it was"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".mined")]
