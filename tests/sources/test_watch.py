"""When a state of the raw files is asked to be read, and what a person is told when it is not."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources import watch
from embed_pipeline.sources.fingerprint import content_digest, fingerprint, look, state_digest
from embed_pipeline.sources.watch import Look, Memory, Read, look_again

SETTINGS = SourceSettings.model_validate({"path": "raw/*.parquet"})


@dataclass
class Watched:
    """A folder of raw files (nothing opens them as parquet here) and what the looks at it remembered."""

    folder: Path
    memory: Memory = field(default_factory=Memory)

    def write(self, name: str, content: str, at: int = 1_000_000_000) -> Path:
        path = self.folder / "raw" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        os.utime(path, (at, at))
        return path

    def look(self, read: Read | None = None) -> Look:
        """One look, which remembers as Dagster's cursor does: as text."""
        found = look_again(self.memory, (SETTINGS,), self.folder, read)
        self.memory = Memory.model_validate_json(found.memory.model_dump_json())
        return found

    def settled(self, read: Read | None = None) -> Look:
        """The look after the one that sees a change."""
        assert self.look(read).request is None
        return self.look(read)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_new_file_is_asked_for_once_when_two_looks_agree(watched: Watched) -> None:
    watched.write("a.parquet", "a")
    first = watched.look()
    assert (first.request, first.reason) == (None, "a first look at 1 file: waiting until a second look finds the same")

    second = watched.look()
    assert second.request is not None
    assert second.reason == "1 file settled, with a new content"

    third = watched.look()
    assert third.request is None
    assert third.reason.startswith("1 file, unchanged since 20")
    assert third.reason.endswith("UTC")


def test_a_file_that_is_still_written_is_waited_for(watched: Watched) -> None:
    watched.write("a.parquet", "a")
    watched.settled()
    for number in range(3):
        watched.write("b.parquet", "b" * number, at=2_000_000_000 + number)
        waiting = watched.look()
        assert waiting.request is None
        told = "b.parquet is new" if number == 0 else "b.parquet changed"
        assert waiting.reason == f"raw/{told}: waiting until a second look finds the same"
    assert watched.look().request is not None


def test_what_was_added_changed_and_removed_is_named(watched: Watched) -> None:
    for name in ("a", "b", "c", "d", "e"):
        watched.write(f"{name}.parquet", name)
    watched.settled()
    watched.write("a.parquet", "changed")
    watched.write("f.parquet", "f")
    for name in ("c", "d"):
        (watched.folder / "raw" / f"{name}.parquet").unlink()
    told = watched.look().reason
    assert told.startswith("raw/f.parquet is new, raw/a.parquet changed, raw/c.parquet is gone and 1 more: waiting")
    assert watched.look().request is not None


def test_a_touched_file_with_its_old_content_is_no_change(watched: Watched) -> None:
    watched.write("a.parquet", "a")
    watched.settled()
    watched.write("a.parquet", "a", at=2_000_000_000)
    found = watched.settled()
    assert (found.request, found.reason) == (None, "1 file touched, but the content is the same")
    assert watched.look().reason.startswith("1 file, unchanged since")


def test_a_content_that_comes_back_after_another_is_asked_for_again(watched: Watched) -> None:
    requests = []
    for at, content in enumerate(("a", "b", "a", "b")):
        watched.write("a.parquet", content, at=2_000_000_000 + at)
        requests.append(watched.settled().request)
    assert None not in requests
    assert len(set(requests)) == 4


def test_a_postponed_request_comes_again_without_reading_the_files_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.write("a.parquet", "a")
    watched.look()
    before = watched.memory
    asked = watched.look()
    postponed = asked.postponed(before, "a run is in progress")
    assert (postponed.request, postponed.reason) == (
        None,
        "1 file settled, with a new content, but a run is in progress",
    )

    (watched.folder / "raw" / "a.parquet").chmod(0)  # and nobody, not even root, needs to read it
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file was opened"))
    again = look_again(postponed.memory, (SETTINGS,), watched.folder, None)
    assert again.request == asked.request


def test_only_changed_files_are_read_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.write("a.parquet", "a")
    watched.write("b.parquet", "b")
    watched.settled()
    watched.write("b.parquet", "changed")
    opened = []
    really_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest: opened.append(path.name) or really_open(path, *rest))
    assert watched.settled().request is not None
    assert opened == ["b.parquet"]


def test_what_was_read_before_is_not_asked_for(watched: Watched) -> None:
    watched.write("a.parquet", "a")
    content, state = (
        content_digest(fingerprint((SETTINGS,), watched.folder)),
        state_digest(look((SETTINGS,), watched.folder)),
    )
    same_state = watched.settled(Read("f00", content, state))
    assert (same_state.request, same_state.reason) == (None, "1 file in the state that raw_pairs f00 was read from")

    watched.memory = Memory()
    same_content = watched.settled(Read("f00", content, "another state"))
    assert (same_content.request, same_content.reason) == (
        None,
        "1 file with the content that raw_pairs f00 was read from",
    )

    watched.memory = Memory()
    assert watched.settled(Read("f00", "another content", None)).request is not None


def test_files_too_large_for_a_look_are_left_to_the_run(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_BYTES", 3)
    watched.write("a.parquet", "four")
    found = watched.settled()
    assert found.request is not None
    assert "too large to be compared by a look" in found.reason
    assert watched.look().request is None


def test_files_that_cannot_be_seen_are_told_and_waited_for(watched: Watched) -> None:
    assert watched.look().reason.startswith("the raw files cannot be seen: source.path: no file matches")
    file = watched.write("a.parquet", "a")
    watched.settled()
    file.unlink()
    assert watched.look().request is None
    watched.write("a.parquet", "a")
    back = watched.settled()
    assert (back.request, back.reason[:17]) == (None, "1 file, unchanged")


def test_a_file_that_cannot_be_read_is_told(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.write("a.parquet", "a")

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        found = watched.settled()
    assert found.request is None
    assert "Permission denied" in found.reason
    assert "a.parquet" in found.reason
    assert watched.settled().request is not None
