"""Which parquet files a Delta table consists of now: those of older versions lie beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from embed_pipeline.errors import ConfigurationError

LOG_FOLDER = "_delta_log"
_COMMIT = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint(?:\.\d{10}\.(\d{10}))?\.parquet")
_ADVICE = "Write it as plain parquet (Spark: `spark.read.format('delta').load(...).write.parquet(...)`), and name that"

SHOWN = 100  # characters
Action = Mapping[str, Any]
Partition = tuple[tuple[str, str | None], ...]  # column, value


def current_files(where: str, table: Path) -> dict[Path, Partition]:
    """The files below `table` that its log says are part of it now, each with the values of all its rows.

    The log gives these for the columns that the table is partitioned by, wherever the file lies.

    Raises ConfigurationError naming `where` where the log is incomplete or damaged, a file is not there, or the files
    alone do not say what the rows are: with deletion vectors, with column mapping, with files that lie elsewhere.
    """
    try:
        actions = [_checked(action) for action in _actions(where, table / LOG_FOLDER)]
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise ConfigurationError(f"{where}: the log of the Delta table {table} cannot be read: {error}") from error
    current: dict[str, Action] = {}
    for action in actions:
        if (added := action.get("add")) is not None:
            current[added["path"]] = added
        elif (removed := action.get("remove")) is not None:
            current.pop(removed["path"], None)
        elif (told := action.get("metaData")) is not None:
            mapping = told["configuration"].get("delta.columnMapping.mode", "none")
            if mapping != "none":
                raise ConfigurationError(
                    f"{where}: the Delta table {table} maps its columns ({mapping}): they have other names in its "
                    f"files. {_ADVICE}"
                )
    for path, added in current.items():
        if added.get("deletionVector") is not None:
            raise ConfigurationError(
                f"{where}: rows of the Delta table {table} were deleted by a deletion vector, and are still in "
                f"{path}. Rewrite its files (Spark: `REORG TABLE ... APPLY (PURGE)`), or write it as plain parquet"
            )
        within = PurePosixPath(unquote(path))
        if urlsplit(path).scheme or within.is_absolute() or ".." in within.parts:
            raise ConfigurationError(f"{where}: the Delta table {table} has files elsewhere ({path}). {_ADVICE}")
        if not (table / within).is_file():
            raise ConfigurationError(
                f"{where}: the log of the Delta table {table} names {path}, which is not there. Copy the table again"
            )
    return {table / unquote(path): tuple(added["partitionValues"].items()) for path, added in current.items()}


def _checked(action: Any) -> Action:
    """An entry of the log, its maps as dictionaries (a checkpoint has lists of pairs).

    Raises ValueError where what is read of it is not as Delta's protocol says.
    """
    try:
        checked = dict(action)
        for name in ("add", "remove", "metaData"):
            if checked.get(name) is not None:
                checked[name] = dict(checked[name])
        for name in ("add", "remove"):
            if checked.get(name) is not None and not isinstance(checked[name]["path"], str):
                raise TypeError
        if (added := checked.get("add")) is not None:
            values = dict(added.get("partitionValues") or {})
            if not all(isinstance(value, str | None) for value in values.values()):
                raise TypeError
            added["partitionValues"] = {name: value or None for name, value in values.items()}
        if (told := checked.get("metaData")) is not None:
            told["configuration"] = dict(told.get("configuration") or {})
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"it has the entry {str(action)[:SHOWN]}, which is not as Delta's protocol says") from error
    return checked


def _actions(where: str, log: Path) -> Iterator[Action]:
    """From the newest whole checkpoint on, oldest first."""
    names = sorted(path.name for path in log.iterdir())
    commits = {int(found[1]): log / name for name in names if (found := _COMMIT.fullmatch(name))}
    parts: dict[tuple[int, int], list[Path]] = {}
    for name in names:
        if found := _CHECKPOINT.fullmatch(name):
            parts.setdefault((int(found[1]), int(found[2] or 1)), []).append(log / name)
    whole = {version: paths for (version, count), paths in parts.items() if len(paths) == count}
    start = max(whole, default=-1)
    for path in whole.get(start, []):
        yield from _of_checkpoint(pq.read_table(path, partitioning=None))
    later = sorted(version for version in commits if version > start)
    if later != list(range(start + 1, start + 1 + len(later))) or not (later or whole):
        raise ConfigurationError(
            f"{where}: {log} lacks commits or has a checkpoint of a kind that is not known. Copy the table again; if "
            f"it is whole: {_ADVICE.lower()}"
        )
    for version in later:
        yield from _of_commit(commits[version].read_text(encoding="utf-8").splitlines())


def _of_commit(lines: Iterable[str]) -> Iterator[Action]:
    yield from (json.loads(line) for line in lines if line.strip())


def _of_checkpoint(table: pa.Table) -> Iterator[Action]:
    columns = [name for name in ("add", "metaData") if name in table.column_names]
    for row in table.select(columns).to_pylist():
        yield {name: action for name, action in row.items() if action is not None}
