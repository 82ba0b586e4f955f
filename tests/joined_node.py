"""`embed-pipeline join`, as a service of another machine would run it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def joined(store: Path, log: Path, *before: str, pipeline: str = "shop") -> Iterator[psutil.Popen]:
    """A node for the jobs of a pipeline; `before` is what its command line begins with."""
    command = [*before, str(Path(sys.executable).with_name("embed-pipeline")), "join", pipeline]
    with log.open("a") as file:
        process = psutil.Popen(
            command, env={**os.environ, "EMBED_PIPELINE_STORE": str(store)}, stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        process.wait(30)
