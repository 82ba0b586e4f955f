"""A job in an allocation of a Slurm cluster: `python -m embed_pipeline.launch.slurm SCRIPT` submits, follows, cancels.

This process stands for the allocation: ending it cancels the job, and the kernel ends it with whoever launched it, so
nothing is left on the cluster. The store has to be on storage that the nodes share, and this Python (its virtual
environment) at the same path on them.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from embed_pipeline.launch.heartbeat import HEARTBEAT_VARIABLE, Heart
from embed_pipeline.launch.local import ERROR_FILE_VARIABLE, leave_error
from embed_pipeline.launch.torchrun import ONE_NODE, PYTHON, SHUTDOWN_SECONDS, Rendezvous, torchrun_command
from embed_pipeline.settings import LaunchSettings

SCRIPT_FILE = "job.sbatch"
LOG_FILE = "slurm.log"
HEART_FILE = "heartbeat"
RENDEZVOUS_FOLDER = "rendezvous"  # where the nodes meet; followed by the job's id, and how often it was requeued
WAIT_SECONDS = 600  # for all nodes of an allocation, which Slurm starts together, to load torch
_POLL_SECONDS = 2.0
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
# What Slurm itself does to a job that did nothing wrong; said by the state, and whether trying again may help.
_BY_SLURM = {
    "TIMEOUT": "the allocation reached its time limit. Launched again, the training goes on from its last checkpoint; "
    "raise launch.sbatch's `time` to have it in one go",
    "PREEMPTED": "the allocation was preempted and may not be requeued",
    "NODE_FAIL": "a node of the allocation failed",
    "BOOT_FAIL": "a node of the allocation did not start",
    "DEADLINE": "the allocation reached its deadline",
}


def slurm_command(
    entry_point: str, job_file: Path, processes: int, launch: LaunchSettings, checkpoints: Path
) -> list[str]:
    """The command that does a job in an allocation; its script is written beside the job file.

    A job of the same name that a launching machine left behind is cancelled first: two may not write `checkpoints`.
    """
    folder = job_file.parent.absolute()
    name = f"embed_pipeline-{hashlib.sha256(str(checkpoints.resolve()).encode()).hexdigest()[:12]}"
    script = folder / SCRIPT_FILE
    script.write_text(sbatch_script(entry_point, job_file.absolute(), processes, launch, name))
    return [*PYTHON, "embed_pipeline.launch.slurm", str(script)]


def sbatch_script(entry_point: str, job_file: Path, processes: int, launch: LaunchSettings, name: str) -> str:
    """The batch script: on the first node it starts itself on every node, by srun; there it becomes torchrun's agent.

    A requeued job begins with a rendezvous of its own, and forgets the errors of the time before.
    """
    folder = job_file.parent
    options: dict[str, str | int] = {
        "job-name": name,
        "nodes": launch.nnodes,
        "ntasks-per-node": 1,
        "output": str(folder / LOG_FILE),
        "open-mode": "append",
        "requeue": "",
        **({"gpus-per-node": launch.gpus_per_node} if launch.gpus_per_node else {}),
        **{key.lstrip("-"): value for key, value in launch.sbatch.items()},
    }
    asked = "\n".join(
        f"#SBATCH --{key}" + (f"={shlex.quote(str(value))}" if value != "" else "") for key, value in options.items()
    )
    here = shlex.quote(str(folder))
    meeting = f"{here}/{RENDEZVOUS_FOLDER}-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
    rendezvous = ONE_NODE
    if launch.nnodes > 1:
        assert launch.network is not None
        # The shell fills in what it knows.
        several = Rendezvous("slurm", "MEETING", launch.nnodes, launch.network, WAIT_SECONDS)
        rendezvous = several.options("NODE_RANK")
    command = shlex.join(
        torchrun_command(
            entry_point,
            job_file,
            processes // launch.nnodes,
            max_restarts=launch.max_restarts,
            rendezvous=rendezvous,
        )
    )
    command = command.replace("rank=NODE_RANK", "rank=$SLURM_NODEID").replace("endpoint=MEETING", f"endpoint={meeting}")
    return f"""#!/bin/bash
{asked}
if [ "${{1:-}}" = node ]; then
  export {ERROR_FILE_VARIABLE}={here}/error-node-$SLURM_NODEID.json
  exec {command}
