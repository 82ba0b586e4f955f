"""The faults: each prepares a store, breaks something at a random moment, and says what the next run may not do."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fault_injection.invariants import (
    Bits,
    BrokenPromiseError,
    bits_of,
    check_leftovers_go,
    check_nothing_by_halves,
    check_nothing_lost,
    check_same_bits,
    versions_in,
)
from tests.fault_injection.runs import ORDER, Outcome, Run, Workplace, leave_out, start_server

IN_THE_FUTURE = 2 * 24 * 3600.0  # seconds that the clock was set back by


class UnavailableError(Exception):
    """This fault cannot be injected here."""


@dataclass
class Bench:
    """A run without a fault, and what is needed to break others."""

    workplace: Workplace
    random: random.Random
    whole: Path = Path()  # the store of the run without a fault
    expected: Bits = field(default_factory=dict)
    seconds: float = 0.0  # of that run
    number: int = 0

    def begin(self) -> None:
        """Run once without a fault."""
        start_server()
        self.whole = self.workplace.folder / "without-a-fault"
        outcome = Run(self.workplace, self.whole, "without-a-fault").outcome()
        if outcome.status != "ok":
            raise BrokenPromiseError(f"the run without a fault: {outcome.status}: {outcome.message}")
        self.expected, self.seconds = bits_of(self.whole), outcome.seconds

    def inject(self, fault: Callable[[Bench, Path], None]) -> None:
        """One fault on a store of its own; raises BrokenPromiseError, or UnavailableError."""
        self.number += 1
        store = self.workplace.folder / f"store-{self.number}"
        try:
            fault(self, store)
            self.ends_well(store)
        finally:
            shutil.rmtree(store, ignore_errors=True)

    def partly(self, store: Path) -> float:
        """Fill a store with the first stages of the run without a fault; about how long the others take."""
        there = self.random.choice((0, 0, 2, 3, 4))
        if there:
            shutil.copytree(self.whole, store, symlinks=True)
            leave_out(store, ORDER[there:])
        return self.seconds * (1 - 0.1 * there)

    def start(self, store: Path, name: str = "") -> Run:
        return Run(self.workplace, store, f"{store.name}{name}")

    def kill_at_random(self, store: Path, seconds: float) -> None:
        run = self.start(store)
        run.wait(self.random.uniform(0.2, seconds))
        run.kill()
        self.refuse_raw(run.outcome())
        check_nothing_by_halves(store)

    def refuse_raw(self, outcome: Outcome, *expected: str) -> None:
        """An error has to be one that a person is meant to read, and name one of `expected`."""
        if outcome.status == "raw":
            raise BrokenPromiseError(f"not told in words: {outcome.message}")
        if outcome.status == "told" and not any(words in outcome.message for words in expected):
            raise BrokenPromiseError(f"told something else than {expected}: {outcome.message}")

    def ends_well(self, store: Path) -> None:
        """The next run makes what a run without a fault makes, and leaves nothing lying."""
        before = versions_in(store)
        outcome = self.start(store).outcome()
        if outcome.status != "ok":
            raise BrokenPromiseError(f"the next run: {outcome.status}: {outcome.message}")
        check_nothing_lost(before, store)
        check_nothing_by_halves(store)
        check_same_bits(self.expected, store)
        check_leftovers_go(store)


def killed(bench: Bench, store: Path) -> None:
    """kill -9, up to three times in a row."""
    seconds = bench.partly(store)
    for _ in range(bench.random.randint(1, 3)):
        before = versions_in(store)
        bench.kill_at_random(store, seconds)
        check_nothing_lost(before, store)


def disk_full(bench: Bench, store: Path) -> None:
    """A disk that is full after a random number of bytes."""
    needed = sum(path.stat().st_size for path in bench.whole.rglob("*") if path.is_file() and not path.is_symlink())
    with small_disk(store, size=int(bench.random.uniform(0.02, 1.1) * needed) + 65536):
        outcome = bench.start(store).outcome()
        bench.refuse_raw(outcome, "the disk is full")
        check_nothing_by_halves(store)
        remount(store, f"size={8 * needed + 2**26}")
        bench.ends_well(store)


def read_only(bench: Bench, store: Path) -> None:
    """A disk that may not be written."""
    with small_disk(store, size=2**28):
        if bench.random.random() < 0.7:
            shutil.copytree(bench.whole, store, symlinks=True, dirs_exist_ok=True)
            leave_out(store, ORDER[bench.random.randint(0, len(ORDER)) :])
        before = versions_in(store)
        remount(store, "ro")
        outcome = bench.start(store).outcome()
        if outcome.status == "ok":
            raise BrokenPromiseError("a store that cannot be written was written")
        bench.refuse_raw(outcome, "read-only")
        remount(store, "rw")
        check_nothing_lost(before, store)
        bench.ends_well(store)


def flipped_byte(bench: Bench, store: Path) -> None:
    """One byte of a file of every version, or of what points to it."""
    shutil.copytree(bench.whole, store, symlinks=True)
    for asset in ORDER:
        files = sorted(path for path in (store / "small" / asset).rglob("*") if path.is_file() and path.stat().st_size)
        kinds = sorted({_kind(path) for path in files})
        kind = bench.random.choice(kinds)
        path = bench.random.choice([path for path in files if _kind(path) == kind])
        content = bytearray(path.read_bytes())
        content[bench.random.randrange(len(content))] ^= 1 << bench.random.randrange(8)
        path.write_bytes(content)


def deleted_version(bench: Bench, store: Path) -> None:
    """A version's folder goes while a stage works, perhaps with it."""
    seconds = bench.partly(store)
    run = bench.start(store)
    run.wait(bench.random.uniform(0.2, seconds))
    there = sorted(versions_in(store))
    gone = bench.random.choice(there) if there else None
    if gone is not None:
        shutil.rmtree(gone)
    bench.refuse_raw(
        run.outcome(), "was deleted", "which is not there", "has no version", "is missing", "has no manifest"
    )
    check_nothing_by_halves(store, except_for={gone} if gone else set())


