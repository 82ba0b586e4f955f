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
from dataclasses import dataclass
from pathlib import Path

import psutil

from embed_pipeline import errors
from embed_pipeline.errors import TrainingError

# What ends a training that did nothing wrong: it was preempted, others took the memory, a connection was lost.
PASSING_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
PASSING_ERRORS = ("ConnectionError", "ConnectionResetError", "TimeoutError", "DistNetworkError", "SignalException")
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

    Raises TrainingError with the first failing rank's cause, as torchrun leaves it in `error_file`; it is `passing`
    where trying again may help.
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
        raise training_error(error_file, process.returncode)


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


def training_error(error_file: Path, return_code: int) -> TrainingError:
    """What ended a training, for a person: the failing rank's exception, or what its exit code means."""
    recorded = _recorded_error(error_file)
    if recorded is None:
        return TrainingError(
            f"the training ended {meaning_of(return_code)}, and no rank left an error; its log is above"
            f"{_advice(return_code)}",
            passing=-return_code in PASSING_SIGNALS,
        )
    kind, _, text = recorded.message.partition(": ")
    if isinstance(getattr(errors, kind, None), type):
        return TrainingError(text)  # written for the user: the message says it all
    passing = -recorded.exit_code in PASSING_SIGNALS or kind in PASSING_ERRORS
    if recorded.traceback:
        return TrainingError(f"the training failed with {recorded.message}\n\n{recorded.traceback}", passing=passing)
    return TrainingError(f"the training failed: {recorded.message}{_advice(recorded.exit_code)}", passing=passing)


@dataclass(frozen=True)
class _Recorded:
    """A rank's error: as torch.distributed.elastic's `record` writes it, or what `agent` says of a killed one."""

    message: str
    traceback: str = ""
    exit_code: int = 0  # negative: the signal that ended the rank


def _recorded_error(error_file: Path) -> _Recorded | None:
    try:
        recorded = json.loads(error_file.read_text())
        message = recorded["message"]
        if isinstance(message, dict):
            return _Recorded(message["message"], message.get("extraInfo", {}).get("py_callstack", ""))
        return _Recorded(message, exit_code=recorded.get("exit_code", 0))
    except (OSError, ValueError, KeyError, TypeError):
        # Not there, or cut short with the rank that wrote it: the exit code is what is left to tell.
        return None


def _advice(return_code: int) -> str:
    if return_code != -signal.SIGKILL:
        return ""
    return (
        ". If memory was short: lower batch_size, set gradient_checkpointing: true, or free some; the log's line "
        "`preflight` says how much was expected. Started again, it goes on from its last checkpoint"
    )


def meaning_of(return_code: int) -> str:
    """An exit code (negative: a signal, as subprocess has it) in words that go on after "ended"."""
    if return_code == -signal.SIGKILL:
        return "by SIGKILL: killed, probably because the machine ran out of memory"
    if return_code < 0:
        return f"by {signal.Signals(-return_code).name}"
    return f"with exit code {return_code}"
