"""The user's files -> one raw table a source, every row with its origin."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.losses import EXAMPLE_KINDS
from embed_pipeline.settings import EncodingSettings, SourceSettings
from embed_pipeline.sources import flag_embedding
from embed_pipeline.sources.check import Key, NotRead, SourceFile, find_files
from embed_pipeline.sources.columns import (
    Column,
    as_further_negatives,
    as_triplets,
    match_columns,
    negative_columns,
    the_one_alike,
    wanted_columns,
)
from embed_pipeline.tables import RAW, RAW_EXAMPLES, RAW_EXAMPLES_FILE, RAW_FILE, connect, write_stream

logger = logging.getLogger(__name__)

BATCH_ROWS = 20_000
NUMBERS = "file_row_number"
MAGIC = b"PAR1"


class ReadFile(BaseModel):
    """One raw file as it was read: our column -> its column. A triplets file is read once for each negative."""

    source: str
    kind: str
    rows: int
    columns: dict[str, str]
    relevance: float | None = None  # of all its rows, where no column gives it
    prompt: str | None = None  # that its lines carry (flag-embedding)
    # Our column -> what a folder `key=value` or a Delta log says for all rows, where no column does.
    folders: dict[str, str | None] = {}


class SourceReport(BaseModel):
    rows: int
    rows_by_kind: dict[str, int]
    files: list[ReadFile]
    not_read: list[NotRead]


@dataclass(frozen=True)
class _Part:
    """What is read of one file in one go."""

    file: SourceFile
    described: ReadFile
    wanted: list[Column]
    numbers_itself: bool = False  # it has a column named as the one in which DuckDB numbers rows


def raw_table(settings: SourceSettings) -> tuple[str, pa.Schema]:
    """File name and schema of the raw rows of such a source."""
    return (RAW_EXAMPLES_FILE, RAW_EXAMPLES) if settings.kind in EXAMPLE_KINDS else (RAW_FILE, RAW)


def read_sources(settings: SourceSettings, yaml_folder: Path, out: Path) -> SourceReport:
    """Write `out/raw_pairs.parquet` (schema `tables.RAW`), or for scored, labelled and parallel sources
    `out/raw_examples.parquet` (`tables.RAW_EXAMPLES`): rows as delivered, in order of file and row.

    A row has one text that is judged, so what comes with several is several rows: the negatives of a triplets file
    besides the first have `FILE#COLUMN` as their source, the texts of a FlagEmbedding line `FILE#pos[0]`, `FILE#neg[2]`
    (rows are lines from 0, those without anything on them not counted). A column that a file lacks is taken from a
    folder `key=value` in its name. The file's own column takes precedence over that, and the log of a Delta table over
    both.

    What the YAML names and is not read, such as a file without rows beside others, is told in the report and logged.
    Files are streamed through DuckDB. Raises ConfigurationError where a path matches nothing, SourceError naming file
    and column (or line) where a file is not of the format it must be, is damaged or empty, lacks a column, or holds the
    wrong type. A null text in single rows is left to cleaning; a required column that is null in every row is an error.
    """
    name, schema = raw_table(settings)
    with connect() as connection:
        # All files are looked at before the first is read, so that a mistake is known after seconds.
        found = find_files(settings, yaml_folder)
        parts, empty = _inspect_all(connection, settings, found.files)
        batches = (batch for part in parts for batch in _rows(connection, part, schema))
        rows = write_stream(batches, schema, out / name)
        _refuse_columns_without_values(connection, out / name, schema, parts)
    by_kind: dict[str, int] = {}
    for part in parts:
        by_kind[part.described.kind] = by_kind.get(part.described.kind, 0) + part.described.rows
    not_read = [*found.not_read, *empty]
    for one in not_read:
        logger.warning("%s.%s: %s is not read: %s", settings.where, one.key, one.source, one.reason)
    return SourceReport(rows=rows, rows_by_kind=by_kind, files=[part.described for part in parts], not_read=not_read)


def refuse_other_prompts(files: Sequence[ReadFile], encoding: EncodingSettings) -> None:
    """What rows were written for has to be what questions are encoded with.

    Raises ConfigurationError naming the key where a file's prompt is not `embedder.encoding`'s.
    """
    for file in files:
        if file.prompt is not None and file.prompt != encoding.query_prompt:
            found = "nothing" if encoding.query_prompt is None else repr(encoding.query_prompt)
            raise ConfigurationError(
                f"embedder.encoding.query_instruction_for_retrieval: found {found}, but the lines of {file.source} "
                f"carry the prompt {file.prompt!r}. Questions are trained on and searched with one instruction: name "
                "this one there, or leave `prompt` out of the file"
            )


def _inspect_all(
    connection: duckdb.DuckDBPyConnection, settings: SourceSettings, files: Sequence[SourceFile]
) -> tuple[list[_Part], list[NotRead]]:
    """What is read of the files, and those without rows: a job writes such a part where it had nothing to write."""
    parts: list[_Part] = []
    empty: list[NotRead] = []
    for key in dict.fromkeys(file.key for file in files):
        of_key = [file for file in files if file.key == key]
        inspected = {file: _inspect(connection, settings, file) for file in of_key}
        if not any(inspected.values()):
            others = f" (and {len(of_key) - 1} more)" if len(of_key) > 1 else ""
            raise SourceError(f"{of_key[0].path}{others}: no rows. Build the file again, or leave it out")
        parts += [part for found in inspected.values() for part in found]
        empty += [NotRead(key=key, source=f.name, reason="no rows") for f, found in inspected.items() if not found]
    return parts, empty


def _inspect(connection: duckdb.DuckDBPyConnection, settings: SourceSettings, file: SourceFile) -> list[_Part]:
    """Nothing where the file has no rows."""
    try:
        return _parts(connection, settings, file)
    except OSError as error:
        raise SourceError(f"{file.path}: cannot be read: {error.strerror}") from error


def _parts(connection: duckdb.DuckDBPyConnection, settings: SourceSettings, file: SourceFile) -> list[_Part]:
    if settings.kind == "flag-embedding" and file.key == "path":
        found = flag_embedding.describe(connection, file.path, _exactly(file))
        values = file.values()
        key = the_one_alike(
            file, Column("split", "split", "text", False, f"{settings.where}.columns.split"), values, _VALUES
        )
        split = {"split": values[key]} if key is not None else {}
        told = ReadFile(
            source=file.name, kind="pair", rows=found.rows, columns=found.columns, prompt=found.prompt, folders=split
        )
        return [_Part(file, told, [])] if found.rows else []
    delivered, rows = _describe(connection, file)
    if rows == 0:
        return []
    wanted, kind = wanted_columns(settings, file.key), _kind(settings, file.key)
    if kind != "triplet":
        return [_part(file, file.name, kind, rows, delivered, wanted)]
    first, *others = negative_columns(settings, delivered)
    parts = [_part(file, file.name, kind, rows, delivered, as_triplets(wanted, first))]
    for column in others:
        further = as_further_negatives(wanted, column)
        parts.append(_part(file, f"{file.name}#{column}", "pair", rows, delivered, further, relevance=0.0))
    return parts


def _part(
    file: SourceFile,
    source: str,
    kind: str,
    rows: int,
    delivered: dict[str, str],
    wanted: list[Column],
    relevance: float | None = None,
) -> _Part:
    values = file.values()
    folders: dict[str, str | None] = {}
    for column in wanted:
        key = the_one_alike(file, column, values, _VALUES)
        if key is None:
            continue
        own = column.theirs if column.theirs in delivered else the_one_alike(file, column, delivered, "columns")
        if own is None or key in dict(file.partition):
            folders[column.ours] = values[key]
            _refuse_what_is_no_number(file, column, key, values[key])
        else:
            logger.warning("%s: its column '%s' takes precedence over %s=%s", file.name, own, key, values[key])
    wanted = [column for column in wanted if column.ours not in folders]
    described = ReadFile(
        source=source,
        kind=kind,
        rows=rows,
        columns=match_columns(file, delivered, wanted),
        relevance=relevance,
        folders=folders,
    )
    return _Part(file, described, wanted, NUMBERS in {name.lower() for name in delivered})


_VALUES = "folders (or partitions of a Delta table)"
# As DuckDB reads it; Python would also take digits of other scripts and words such as `nan`.
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


def _refuse_what_is_no_number(file: SourceFile, column: Column, key: str, value: str | None) -> None:
    if column.holds != "number" or value is None:
        return
    if not _NUMBER.fullmatch(value) or not math.isfinite(float(value)):
        raise SourceError(
            f"{file.path}: the file has no column '{column.theirs}' ({column.setting}), and {key}={value} in place of "
            f"it is no number. Give it digits 0 to 9, such as {key}=1, or write the column into the file"
        )


def _describe(connection: duckdb.DuckDBPyConnection, file: SourceFile) -> tuple[dict[str, str], int]:
    """Column -> DuckDB type, and the number of rows, of a parquet file."""
    _refuse_other_formats(file)
    try:
        described = connection.execute(
            "DESCRIBE SELECT * FROM read_parquet($path, hive_partitioning = false)", {"path": _exactly(file)}
        )
        delivered = {str(row[0]): str(row[1]) for row in described.fetchall()}
        counted = connection.execute(
            "SELECT count(*) FROM read_parquet($path, hive_partitioning = false)", {"path": _exactly(file)}
        )
        rows = int(counted.fetchall()[0][0])
        names = pq.read_schema(file.path).names
    except (duckdb.Error, pa.ArrowException) as error:
        raise SourceError(_damaged(file, error)) from error
    if len({name.lower() for name in names}) < len(names):
        # DuckDB would rename the second one, and which is which depends on their order.
        raise SourceError(
            f"{file.path}: two columns have the same name, letter case aside: {names}. Rename one of them"
        )
    return delivered, rows


_OTHER_FORMATS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself. Fetch it: git lfs pull",
    b"PARE": "encrypted parquet. Write it without encryption",
    b"\x1f\x8b": "compressed (gzip), expected parquet, which is compressed within. Unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd), expected parquet, which is compressed within. Unpack it",
    b"PK\x03\x04": "a zip archive or a spreadsheet, expected parquet. Unpack or convert it",
    b"ARROW1": "Arrow or Feather, expected parquet. Convert it: pandas.read_feather(...).to_parquet(...)",
    b"ORC": "ORC, expected parquet. Convert it: pandas.read_orc(...).to_parquet(...)",
    b"Obj\x01": "Avro, expected parquet. Convert it",
    b"{": "JSON, expected parquet. Convert it: pandas.read_json(..., lines=True).to_parquet(...)",
    b"[": "JSON, expected parquet. Convert it: pandas.read_json(...).to_parquet(...)",
    b"<": "HTML or XML, expected parquet: a page in place of the file? Download it again",
}
_LONGEST = 64


def _refuse_other_formats(file: SourceFile) -> None:
    size = file.path.stat().st_size
    if size == 0:
        raise SourceError(f"{file.path}: the file is empty (0 bytes), expected parquet")
    with file.path.open("rb") as stream:
        start = stream.read(_LONGEST).lstrip()
        head = start[: len(MAGIC)]
        stream.seek(max(0, size - len(MAGIC)))
        tail = stream.read()
    if head != MAGIC:
        for magic, told in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise SourceError(f"{file.path}: {told}")
        raise SourceError(
            f"{file.path}: not a parquet file (it starts with {head!r}, expected {MAGIC!r}). Convert it, e.g. "
            "pandas.read_csv(...).to_parquet(...)"
        )
    if tail != MAGIC:
        raise SourceError(
            f"{file.path}: truncated parquet file ({size} bytes, the footer is missing). Copy or build it again"
        )


def _rows(connection: duckdb.DuckDBPyConnection, part: _Part, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    described = part.described
    parameters: dict[str, Any] = {"source": described.source, "path": _exactly(part.file)}
    if part.wanted:
        ours = {"source": "$source", "row_number": "file_row_number", "kind": "$kind"}
        for column, theirs in described.columns.items():
            ours[column] = '"' + theirs.replace('"', '""') + '"'
        if described.relevance is not None:
            ours["relevance"] = str(described.relevance)
        parameters |= {"kind": described.kind} if "kind" in schema.names else {}
        for number, (column, value) in enumerate(described.folders.items()):
            ours[column] = f"$folder{number}"
            parameters[f"folder{number}"] = value
        rows = "read_parquet($path, file_row_number = true, hive_partitioning = false)"
        if part.numbers_itself:  # slower: in one thread
            ours["row_number"] = '"row number of ours"'
            rows = """(SELECT row_number() OVER () - 1 AS "row number of ours", *
                       FROM read_parquet($path, hive_partitioning = false))"""
    else:
        rows = f"({flag_embedding.ROWS})"
        given = ("source", "row_number", "kind", "query", "passage", "relevance", "teacher_score")
        ours = {name: name for name in given}
        if "split" in described.folders:
            ours["split"] = "$split"
            parameters["split"] = described.folders["split"]
    selected = ", ".join(f"CAST({ours.get(f.name, 'NULL')} AS {_TYPES[f.type]}) AS {f.name}" for f in schema)
    try:
        yield from connection.sql(f"SELECT {selected} FROM {rows}", params=parameters).to_arrow_reader(BATCH_ROWS)
    except (duckdb.Error, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(_damaged(part.file, error)) from error


_TYPES = {pa.string(): "VARCHAR", pa.int64(): "BIGINT", pa.float64(): "DOUBLE"}


def _refuse_columns_without_values(
    connection: duckdb.DuckDBPyConnection, raw_file: Path, schema: pa.Schema, parts: Sequence[_Part]
) -> None:
    names = [name for name in schema.names if name not in ("source", "row_number", "kind")]
    counts = connection.execute(
        f"SELECT source, {', '.join(f'count({name})' for name in names)} FROM stored($path) GROUP BY source",
        {"path": str(raw_file)},
    ).fetchall()
    filled = {row[0]: dict(zip(names, row[1:], strict=True)) for row in counts}
    for part in parts:
        for column in part.wanted:
            if column.required and filled[part.described.source][column.ours] == 0:
                raise SourceError(
                    f"{part.file.path}: column '{column.theirs}' ({column.setting}) is null in all "
                    f"{part.described.rows} rows. Name the column that holds the values under {column.setting}, or "
                    "leave the file out"
                )


def _kind(settings: SourceSettings, key: Key) -> str:
    if key == "path":
        return {"pairs": "pair", "triplets": "triplet"}.get(settings.kind, settings.kind)
    return {"queries": "query", "qrels": "judgement"}.get(key, "passage")


def _exactly(file: SourceFile) -> list[str]:
    """A list, whose entries DuckDB still reads as patterns: brackets, stars and question marks are made literal."""
    return ["".join(f"[{c}]" if c in "*?[" else c for c in str(file.path))]


def _damaged(file: SourceFile, error: Exception) -> str:
    said = str(error).splitlines()[0]
    if isinstance(error, duckdb.OutOfMemoryException):
        return f"{file.path}: too large for the memory there is ({said}). Write it with smaller row groups"
    if "not valid UTF8" in said or isinstance(error, UnicodeDecodeError):
        return f"{file.path}: a text is not UTF-8 ({said}). Write the column anew, decoded by the encoding it is in"
    return f"{file.path}: cannot be read as parquet, it seems damaged. DuckDB says: {said}. Copy or build it again"