def deleted_staging(bench: Bench, store: Path) -> None:
    """What is being made goes while it is made."""
    seconds = bench.partly(store)
    run = bench.start(store)
    run.wait(bench.random.uniform(0.2, seconds))
    shutil.rmtree(store / "small" / ".staging", ignore_errors=True)
    bench.refuse_raw(run.outcome(), "was deleted while")
    check_nothing_by_halves(store)


def deleted_checkpoints(bench: Bench, store: Path) -> None:
    """Checkpoints go while a training writes them: it does without."""
    seconds = bench.partly(store)
    run = bench.start(store)
    run.wait(bench.random.uniform(0.2, seconds))
    for _ in range(20):
        shutil.rmtree(store / "small" / ".checkpoints", ignore_errors=True)
        if run.wait(0.2):
            break
    outcome = run.outcome()
    if outcome.status != "ok":
        raise BrokenPromiseError(f"a training does without checkpoints: {outcome.status}: {outcome.message}")


def broken_checkpoints(bench: Bench, store: Path) -> None:
    """A run is killed, and its checkpoints are damaged."""
    seconds = bench.partly(store)
    bench.kill_at_random(store, seconds)
    files = [path for path in (store / "small" / ".checkpoints").rglob("*") if path.is_file()]
    for path in bench.random.sample(files, k=len(files) // 2):
        content = path.read_bytes()
        path.write_bytes(bench.random.choice((b"", b"\xff garbage", content[: len(content) // 2])))


def two_at_once(bench: Bench, store: Path) -> None:
    """Two runs of one pipeline, one of them perhaps somewhat later."""
    seconds = bench.partly(store)
    first = bench.start(store, "-first")
    first.wait(bench.random.choice((0.0, bench.random.uniform(0.0, seconds))))
    second = bench.start(store, "-second")
    for run in (first, second):
        outcome = run.outcome()
        if outcome.status != "ok":
            raise BrokenPromiseError(f"two runs at once: {outcome.status}: {outcome.message}")


def clock_set_back(bench: Bench, store: Path) -> None:
    """A run was killed, and everything it wrote is from the future."""
    seconds = bench.partly(store)
    bench.kill_at_random(store, seconds)
    then = time.time() + IN_THE_FUTURE
    for path in (store, *store.rglob("*")):
        os.utime(path, (then, then), follow_symlinks=False)


def in_the_way(bench: Bench, store: Path) -> None:
    """Garbage, folders and dead links in the place of what the store wrote, and foreign files among its own."""
    bench.partly(store)
    small = store / "small"
    places = [small / name for name in (".staging", ".runs", ".checkpoints", ".set_aside")]
    places += [small / asset / name for asset in ORDER for name in ("", "current.json", "recipes")]
    places += [path for asset in ORDER for path in (small / asset).glob("recipes/*")]
    places += [version / name for version in versions_in(store) for name in ("", "manifest.json")]
    for path in bench.random.sample(sorted(places), k=4):
        if not os.path.lexists(path.parent):
            path.parent.mkdir(parents=True)
        if not path.parent.is_dir():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        put = bench.random.choice(("file", "folder", "link", "nothing"))
        if put == "file" and path.name != ".set_aside":
            path.write_bytes(b"\xff garbage")
        elif put == "folder":
            (path / "mine").mkdir(parents=True)
        elif put == "link" and path.name != ".set_aside":
            path.symlink_to("/nowhere/at/all")
    for own in (".staging", ".runs"):
        if (small / own).is_dir():
            (small / own / "notes.txt").write_text("mine")


FAULTS: tuple[Callable[[Bench, Path], None], ...] = (
    killed,
    two_at_once,
    disk_full,
    flipped_byte,
    deleted_version,
    in_the_way,
    clock_set_back,
    broken_checkpoints,
    deleted_checkpoints,
    deleted_staging,
    read_only,
)


def _kind(path: Path) -> str:
    """Files of one kind are alike: recipes, pointers, manifests, tables, weights."""
    if path.parent.name == "recipes":
        return "recipe"
    return path.name if path.suffix in ("", ".json") else path.suffix


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes at `folder`."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise UnavailableError(f"needs the right to mount a small disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)
