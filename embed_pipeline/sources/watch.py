"""Watching the raw files: when has a state of them settled that nobody has read yet?

`look_again` is called again and again with what it remembered. It opens no file until two looks in a row agree, and
then only those that changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from embed_pipeline.errors import UserError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.fingerprint import SHOWN, FileState, content_digest, fingerprint, look, state_digest

# More than that is not read by a look, which must end in seconds; the run that is asked for finds out.
MOST_BYTES = 2_000_000_000


class Sum(BaseModel):
    """The SHA-256 of a file in the state it was in."""

    model_config = ConfigDict(frozen=True)

    file: FileState
    sha256: str


class Memory(BaseModel):
    """What a look leaves for the next one."""

    model_config = ConfigDict(frozen=True)

    seen: tuple[FileState, ...] | None = None  # by the look before; None: it could not see them
    sums: tuple[Sum, ...] = ()
    handled_state: str | None = None  # the state and the content that were read or asked for last
    handled_content: str | None = None
    handled_at: str = ""
    requests: int = 0


@dataclass(frozen=True)
class Read:
    """What the current raw rows were read from."""

    version: str
    content: str
    state: str | None


@dataclass(frozen=True)
class Look:
    """What came of a look: what to remember, why in a sentence, and the state to be read now, if any."""

    memory: Memory
    reason: str
    request: str | None = None

    def postponed(self, before: Memory, why: str) -> Look:
        """This look without its request, to be repeated by the next one; `before` is what was remembered before it."""
        # What was read of the files need not be read again.
        return Look(before.model_copy(update={"sums": self.memory.sums}), f"{self.reason}, but {why}")


def look_again(memory: Memory, sources: Sequence[SourceSettings], yaml_folder: Path, read: Read | None) -> Look:
    """Look at the raw files of all `sources` once more; never raises because of them.

    A `request` names the content to be read, and how often one was asked for: a content that comes back after another
    has a new name.
    """
    try:
        files = look(sources, yaml_folder)
        if files != memory.seen:
            return Look(memory.model_copy(update={"seen": files}), _unsettled(memory.seen, files))
        if state_digest(files) == memory.handled_state:
            return Look(memory, f"{_count(files)}, unchanged since {memory.handled_at}")
        return _settled(memory, files, sources, yaml_folder, read)
    except (UserError, OSError) as error:
        return Look(memory.model_copy(update={"seen": None}), f"the raw files cannot be seen: {error}")


def _settled(
    memory: Memory,
    files: tuple[FileState, ...],
    sources: Sequence[SourceSettings],
    yaml_folder: Path,
    read: Read | None,
) -> Look:
    state = state_digest(files)
    now = f"{datetime.now(UTC):%Y-%m-%d at %H:%M UTC}"
    handled = memory.model_copy(update={"handled_state": state, "handled_at": now})
    if read is not None and read.state == state:
        handled = handled.model_copy(update={"handled_content": read.content})
        return Look(handled, f"{_count(files)} in the state that raw_pairs {read.version} was read from")
    sums = {known.file: known.sha256 for known in memory.sums}
    if sum(file.bytes for file in files if file not in sums) > MOST_BYTES:
        content, found = state, "too large to be compared by a look: the run will find out what changed"
    else:
        entries = fingerprint(sources, yaml_folder, sums)
        if look(sources, yaml_folder) != files:
            return Look(memory.model_copy(update={"seen": None}), "the raw files changed while they were looked at")
        known = tuple(Sum(file=f, sha256=str(e["sha256"])) for f, e in zip(files, entries, strict=True))
        handled = handled.model_copy(update={"sums": known})
        content, found = content_digest(entries), "with a new content"
    if content == memory.handled_content:
        return Look(handled, f"{_count(files)} touched, but the content is the same")
    handled = handled.model_copy(update={"handled_content": content})
    if read is not None and read.content == content:
        return Look(handled, f"{_count(files)} with the content that raw_pairs {read.version} was read from")
    handled = handled.model_copy(update={"requests": memory.requests + 1})
    return Look(handled, f"{_count(files)} settled, {found}", request=f"{content}-{handled.requests}")


def changes(before: Sequence[FileState], after: Sequence[FileState]) -> str:
    """Which files are new, changed or gone, for a person."""
    old, new = ({file.name: file for file in files} for files in (before, after))
    told = [f"{name} is new" for name in new if name not in old]
    told += [f"{name} changed" for name, file in new.items() if name in old and old[name] != file]
    told += [f"{name} is gone" for name in old if name not in new]
    return ", ".join(told[:SHOWN]) + (f" and {len(told) - SHOWN} more" if len(told) > SHOWN else "")


def _unsettled(before: tuple[FileState, ...] | None, after: tuple[FileState, ...]) -> str:
    told = f"a first look at {_count(after)}" if before is None else changes(before, after)
    return f"{told}: waiting until a second look finds the same"


def _count(files: Sequence[FileState]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"
