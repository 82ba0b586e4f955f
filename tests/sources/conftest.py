"""Writing small parquet files the way users do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WriteParquet = Callable[..., Path]


@pytest.fixture
def parquet(tmp_path: Path) -> WriteParquet:
    """`parquet("a/b.parquet", query=[...], passage=[...])` writes a file below `tmp_path` and returns it."""

    def write(name: str, **columns: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        return path

    return write
