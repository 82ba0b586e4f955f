"""The demo's raw file: built from what is installed, the same bytes each time, dirty enough to need cleaning."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from embed_pipeline.cleaning.clean import clean
from embed_pipeline.cleaning.verify import verify
from embed_pipeline.settings import CleaningSettings, SourceSettings
from embed_pipeline.sources.read import read_sources
from embed_pipeline.tables import RAW_FILE

SCRIPT = Path(__file__).resolve().parent.parent / "embed_pipeline" / "defs" / "demo" / "build_raw.py"


def build(folder: Path, hash_seed: str) -> Path:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run([sys.executable, SCRIPT, folder], check=True, env=environment, cwd=folder.parent)
    assert [path.name for path in folder.iterdir()] == ["docstrings.parquet"]
    return folder / "docstrings.parquet"


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "raw", "1")


def test_same_bytes_each_time(docstrings: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "raw", "2").read_bytes() == docstrings.read_bytes()


def test_rows_read_as_text(docstrings: Path) -> None:
    rows = pq.read_table(docstrings).to_pylist()
    assert 8_000 < len(rows) < 14_000
    assert {row["library"] for row in rows} == {"pandas", "numpy", "scipy", "sklearn", "networkx", "torch"}
    assert max(len(row["passage"]) for row in rows) <= 350
    assert not [row["name"] for row in rows if "``" in row["question"] or "0x7f" in row["passage"]]
    named = {row["name"]: row for row in rows}
    assert named["pandas.DataFrame.drop"]["question"] == "Drop specified labels from rows or columns."
    assert named["pandas.DataFrame.drop"]["document"] == "pandas.DataFrame"
    # pandas says it again for Series: dirt that cleaning is for.
    assert Counter(row["question"] for row in rows).most_common(1)[0][1] > 5


def test_cleaning_leaves_enough_to_train_and_to_measure(docstrings: Path, tmp_path: Path) -> None:
    columns = {"query": "question", "document_id": "document"}
    settings = SourceSettings.model_validate({"path": "*.parquet", "columns": columns})
    read_sources(settings, docstrings.parent, tmp_path)
    report = clean(tmp_path / RAW_FILE, CleaningSettings(), 42, tmp_path)
    assert verify(tmp_path, tmp_path / RAW_FILE) == []
    assert report.kept_rows > 6_000
    assert report.queries_by_split["test"] > 400
    assert report.queries_by_split["dev"] > 150
    assert report.rejected_by_reason["duplicate"] > 1_000
