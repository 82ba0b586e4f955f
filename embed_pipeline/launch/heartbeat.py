"""A sign of life in a file on shared storage, for processes on different machines, which no kernel ties together."""

from __future__ import annotations

import time
from pathlib import Path

HEARTBEAT_VARIABLE = "EMBED_PIPELINE_HEARTBEAT"  # names the file to a process that ends when it falls silent
BEAT_SECONDS = 5.0
# Longer than a network file system keeps what it read, and than a machine under load may stall.
SILENCE_SECONDS = 120.0


class Heart:
    """Beats when it is asked to, at most every BEAT_SECONDS."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.last: float | None = None

    def beat(self) -> None:
        """A file system that refuses is silence like any other: it must not end what works."""
        now = time.monotonic()
        if self.last is not None and now - self.last < BEAT_SECONDS:
            return
        self.last, self.count = now, self.count + 1
        try:
            self.path.write_text(str(self.count))
        except OSError:
            return


class Listener:
    """Tells when a heart has been silent for too long. Compares counts, so clocks need not agree."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, SILENCE_SECONDS
        self.heard = ""
        self.at = time.monotonic()

    def silent(self) -> bool:
        try:
            heard = self.path.read_text()
        except OSError:
            heard = self.heard
        if heard and heard != self.heard:
            self.heard, self.at = heard, time.monotonic()
        return time.monotonic() - self.at > self.seconds
