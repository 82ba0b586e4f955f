"""A disk that is full, or may not be written, in words: what the libraries raise of it names neither cause nor cure.

DuckDB, Arrow, torch and safetensors have errors of their own for it, and a training tells of its error in a text.
"""

from __future__ import annotations

import errno
import getpass
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from embed_pipeline.errors import DiskError, TrainingError, UserError

_Kind = Literal["full", "quota", "read-only", "denied"]
_NUMBERS: dict[int, _Kind] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "quota",
    errno.EROFS: "read-only",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
}
# What stands in messages: the system's own words, SQLite's, those of numpy and torch when they cannot write all.
_WORDS: tuple[tuple[str, _Kind], ...] = (
    ("no space left on device", "full"),
    ("disk is full", "full"),
    ("takes no whole line", "full"),
    (" requested and ", "full"),
    ("pytorchstreamwriter failed writing", "full"),
    ("inline_container.cc", "full"),
    ("iostream error", "full"),
    ("max_temp_directory_size", "full"),
    ("disk quota exceeded", "quota"),
    ("read-only file system", "read-only"),
    ("readonly database", "read-only"),
    ("permission denied", "denied"),
)
# Servers deny a permission as well, which has nothing to do with a disk.
_SPEAK_OF_FILES = ("duckdb", "_duckdb", "pyarrow", "safetensors", "safetensors_rust", "sqlite3")
_PATH = re.compile(r"""["'](/[^"'\n]+)["']""")
NEARLY_FULL = 64 * 1024  # bytes: less than an error file and its folder may take


@contextmanager
def plain_disk_errors(store: Path) -> Iterator[None]:
    """Raise DiskError, with the path, the free space and what to do, where the body fails for want of disk.

    `store` is the folder that is written to. Everything else is raised as it is.
    """
    try:
        yield
    except Exception as error:
        told = disk_error(error, store)
        if told is None:
            raise
        raise told from error


def disk_error(error: Exception, store: Path) -> DiskError | None:
    """What an exception, or what it was raised from, says of a disk; None where it says nothing."""
    if isinstance(error, UserError) and not isinstance(error, TrainingError):
        return None
    for one in _chain(error):
        if (found := _kind(one)) is not None:
            return _told(found, _path(one) or store, store, _first_line(one))
    if isinstance(error, TrainingError) and _free(store) < NEARLY_FULL:  # its processes could not even say so
        return _told("full", store, store, _first_line(error))
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _kind(error: BaseException) -> _Kind | None:
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return _NUMBERS[error.errno]
    if isinstance(error, OSError) and error.errno is not None:
        return None
    told = str(error).lower()
    kind = next((kind for words, kind in _WORDS if words in told), None)
    of_files = isinstance(error, TrainingError) or type(error).__module__.partition(".")[0] in _SPEAK_OF_FILES
    return None if kind == "denied" and not of_files else kind


def _path(error: BaseException) -> Path | None:
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        name = error.filename
        return Path(name if isinstance(name, str) else name.decode(errors="replace"))
    found = _PATH.search(_first_line(error))
    return Path(found.group(1)) if found else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _told(kind: _Kind, path: Path, store: Path, said: str) -> DiskError:
    if kind in ("full", "quota"):
        temporary = Path(tempfile.gettempdir())
        return DiskError(
            f"{path}: {'the disk is full' if kind == 'full' else 'the disk quota is used up'} ({said}). Free: "
            f"{readable_size(_free(store))} at {store}, {readable_size(_free(temporary))} at {temporary}, "
            "where temporary files lie. "
            "Free some space (`embed-pipeline prune PIPELINE` shows what the store can do without), or name "
            "another folder in EMBED_PIPELINE_STORE or TMPDIR. Nothing was published by halves; start the run again"
        )
    if kind == "read-only":
        return DiskError(
            f"{path} cannot be written: its disk is mounted read-only ({said}). Mount it writable, or name another "
            "folder in EMBED_PIPELINE_STORE"
        )
    return DiskError(
        f"{path}: {getpass.getuser()} may not read or write it ({said}). Give that user the right to (chown, chmod), "
        "or name another folder in EMBED_PIPELINE_STORE if it is part of the store"
    )


def _free(path: Path) -> int:
    """Bytes that may still be written at a path, or where it would be made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def readable_size(size: float) -> str:
    """Bytes as people read them, in steps of a thousand."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
