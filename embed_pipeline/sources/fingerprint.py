"""What the raw files hold, in a few bytes: files that did not change need not be read again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import source_files


def fingerprint(settings: SourceSettings, yaml_folder: Path) -> list[dict[str, str | int]]:
    """One entry a raw file in reading order: `key`, `source` (its name), `bytes`, `sha256` of its content.

    Files are streamed. Raises ConfigurationError where a path matches nothing.
    """
    entries: list[dict[str, str | int]] = []
    for file in source_files(settings, yaml_folder):
        with file.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        entries.append({"key": file.key, "source": file.name, "bytes": file.path.stat().st_size, "sha256": digest})
    return entries
