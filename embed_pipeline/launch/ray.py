"""A job on a Ray cluster: `python -m embed_pipeline.launch.ray SUBMISSION` submits torchrun, follows, stops it.

As with Slurm, this process stands for the job: ending it stops the job, and the kernel ends it with whoever launched
it. The store has to be on storage that the cluster shares, and this Python at the same path on its nodes.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from embed_pipeline.launch.heartbeat import HEARTBEAT_VARIABLE, Heart
from embed_pipeline.launch.local import ERROR_FILE_VARIABLE, leave_error
from embed_pipeline.launch.torchrun import PYTHON, torchrun_command
from embed_pipeline.masking import without_password
from embed_pipeline.settings import LaunchSettings

SUBMISSION_FILE = "ray.json"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # in Ray's own order
_POLL_SECONDS = 2.0


def cluster_address() -> dict[str, str]:
    """The address of a cluster in Ray's own variables, by the variable's name: it may hold a password."""
    return {name: address for name in ADDRESS_VARIABLES if (address := os.environ.get(name))}


def ray_command(
    entry_point: str, job_file: Path, processes: int, launch: LaunchSettings, environment: Iterable[str]
) -> list[str]:
    """The command that does a job on one node of the cluster; what is submitted is written beside the job file.

    `environment` names the variables that go with it: their values, perhaps with passwords, are not written.
    """
    submission = job_file.with_name(SUBMISSION_FILE)
    command = torchrun_command(entry_point, job_file.absolute(), processes, max_restarts=launch.max_restarts)
    told = {
        "address": launch.address,
        "entrypoint": shlex.join(command),
        "gpus": launch.gpus_per_node or 0,
        "environment": sorted(environment),
    }
    submission.write_text(json.dumps(told, indent=2) + "\n")
    return [*PYTHON, "embed_pipeline.launch.ray", str(submission.absolute())]


def main(submission: Path) -> int:
    """Submit, show the job's log while it runs, and return 0 when it succeeded. SIGTERM stops it."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    told, heart = json.loads(submission.read_text()), Heart(submission.with_name("heartbeat"))
    heart.beat()
    if told["address"] is not None:  # else Ray would prefer the environment's to what the YAML says
        for name in ADDRESS_VARIABLES:
            os.environ.pop(name, None)
    try:
        client = JobSubmissionClient(told["address"])
        job = client.submit_job(
            entrypoint=told["entrypoint"],
            entrypoint_num_gpus=told["gpus"] or None,
            runtime_env={
                "env_vars": {
                    **{name: os.environ[name] for name in told["environment"] if name in os.environ},
                    HEARTBEAT_VARIABLE: str(heart.path),
                    ERROR_FILE_VARIABLE: str(submission.with_name("error-node.json")),
                }
            },
        )
    except (ConnectionError, RuntimeError) as error:
        where = told["address"] or next(iter(cluster_address().values()))
        reason = without_password(f"ConnectionError: no Ray cluster took the job at {where}: {error}")
        leave_error(reason, -signal.SIGTERM)
        return 1
    print(f"Ray job {job} is submitted", flush=True)
    shown, status = 0, None
    try:
        while status is None or not status.is_terminal():
            time.sleep(_POLL_SECONDS)
            heart.beat()
            status = client.get_job_status(job)
            log = client.get_job_logs(job)
            print(log[shown:], end="", flush=True)
            shown = len(log)
    except BaseException:
        client.stop_job(job)
        raise
    heart.path.unlink(missing_ok=True)
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        leave_error(f"TrainingError: Ray job {job} was stopped by somebody else", 0)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
