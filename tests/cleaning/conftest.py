"""Raw tables from a few rows, cleaned, as Python rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.cleaning.clean import CleaningReport, clean
from embed_pipeline.cleaning.verify import verify
from embed_pipeline.settings import CleaningSettings
from embed_pipeline.tables import (
    MERGED,
    MERGED_FILE,
    PASSAGES,
    PASSAGES_FILE,
    QRELS,
    QRELS_FILE,
    QUERIES,
    QUERIES_FILE,
    RAW,
    RAW_FILE,
    REJECTED,
    REJECTED_FILE,
    WITHHELD,
    WITHHELD_FILE,
    write,
)

Row = dict[str, Any]
FILES = {
    QUERIES_FILE: QUERIES,
    PASSAGES_FILE: PASSAGES,
    QRELS_FILE: QRELS,
    WITHHELD_FILE: WITHHELD,
    REJECTED_FILE: REJECTED,
    MERGED_FILE: MERGED,
}


@dataclass(frozen=True)
class Cleaned:
    """What `clean` wrote. `violations` is what `verify` says about it."""

    queries: list[Row]
    passages: list[Row]
    qrels: list[Row]
    withheld: list[Row]
    rejected: list[Row]
    merged: list[Row]
    report: CleaningReport
    violations: list[str]
    files: dict[str, bytes]

    @property
    def reasons(self) -> dict[int, str]:
        """Row number -> reason."""
        return {row["row_number"]: row["reason"] for row in self.rejected}

    @property
    def split_of(self) -> dict[str, str]:
        return {row["query"]: row["split"] for row in self.queries}


def raw_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows get their source, number and kind (told by their columns) where they do not give them."""
    full = []
    for number, row in enumerate(rows):
        kind = "triplet" if "negative" in row else "pair"
        full.append({**dict.fromkeys(RAW.names), "source": "a.parquet", "row_number": number, "kind": kind, **row})
    return pa.Table.from_pylist(full, schema=RAW)


def clean_rows(rows: Iterable[Mapping[str, Any]], seed: int = 42, **settings: Any) -> Cleaned:
    with TemporaryDirectory() as folder:
        raw, out = Path(folder) / RAW_FILE, Path(folder) / "out"
        out.mkdir()
        write(raw_table(rows), RAW, raw)
        report = clean(raw, CleaningSettings.model_validate(settings), seed, out)
        assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
        tables = {name: pq.read_table(out / name) for name in FILES}
        assert all(tables[name].schema.equals(schema) for name, schema in FILES.items())
        return Cleaned(
            *(tables[name].to_pylist() for name in FILES),
            report=report,
            violations=verify(out, raw),
            files={name: (out / name).read_bytes() for name in FILES},
        )


@pytest.fixture(scope="session")
def cleaned() -> Callable[..., Cleaned]:
    """`cleaned(rows, seed=..., **cleaning_settings)` cleans a few raw rows."""
    return clean_rows
