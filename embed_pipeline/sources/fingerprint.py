"""What the raw files hold, in a few bytes: files that did not change need not be read again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import source_files

Entry = dict[str, str | int]
SHOWN = 3


def fingerprint(settings: SourceSettings, yaml_folder: Path) -> list[Entry]:
    """One entry a raw file in reading order: `key`, `source` (its name), `bytes`, `sha256` of its content.

    Files are streamed. Raises ConfigurationError where a path matches nothing.
    """
    entries: list[Entry] = []
    for file in source_files(settings, yaml_folder):
        with file.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        entries.append({"key": file.key, "source": file.name, "bytes": file.path.stat().st_size, "sha256": digest})
    return entries


def refuse_changed(before: Sequence[Entry], settings: SourceSettings, yaml_folder: Path) -> None:
    """To be called when the files have been read: they must still be what `fingerprint` found `before`.

    Raises SourceError naming the files that were changed, added or removed meanwhile: rows that were read from them
    belong to neither content.
    """
    try:
        after = fingerprint(settings, yaml_folder)
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
