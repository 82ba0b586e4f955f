"""Runs the command that launches a job, on this machine: to its end, or to the end of whoever asked for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
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
from embed_pipeline.launch.environment import job_environment

# What ends a training that did nothing wrong: it was preempted, others took the memory, a connection was lost.
PASSING_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
PASSING_ERRORS = ("ConnectionError", "ConnectionResetError", "TimeoutError", "DistNetworkError", "SignalException")
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
# More than torchrun's own --shutdown-timeout, so that it can end its workers itself; what is left is gone KILL_SECONDS
# later. With what a tracked run then takes (`tracking.runs`) a cancel is over within 15 seconds, with time to spare.
TERMINATE_SECONDS = 7.0
KILL_SECONDS = 2.0
_MARK_VARIABLE = "EMBED_PIPELINE_LAUNCH"  # every process of a job inherits it, whatever session or parent it has
# What a process says whose peer is gone: true, but not the cause.
_VICTIM = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|closed by peer|DistNetworkError|DistStoreError|DistBackendError|"
    r"NCCL|[Gg]loo|SignalException|RendezvousConnectionError"
)
# gloo's, a store's and NCCL's words for a process that did not come.
_GAVE_UP = re.compile(r"(?:Timed out waiting |[Ww]ait timeout after |Timeout\(ms\)=)(\d+)(?:ms)?")
LAST_WORDS = 20_000  # characters


def run_local(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    error_file: Path,
    on_poll: Callable[[], None] = lambda: None,
    poll_seconds: float = 0.5,
) -> None:
    """Run a launch command to its end; its output goes where this process's output goes.

    Of this process's environment the command is given what jobs are (see `launch.environment`), and over it `env`.
    `on_poll` is called every `poll_seconds` while it runs. Whatever is raised here meanwhile (an interrupt, a failing
    `on_poll`) ends torchrun and all its workers and is raised again. When this process is killed outright, the kernel
    ends them (on Linux).

    Raises TrainingError with the first failing rank's cause, as torchrun leaves it in `error_file` (and other nodes in
    files beside it whose names begin like it); it is `passing` where trying again may help.
    """
    for left in _error_files(error_file):
        left.unlink()
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "embed_pipeline.launch.parent_death", *command],
        env=job_environment({**env, ERROR_FILE_VARIABLE: str(error_file), _MARK_VARIABLE: mark}),
        start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we end torchrun in order
    )
    try:
        while process.poll() is None:
            on_poll()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(poll_seconds)
    except BaseException:
        process.terminate()  # torchrun, which ends its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATE_SECONDS)
        raise
    finally:
        if process.poll() is None:
            process.kill()
        _kill_all(mark)
        process.wait()
    if process.returncode != 0:
        raise training_error(error_file, process.returncode)


def _kill_all(mark: str) -> None:
    """End what is left of a job: workers have sessions of their own, and what they started may have lost its parent."""
    deadline = time.monotonic() + KILL_SECONDS
    while (left := _processes_of(mark)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=0.2)


def _processes_of(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or another user's
            if process.environ().get(_MARK_VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def training_error(error_file: Path, return_code: int) -> TrainingError:
    """What ended a job, for a person: the failing rank's exception, or what the exit code means."""
    recorded = _recorded_error(error_file)
    if recorded is None:
        return TrainingError(
            f"the job ended {meaning_of(return_code)}, and no rank left an error; its log is above"
            f"{_advice(return_code)}",
            passing=-return_code in PASSING_SIGNALS,
        )
    waited = minutes_waited(recorded.message)
    if recorded.exit_code == -signal.SIGABRT:  # how NCCL's watchdog ends a process that waits in vain
        waited = minutes_waited(_last_words(error_file.with_name("logs")))
    if waited is not None:
        return TrainingError(
            f"a process did not take part in an exchange within {waited:g} minutes (collective_timeout_minutes), so it "
            "hangs, or does something that takes longer. The last lines of each process, in `logs` beside the job "
            "file, tell which. If it was rank 0, measuring on dev or encoding with a teacher, raise "
            "collective_timeout_minutes; over several machines, look at the network between them",
            passing=True,
        )
    kind, _, text = recorded.message.partition(": ")
    if isinstance(getattr(errors, kind, None), type):
        return TrainingError(text)  # written for the user: the message says it all
    passing = -recorded.exit_code in PASSING_SIGNALS or kind in PASSING_ERRORS or recorded.is_victim
    if recorded.traceback:
        return TrainingError(f"the job failed with {recorded.message}\n\n{recorded.traceback}", passing=passing)
    return TrainingError(f"the job failed: {recorded.message}{_advice(recorded.exit_code)}", passing=passing)


def minutes_waited(message: str) -> float | None:
    """How long a process waited for another before it gave up, if that is what its error says (gloo, NCCL, a store)."""
    found = _GAVE_UP.search(message)
    return float(found.group(1)) / 60_000 if found else None


def _last_words(logs: Path) -> str:
    """The ends of what the processes of the newest launch wrote to stderr, as torchrun keeps it."""
    launches = sorted((path for path in logs.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    files = sorted(launches[-1].rglob("stderr.log")) if launches else []
    return "\n".join(file.read_text(errors="replace")[-LAST_WORDS:] for file in files)


@dataclass(frozen=True)
class _Recorded:
    """A rank's error: as torch.distributed.elastic's `record` writes it, or what `agent` says of a killed one."""

    message: str
    traceback: str = ""
    exit_code: int = 0  # negative: the signal that ended the rank
    timestamp: int = 0  # seconds

    @property
    def is_victim(self) -> bool:
        return not self.exit_code and _VICTIM.search(self.message) is not None


def _error_files(error_file: Path) -> list[Path]:
    return sorted(error_file.parent.glob(f"{error_file.stem}*{error_file.suffix}"))


def _recorded_error(error_file: Path) -> _Recorded | None:
    """The cause among what the nodes left: no victim's if there is another, then the first."""
    found = [recorded for path in _error_files(error_file) if (recorded := _read_error(path)) is not None]
    return min(found, key=lambda recorded: (recorded.is_victim, recorded.timestamp), default=None)


def leave_error(message: str, exit_code: int) -> None:
    """Leave the cause where the launching process looks for it; `exit_code` is negative for a signal."""
    Path(os.environ[ERROR_FILE_VARIABLE]).write_text(json.dumps({"message": message, "exit_code": exit_code}))


def _read_error(path: Path) -> _Recorded | None:
    try:
        recorded = json.loads(path.read_text())
        message = recorded["message"]
        if isinstance(message, dict):
            told = message.get("extraInfo", {})
            return _Recorded(message["message"], told.get("py_callstack", ""), timestamp=int(told.get("timestamp", 0)))
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
