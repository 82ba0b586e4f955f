"""A job on this machine, as every caller starts it: Dagster, a notebook, a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from embed_pipeline.launch.job import Job
from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.torchrun import torchrun_command
from embed_pipeline.tracking.runs import TrackedRun


def launch_training(
    job: Job,
    job_file: Path,
    tracked: TrackedRun | None = None,
    *,
    env: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `job`, written at `job_file`, to its end; rank 0 joins the MLflow run `tracked`, and no run without it.

    Raises TrainingError with the first failing rank's cause.
    """
    run_local(
        torchrun_command(job.entry_point, job_file, job.world_size),
        # An MLflow run of the user's own, named in our environment, is none of the training's business.
        env={"MLFLOW_RUN_ID": "", **(env or {}), **(tracked.environment if tracked else {})},
        error_file=job_file.with_name("error.json"),
        on_poll=on_poll,
    )
