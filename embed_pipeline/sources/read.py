"""The user's parquet files -> one raw table, every row with its origin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from embed_pipeline.errors import SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import Key, SourceFile, source_files
from embed_pipeline.sources.columns import match_columns, wanted_columns
from embed_pipeline.tables import RAW, RAW_FILE, write_stream

BATCH_ROWS = 20_000
MAGIC = b"PAR1"


class ReadFile(BaseModel):
    """One raw file as it was read: our column -> its column."""

    source: str
    kind: str
    rows: int
    columns: dict[str, str]


class SourceReport(BaseModel):
    rows: int
    rows_by_kind: dict[str, int]
    files: list[ReadFile]


def read_sources(settings: SourceSettings, yaml_folder: Path, out: Path) -> SourceReport:
    """Write `out/raw_pairs.parquet` (schema `tables.RAW`): rows as delivered, in order of file and row.

    Files are streamed through DuckDB. Raises ConfigurationError where a path matches nothing, SourceError naming file
    and column where a file is no parquet, is damaged or empty, lacks a column, or holds the wrong type.
    A null text in single rows is left to cleaning; a required column that is null in every row is an error.
    """
    connection = duckdb.connect()
    files = source_files(settings, yaml_folder)
    # All files are looked at before the first is read, so that a mistake is known after seconds.
    read = [_inspect(connection, settings, file) for file in files]

    def batches() -> Iterator[pa.RecordBatch]:
        for file, described in zip(files, read, strict=True):
            yield from _rows(connection, file, described)

    rows = write_stream(batches(), RAW, out / RAW_FILE)
    _refuse_columns_without_values(connection, settings, out / RAW_FILE, files, read)
    by_kind: dict[str, int] = {}
    for described in read:
        by_kind[described.kind] = by_kind.get(described.kind, 0) + described.rows
    return SourceReport(rows=rows, rows_by_kind=by_kind, files=read)


def _inspect(connection: duckdb.DuckDBPyConnection, settings: SourceSettings, file: SourceFile) -> ReadFile:
    _refuse_other_formats(file)
    try:
        described = connection.execute("DESCRIBE SELECT * FROM read_parquet($path)", {"path": _exactly(file)})
        delivered = {str(row[0]): str(row[1]) for row in described.fetchall()}
        counted = connection.execute("SELECT count(*) FROM read_parquet($path)", {"path": _exactly(file)})
        rows = int(counted.fetchall()[0][0])
        names = pq.read_schema(file.path).names
    except (duckdb.Error, pa.ArrowException) as error:
        raise SourceError(_damaged(file, error)) from error
    if len({name.lower() for name in names}) < len(names):
        # DuckDB would rename the second one, and which is which depends on their order.
        raise SourceError(
            f"{file.path}: two columns have the same name, letter case aside: {names}. Rename one of them"
        )
    if rows == 0:
        raise SourceError(f"{file.path}: no rows. Remove the file, or build it again")
    columns = match_columns(file, delivered, wanted_columns(settings, file.key))
    return ReadFile(source=file.name, kind=_kind(settings, file.key), rows=rows, columns=columns)


def _refuse_other_formats(file: SourceFile) -> None:
    size = file.path.stat().st_size
    if size == 0:
        raise SourceError(f"{file.path}: the file is empty (0 bytes), expected parquet")
    with file.path.open("rb") as stream:
        head = stream.read(len(MAGIC))
        stream.seek(max(0, size - len(MAGIC)))
        tail = stream.read()
    if head != MAGIC:
        raise SourceError(
            f"{file.path}: not a parquet file (it starts with {head!r}, expected {MAGIC!r}). Convert it, e.g. "
            "pandas.read_csv(...).to_parquet(...)"
        )
    if tail != MAGIC:
        raise SourceError(
            f"{file.path}: truncated parquet file ({size} bytes, the footer is missing). Copy or build it again"
        )


def _rows(connection: duckdb.DuckDBPyConnection, file: SourceFile, described: ReadFile) -> Iterator[pa.RecordBatch]:
    ours = {"source": "$source", "row_number": "file_row_number", "kind": "$kind"}
    for column, theirs in described.columns.items():
        ours[column] = '"' + theirs.replace('"', '""') + '"'
    selected = ", ".join(f"CAST({ours.get(f.name, 'NULL')} AS {_TYPES[f.type]}) AS {f.name}" for f in RAW)
    parameters = {"source": described.source, "kind": described.kind, "path": _exactly(file)}
    try:
        query = f"SELECT {selected} FROM read_parquet($path, file_row_number = true)"
        yield from connection.sql(query, params=parameters).to_arrow_reader(BATCH_ROWS)
    except (duckdb.Error, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(_damaged(file, error)) from error


_TYPES = {pa.string(): "VARCHAR", pa.int64(): "BIGINT", pa.float64(): "DOUBLE"}


def _refuse_columns_without_values(
    connection: duckdb.DuckDBPyConnection,
    settings: SourceSettings,
    raw_file: Path,
    files: list[SourceFile],
    read: list[ReadFile],
) -> None:
    names = [field.name for field in RAW][3:]
    counts = connection.execute(
        f"SELECT source, {', '.join(f'count({name})' for name in names)} FROM read_parquet($path) GROUP BY source",
        {"path": str(raw_file)},
    ).fetchall()
    filled = {row[0]: dict(zip(names, row[1:], strict=True)) for row in counts}
    for file, described in zip(files, read, strict=True):
        for column in wanted_columns(settings, file.key):
            if column.required and filled[described.source][column.ours] == 0:
                raise SourceError(
                    f"{file.path}: column '{column.theirs}' ({column.setting}) is null in all {described.rows} rows. "
                    f"Name the column that holds the values under {column.setting}, or leave the file out"
                )


def _kind(settings: SourceSettings, key: Key) -> str:
    if key == "path":
        return "pair" if settings.kind == "pairs" else "triplet"
    return {"queries": "query", "qrels": "judgement"}.get(key, "passage")


def _exactly(file: SourceFile) -> list[str]:
    """A list, whose entries DuckDB still reads as patterns: brackets, stars and question marks are made literal."""
    return ["".join(f"[{c}]" if c in "*?[" else c for c in str(file.path))]


def _damaged(file: SourceFile, error: Exception) -> str:
    said = str(error).splitlines()[0]
    return f"{file.path}: cannot be read as parquet, it seems damaged. DuckDB says: {said}. Copy or build it again"