fi
{launch.setup}
rm -f {here}/error*.json
mkdir -m 700 {meeting}
exec srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash {here}/{SCRIPT_FILE} node
"""


# ----------------------------------------------------------------------------------------------- following


def main(script: Path) -> int:
    """Submit `script`, show its log while it runs, and return 0 when it completed. SIGTERM cancels it.

    What Slurm itself did to the job is left where torchrun would leave a rank's error.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder, heart = script.parent, Heart(script.with_name(HEART_FILE))
    heart.beat()
    environment = {**os.environ, HEARTBEAT_VARIABLE: str(heart.path)}
    if shutil.which("sbatch") is None:
        leave_error("TrainingError: launch.kind is slurm, but there is no `sbatch` on this machine's PATH", 0)
        return 1
    _cancel_left_behind(script)
    submitted = subprocess.run(
        ["sbatch", "--parsable", "--export=ALL", str(script)], capture_output=True, text=True, env=environment
    )
    if submitted.returncode != 0:
        told = "; ".join(line.removeprefix("sbatch: error: ") for line in submitted.stderr.splitlines())
        leave_error(f"TrainingError: sbatch refused the job: {told}. See launch.sbatch", 0)
        return 1
    job = submitted.stdout.strip().partition(";")[0]
    print(f"Slurm job {job} is submitted", flush=True)
    try:
        state = _follow(job, folder / LOG_FILE, heart)
    except BaseException:
        _cancel(job)
        raise
    finally:
        for left in folder.glob(f"{RENDEZVOUS_FOLDER}-*"):
            shutil.rmtree(left, ignore_errors=True)
    heart.path.unlink(missing_ok=True)
    if state == "COMPLETED":
        return 0
    if state in _BY_SLURM:
        leave_error(f"Slurm job {job}: {_BY_SLURM[state]}", -signal.SIGTERM)
    elif state == "CANCELLED":
        leave_error(f"TrainingError: Slurm job {job} was cancelled by somebody else", 0)
    elif state == "OUT_OF_MEMORY":
        leave_error(
            f"TrainingError: Slurm job {job} ran out of memory. Ask for more under launch.sbatch (mem: 64G), or lower "
            "batch_size",
            0,
        )
    return 1


def _follow(job: str, log: Path, heart: Heart) -> str:
    """Show what is added to `log` until the job is over; returns its last state."""
    shown, before = 0, ""
    while True:
        state, reason = _state(job)
        heart.beat()
        if log.is_file():
            with log.open("rb") as file:
                file.seek(shown)
                new = file.read()
            shown += len(new)
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        if state != before:
            waits = f" ({reason})" if state == "PENDING" and reason else ""
            print(f"Slurm job {job} is {state}{waits}", flush=True)
            before = state
        if state in _OVER:
            return state
        time.sleep(_POLL_SECONDS)


def _state(job: str) -> tuple[str, str]:
    """A job's state and reason. One that Slurm has forgotten has ended; a controller that does not answer is waited
    for."""
    asked = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    if asked.returncode != 0:
        return ("FAILED", "") if "Invalid job id" in asked.stderr else ("UNKNOWN", "")
    told = dict(word.partition("=")[::2] for word in asked.stdout.split())
    return told.get("JobState", "UNKNOWN"), told.get("Reason", "").replace("None", "")


def _cancel(job: str) -> None:
    """Cancel, and kill what does not end by itself."""
    with contextlib.suppress(OSError):
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        subprocess.run(["scancel", job], capture_output=True)
        while time.monotonic() < deadline:
            if _state(job)[0] in _OVER:
                return
            time.sleep(0.2)
        subprocess.run(["scancel", "--full", "--signal=KILL", job], capture_output=True)


def _cancel_left_behind(script: Path) -> None:
    name = next(line for line in script.read_text().splitlines() if line.startswith("#SBATCH --job-name="))
    subprocess.run(["scancel", f"--user={getpass.getuser()}", f"--name={name.partition('=')[2]}"], capture_output=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
