"""Runs a training command on this machine: to its end, or to the end of whoever asked for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from embed_pipeline import errors
from embed_pipeline.errors import TrainingError

TERMINATE_SECONDS = 15.0  # more than torchrun's own --shutdown-timeout, so that it can end its workers itself


def run_local(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    error_file: Path,
    on_poll: Callable[[], None] = lambda: None,
    poll_seconds: float = 0.5,
) -> None:
    """Run a torchrun command to its end; its output goes where this process's output goes.

    `env` is added to this process's environment. `on_poll` is called every `poll_seconds` while it runs. Whatever is
    raised here meanwhile (an interrupt, a failing `on_poll`) ends torchrun and all its workers and is raised again.
    When this process is killed outright, the kernel ends them (on Linux).

    Raises TrainingError with the first failing rank's cause, as torchrun leaves it in `error_file`.
    """
    error_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "embed_pipeline.launch.parent_death", *command],
        env={**os.environ, **env, "TORCHELASTIC_ERROR_FILE": str(error_file)},
        start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we end torchrun in order
    )
    try:
        while process.poll() is None:
            on_poll()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(poll_seconds)
    except BaseException:
        stop(process)
        raise
    if process.returncode != 0:
        raise TrainingError(failure_cause(error_file, process.returncode))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun by SIGTERM, which ends its workers; kill what is left of the tree after TERMINATE_SECONDS."""
    try:
        # Taken before it ends: orphans are no longer its children, and each worker has a session of its own.
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    process.terminate()
    try:
        deadline = time.monotonic() + TERMINATE_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def failure_cause(error_file: Path, return_code: int) -> str:
    """What ended a training, for a person: the failing rank's exception, or what its exit code means."""
    message, traceback = _recorded_error(error_file)
    if message is None:
        return f"the training ended {meaning_of(return_code)}, and no rank left an error; its log is above"
    kind, _, text = message.partition(": ")
    if isinstance(getattr(errors, kind, None), type):
        return text  # written for the user: the message says it all
    return f"the training failed with {message}\n\n{traceback}" if traceback else f"the training failed: {message}"


def _recorded_error(error_file: Path) -> tuple[str | None, str]:
    """(exception, traceback) as torch.distributed.elastic's `record` writes them, (None, "") when it did not."""
    try:
        recorded = json.loads(error_file.read_text())["message"]
    except (OSError, ValueError, KeyError, TypeError):
        # Not there, or cut short with the rank that wrote it: the exit code is what is left to tell.
        return None, ""
    if isinstance(recorded, dict):
        return recorded.get("message"), recorded.get("extraInfo", {}).get("py_callstack", "")
    return recorded, ""


def meaning_of(return_code: int) -> str:
    """An exit code (negative: a signal, as subprocess has it) in words that go on after "ended"."""
    if return_code == -signal.SIGKILL:
        return "by SIGKILL: killed, probably because the machine ran out of memory"
    if return_code < 0:
        return f"by {signal.Signals(-return_code).name}"
    return f"with exit code {return_code}"
