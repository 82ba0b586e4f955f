"""What the raw files hold, in a few bytes: files that did not change need not be read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from embed_pipeline.artifacts import DIGITS
from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import SourceFile, source_files
from embed_pipeline.sources.delta import Partition

Entry = dict[str, Any]
SHOWN = 3


class FileState(BaseModel):
    """A raw file as it lies there; who writes to it changes one of the three, as a rule."""

    model_config = ConfigDict(frozen=True)

    name: str
    bytes: int
    modified_ns: int
    partition: Partition = ()  # what the log of a Delta table says of all its rows


def look(sources: Sequence[SourceSettings], yaml_folder: Path) -> tuple[FileState, ...]:
    """The state of each raw file of all sources, in reading order; opens none (but the log of a Delta table).

    Raises ConfigurationError where a path matches nothing, OSError where a file was removed in this very moment.
    """
    return tuple(_state(file) for source in sources for file in source_files(source, yaml_folder))


def state_digest(files: Sequence[FileState]) -> str:
    """One id for the state of all files."""
    return hashlib.sha256(json.dumps([file.model_dump(exclude_defaults=True) for file in files]).encode()).hexdigest()[
        :DIGITS
    ]


def fingerprint(
    sources: Sequence[SourceSettings], yaml_folder: Path, known: Mapping[FileState, str] | None = None
) -> list[Entry]:
    """One entry a raw file in reading order: `key`, `source` (its name), `bytes`, `sha256` of its content; of a file
    of a partitioned Delta table also the `partition`.

    Files are streamed, but for those whose SHA-256 is `known` for the state they are in. Raises ConfigurationError
    where a path matches nothing, SourceError where a file cannot be read, FileNotFoundError where it is gone.
    """
    entries: list[Entry] = []
    for file in (file for source in sources for file in source_files(source, yaml_folder)):
        state = _state(file)
        digest = (known or {}).get(state)
        if digest is None:
            digest = _sha256(file.path)
        partition = {"partition": dict(file.partition)} if file.partition else {}
        entries.append({"key": file.key, "source": file.name, "bytes": state.bytes, "sha256": digest, **partition})
    return entries


def content_digest(entries: Sequence[Entry]) -> str:
    """One id for the content of all files, as `fingerprint` found it."""
    return hashlib.sha256(json.dumps([*entries], sort_keys=True).encode()).hexdigest()[:DIGITS]


def refuse_changed(before: Sequence[Entry], sources: Sequence[SourceSettings], yaml_folder: Path) -> None:
    """To be called when the files have been read: they must still be what `fingerprint` found `before`.

    Raises SourceError naming the files that were changed, added or removed meanwhile: rows that were read from them
    belong to neither content.
    """
    try:
        after = fingerprint(sources, yaml_folder)
    except (ConfigurationError, FileNotFoundError):
        after = []
    if after == [*before]:
        return
    different = [entry for entry in (*before, *after) if not (entry in before and entry in after)]
    names = sorted({str(entry["source"]) for entry in different})
    raise SourceError(
        f"{', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''} (in {yaml_folder}) changed while it was "
        "read: what was read may be neither the old nor the new content. Run again when the export is finished"
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error


def _state(file: SourceFile) -> FileState:
    found = file.path.stat()
    return FileState(name=file.name, bytes=found.st_size, modified_ns=found.st_mtime_ns, partition=file.partition)
