"""How long texts are for a model, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline import tables
from embed_pipeline.models.lengths import LongestTexts, fitted_lengths, longest_texts


@pytest.fixture
def cleaned(tmp_path: Path) -> Path:
    """Train queries of 1 to 100 words, a longer one of test, and 1,000 passages of up to 200 words."""
    queries = [" ".join(["garden"] * (i + 1)) for i in range(100)] + [" ".join(["garden"] * 120)]
    table = pa.table(
        {
            "query_id": [f"q{i}" for i in range(101)],
            "query": queries,
            "split": ["train"] * 100 + ["test"],
            "group_id": [f"g{i}" for i in range(101)],
        }
    )
    tables.write(table, tables.QUERIES, tmp_path / tables.QUERIES_FILE)
    ids = [f"p{i}" for i in range(1_000)]
    table = pa.table(
        {
            "passage_id": ids,
            "title": pa.array(["river"] * 1_000),
            "text": [" ".join(["violin"] * (200 * (i + 1) // 1_000)) or "violin" for i in range(1_000)],
            "document_id": pa.nulls(1_000, pa.string()),
            "cluster_id": ids,
        }
    )
    tables.write(table, tables.PASSAGES, tmp_path / tables.PASSAGES_FILE)
    return tmp_path


def test_the_longest_texts_are_those_that_a_batch_will_hold(cleaned: Path, tiny_bert_folder: Path) -> None:
    # Two special tokens and the title; three of a hundred passages that are drawn are longer.
    found = longest_texts(cleaned, tiny_bert_folder, 512, 512)
    assert found is not None
    assert found.query == 102
    assert 192 <= found.passage <= 198
    assert longest_texts(cleaned, tiny_bert_folder, 20, 30) == LongestTexts(20, 30)


def test_maximum_lengths_cut_one_text_in_twenty(cleaned: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert_folder, folder)
    set_limit(folder, 512)
    found = fitted_lengths(cleaned, folder, None, None)
    assert found is not None
    assert (found.query, found.passage) == (104, 200)  # 97 and 193 tokens, rounded up to a multiple of 8
    assert found.queries_cut <= 0.05
    assert found.sentence().startswith("maximum lengths by the texts: queries 104 tokens (0.0 % are cut), passages 200")
    prompted = fitted_lengths(cleaned, folder, "find " * 20, None)
    assert prompted is not None
    assert prompted.query == 120
    set_limit(folder, 64)
    cut = fitted_lengths(cleaned, folder.rename(tmp_path / "shorter"), None, None)
    assert cut is not None
    assert (cut.query, cut.passage) == (64, 64)
    assert cut.queries_cut == pytest.approx(0.38)


def test_short_texts_leave_room_for_longer_ones(cleaned: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    queries = pq.read_table(cleaned / tables.QUERIES_FILE)
    text = queries.schema.get_field_index("query")
    tables.write(
        queries.set_column(text, "query", pa.array(["a"] * 101)), tables.QUERIES, cleaned / tables.QUERIES_FILE
    )
    found = fitted_lengths(cleaned, tiny_bert_folder, None, None)
    assert found is not None
    assert found.query == 32


def set_limit(folder: Path, tokens: int) -> None:
    """Let the model take so many tokens."""
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, key: tokens}))


def test_a_model_without_a_tokenizer_that_can_be_read(cleaned: Path, tmp_path: Path) -> None:
    assert longest_texts(cleaned, tmp_path, 512, 512) is None
