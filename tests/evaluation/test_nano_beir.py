"""NanoBEIR's files from a folder, in both layouts that people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.evaluation.evaluators import EmbedderEvaluators
from embed_pipeline.evaluation.nano_beir import check_nano_beir, nano_beir_digest, nano_beir_parts, read_nano_beir
from embed_pipeline.models.embedder import Embedder


def tables(queries: int) -> dict[str, list[dict[str, Any]]]:
    corpus = [{"_id": f"d{i}", "text": f"passage number {i} about stones"} for i in range(12)]
    return {
        "corpus": [*corpus, {"_id": "empty", "text": ""}],
        "queries": [{"_id": f"q{i}", "text": f"where is number {i}"} for i in range(queries)],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{i}"} for i in range(queries)],
    }


def write_sets(folder: Path, *, by_table: bool) -> Path:
    for name, queries in (("NanoFiQA2018", 4), ("NanoSciFact", 9)):
        for table, rows in tables(queries).items():
            place = folder / table if by_table else folder / name / table
            place.mkdir(parents=True, exist_ok=True)
            file = f"{name}-00000-of-00001.parquet" if by_table else "train-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(rows), place / file)
    return folder


def test_both_layouts_hold_the_same(tmp_path: Path) -> None:
    one, other = (write_sets(tmp_path / str(by_table), by_table=by_table) for by_table in (False, True))
    sets = read_nano_beir(one)
    assert sets == read_nano_beir(other)
    assert list(sets) == ["fiqa2018", "scifact"]
    assert len(sets["scifact"].queries) == 9
    assert "empty" not in sets["scifact"].passages
    before = nano_beir_digest(one)
    pq.write_table(pa.Table.from_pylist(tables(3)["qrels"]), one / "NanoSciFact/qrels/train-00000-of-00001.parquet")
    assert nano_beir_digest(one) != before


def test_the_mean_is_over_sets_not_over_questions(tmp_path: Path, tiny_bert_folder: Path) -> None:
    parts = nano_beir_parts(write_sets(tmp_path, by_table=False))
    found = EmbedderEvaluators(parts).measure(Embedder(tiny_bert_folder, precision="float32"))
    values = {name: figure.value for name, figure in found.items()}
    assert next(iter(values)).startswith("nano_beir/")
    of_sets = [values["nano_beir/fiqa2018/ndcg_at_10"], values["nano_beir/scifact/ndcg_at_10"]]
    assert values["nano_beir/ndcg_at_10"] == pytest.approx(np.mean(of_sets))
    items = found["nano_beir/ndcg_at_10"].items
    assert items is not None
    assert (len(items), items.mean()) == (13, pytest.approx(np.mean(of_sets)))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no folder at"):
        check_nano_beir(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="holds no set"):
        check_nano_beir(tmp_path)
    folder = write_sets(tmp_path / "sets", by_table=False)
    check_nano_beir(folder)
    file = folder / "NanoSciFact/qrels/train-00000-of-00001.parquet"
    pq.write_table(pa.table({"query-id": ["q1"]}), file)
    with pytest.raises(SourceError, match=r"qrels.*no column 'corpus-id'; found: query-id"):
        read_nano_beir(folder)
    file.unlink()
    with pytest.raises(ConfigurationError, match="holds no parquet of qrels for NanoSciFact"):
        check_nano_beir(folder)
