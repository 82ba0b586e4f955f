"""NanoBEIR from a local folder: small samples of BEIR's sets (zeta-alpha-ai/nanobeir), searched and averaged.

The library's NanoBEIREvaluator loads its sets from the Hub by name. Here the same parquet files are read from where
they lie and given to the same InformationRetrievalEvaluator. Two layouts are known:

    <folder>/NanoMSMARCO/corpus/*.parquet, queries/*.parquet, qrels/*.parquet    one repository a set
    <folder>/corpus/NanoMSMARCO*.parquet, queries/..., qrels/...                 sentence-transformers/NanoBEIR-en
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed_pipeline.artifacts import sha256_of
from embed_pipeline.errors import ConfigurationError, SourceError

if TYPE_CHECKING:
    from embed_pipeline.evaluation.evaluators import Part

_TABLES = {"corpus": ("_id", "text"), "queries": ("_id", "text"), "qrels": ("query-id", "corpus-id")}
SOURCE = "nano_beir"


@dataclass(frozen=True)
class NanoSet:
    queries: dict[str, str]
    passages: dict[str, str]
    relevant: dict[str, set[str]]


def check_nano_beir(folder: Path) -> None:
    """Every set needs its three tables; opens none. Raises ConfigurationError naming what is not there."""
    _files(folder)


def nano_beir_digest(folder: Path) -> str:
    """SHA-256 over the contents of all files that are read."""
    digest = hashlib.sha256()
    for name, tables in _files(folder).items():
        for table, paths in tables.items():
            for path in paths:
                digest.update(f"{name}\0{table}\0{path.name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


def read_nano_beir(folder: Path) -> dict[str, NanoSet]:
    """Set (`msmarco`) -> its texts, those without a letter left out as the library does.

    Raises ConfigurationError where a table is not there, SourceError naming the file that cannot be read or lacks a
    column, or the set that judges nothing.
    """
    sets = {}
    for name, tables in _files(folder).items():
        corpus, queries, qrels = (_read(paths, _TABLES[table]) for table, paths in tables.items())
        passages = {str(row["_id"]): row["text"] for row in corpus if row["text"]}
        asked = {str(row["_id"]): row["text"] for row in queries if row["text"]}
        relevant: dict[str, set[str]] = defaultdict(set)
        for row in qrels:
            ids = row["corpus-id"] if isinstance(row["corpus-id"], list) else [row["corpus-id"]]
            relevant[str(row["query-id"])].update(str(id) for id in ids)
        relevant = {query: ids for query, ids in relevant.items() if query in asked and ids & passages.keys()}
        if not relevant:
            raise SourceError(
                f"{folder}: no query of {name} has a relevant passage in its corpus. Copy the set again, or leave "
                "it out"
            )
        sets[name] = NanoSet({id: asked[id] for id in sorted(relevant)}, dict(sorted(passages.items())), relevant)
    return sets


def nano_beir_parts(folder: Path) -> tuple[Part, ...]:
    """The mean over the sets, then each set. Raises the errors of `read_nano_beir`."""
    from embed_pipeline.evaluation.evaluators import mean_part, retrieval_part

    sets = read_nano_beir(folder)
    parts = [
        retrieval_part(f"{SOURCE}/{name}", found.queries, found.passages, found.relevant)
        for name, found in sets.items()
    ]
    return (mean_part(SOURCE, parts), *parts)


def _files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Set -> table -> parquet files."""
    if not folder.is_dir():
        raise ConfigurationError(f"evaluation.nano_beir: no folder at {folder}. Expected a local copy of NanoBEIR")
    found: dict[str, dict[str, list[Path]]] = {}
    if (folder / "corpus").is_dir():
        names = sorted({path.stem.split("-000")[0] for path in (folder / "corpus").glob("*.parquet")})
        for name in names:
            found[name] = {
                table: sorted([*(folder / table).glob(f"{name}.parquet"), *(folder / table).glob(f"{name}-*.parquet")])
                for table in _TABLES
            }
    else:
        for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            found[place.name] = {
                table: sorted([*place.glob(f"{table}.parquet"), *(place / table).glob("*.parquet")])
                for table in _TABLES
            }
    for name, tables in found.items():
        for table, paths in tables.items():
            if not paths:
                raise ConfigurationError(
                    f"evaluation.nano_beir: {folder} holds no parquet of {table} for {name}. Expected "
                    f"{name}/{table}/*.parquet, or {table}/{name}*.parquet as in sentence-transformers/NanoBEIR-en"
                )
    if not found:
        raise ConfigurationError(
            f"evaluation.nano_beir: {folder} holds no set. Expected a folder a set, each with corpus, queries and qrels"
        )
    return {name.removeprefix("Nano").lower(): tables for name, tables in found.items()}


def _read(paths: list[Path], columns: tuple[str, ...]) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for path in paths:
        try:
            table = pq.read_table(path, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read as parquet: {error}. Copy it again") from error
        for column in columns:
            if column not in table.column_names:
                raise SourceError(f"{path}: no column '{column}'; found: {', '.join(table.column_names)}")
        rows += table.select(list(columns)).to_pylist()
    return rows
