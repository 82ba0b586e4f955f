"""What MLflow is to be told of a run, a line each, in a file of the store: the truth until MLflow has all of it.

Whoever has something to tell appends a line and goes on; `delivery` sends the lines in order. Nothing here speaks to
MLflow, or imports it. A journal is `<store>/.mlflow/<asset>~<when>.jsonl`; the file `.sent` beside it marks how far it
was sent, and both go when MLflow has everything.

A line is an object with one of the keys `run` (always the first), `again`, `parameters`, `inputs`, `metrics`, `tags`,
`ended`.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

logger = logging.getLogger(__name__)

SYSTEM_PREFIX = "system/"  # what MLflow shows on a page of its own
_FOLDER = ".mlflow"


class Mark(BaseModel):
    """How far a journal was sent, and to which run."""

    bytes: int = 0
    asked_for_a_run: bool = False  # one may have been made although no answer came
    run_id: str | None = None
    experiment_id: str | None = None
    parent_id: str | None = None
    error: str | None = None  # of the last try, None when it went well


@dataclass(frozen=True)
class Journal:
    path: Path

    @classmethod
    def new(cls, store: Path, asset: str, run: Mapping[str, Any]) -> Journal:
        """An empty one among those of the store's pipeline; `run` is what its MLflow run is made from."""
        when = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        journal = cls(store / _FOLDER / f"{asset}~{when}-{secrets.token_hex(4)}.jsonl")
        journal.path.parent.mkdir(parents=True, exist_ok=True)
        journal.path.touch()
        journal.append({"run": {**run, "at": now()}})
        return journal

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def asset(self) -> str:
        return self.path.name.partition("~")[0]

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line, in one piece. Raises OSError when it cannot be written; half a line is never read."""
        line = json.dumps(entry, default=str).encode() + b"\n"
        # Closed after each line: only then do other machines see it on a network file system.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # whoever wrote before was killed, or met a full disk
            if os.write(descriptor, line) < len(line):
                raise OSError(f"{self.path} takes no whole line, its disk is full")
        finally:
            os.close(descriptor)

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole lines after byte `start`, each with the byte after it; torn ones are passed over."""
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                if not line.endswith(b"\n"):
                    return
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    logger.warning("%s has a torn line before byte %d: its writer was stopped", self.path, start)
                    continue
                yield entry, start

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def ended(self) -> dict[str, Any] | None:
        """The last line, where it is the run's final status: nobody is at work on it then."""
        if not self.path.exists():
            return None
        last = None
        for entry, _ in self.read():
            last = entry
        return last if last is not None and "ended" in last else None

    @property
    def mark(self) -> Mark:
        try:
            return Mark.model_validate_json(self._mark_file.read_bytes())
        except (FileNotFoundError, ValueError):  # sent again from the start: MLflow keeps equal figures once
            return Mark()

    def set_mark(self, mark: Mark) -> None:
        whole = self._mark_file.with_suffix(".sent~")
        whole.write_text(mark.model_dump_json())
        whole.replace(self._mark_file)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._mark_file.unlink(missing_ok=True)

    @property
    def _mark_file(self) -> Path:
        return self.path.with_suffix(".sent")


@dataclass(frozen=True)
class Waiting:
    """What of a journal MLflow does not have yet."""

    journal: Journal
    metrics: int
    others: int  # the run itself, parameters, inputs, the final status
    error: str | None  # of the last try to send it

    @property
    def sentence(self) -> str:
        told = [f"{self.metrics} metrics"] if self.metrics else []
        told += [f"{self.others} other lines"] if self.others else []
        because = f", because: {self.error}" if self.error else ""
        return f"{' and '.join(told)} of {self.journal.asset} wait in {self.journal.path}{because}"


def told_where(left: Sequence[Waiting], pipeline: str) -> str:
    """What waits, and how it gets to MLflow."""
    waits = "; ".join(one.sentence for one in left)
    return f"{waits}. The next run of the pipeline sends them, or `embed-pipeline replay-metrics {pipeline}`"


def journals(store: Path) -> list[Journal]:
    """Those of the store's pipeline, oldest first."""
    found = (Journal(path) for path in (store / _FOLDER).glob("*~*.jsonl"))
    return sorted(found, key=lambda journal: journal.name.partition("~")[2])


def waiting(store: Path, asset: str | None = None) -> list[Waiting]:
    """What MLflow was not told yet of the runs of a pipeline, or of one of its assets."""
    of = [journal for journal in journals(store) if asset in (None, journal.asset)]
    return [left for journal in of if (left := waiting_in(journal)) is not None]


def waiting_in(journal: Journal) -> Waiting | None:
    metrics = others = 0
    mark = journal.mark
    try:
        for entry, _ in journal.read(mark.bytes):
            metrics += len(entry.get("metrics", ()))
            others += "metrics" not in entry
    except FileNotFoundError:  # all of it was sent just now
        return None
    return Waiting(journal, metrics, others, mark.error) if metrics or others else None


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
