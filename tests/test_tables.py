"""Reading and writing the tables that pass between stages."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embed_pipeline
from embed_pipeline.tables import connect


@pytest.mark.parametrize("place", ["query=zzz/split=train", "we[ir]d*?", "it's"])
@pytest.mark.parametrize("reader", ["stored", "stored_in_order"])
def test_a_table_is_read_as_it_is_wherever_it_lies(tmp_path: Path, place: str, reader: str) -> None:
    path = tmp_path / place / "a[1].parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"query": ["a", "b"]}), path)
    with connect(str(tmp_path / "work.duckdb")) as connection:
        found = connection.execute(f"SELECT * FROM {reader}($path)", {"path": str(path)})
        assert [column[0] for column in found.description] == ["query", "file_row_number"][: 1 + (reader != "stored")]
        assert [row[0] for row in found.fetchall()] == ["a", "b"]


def test_no_reader_makes_columns_of_folders() -> None:
    """DuckDB and pyarrow would take the value of a folder `query=...` for that of the column of this name."""
    for file in Path(embed_pipeline.__file__).parent.rglob("*.py"):
        code = file.read_text()
        for call in re.findall(r"(?<!pandas\.)\bread_(?:parquet|json)\((?:[^()]|\([^()]*\))*\)", code):
            assert "hive_partitioning" in call, f"{file}: {call}"
        for call in re.findall(r"\bpq\.(?:read_table|ParquetDataset)\((?:[^()]|\([^()]*\))*\)", code):
            assert "partitioning=None" in call, f"{file}: {call}"
        assert not re.search(r"\b(pd|pandas)\.read_parquet|\.(from|read)_parquet\(|\bds\.dataset\(", code), file
