"""A job in the place where its pipeline's jobs run, as every caller starts it: Dagster, a notebook, a benchmark."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.launch.environment import NAMED_VARIABLE, problem_with
from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.nodes import lead
from embed_pipeline.launch.ray import cluster_address, ray_command
from embed_pipeline.launch.slurm import slurm_command
from embed_pipeline.launch.torchrun import torchrun_command
from embed_pipeline.model_files import CHECKPOINTS_FOLDER
from embed_pipeline.settings import LaunchSettings
from embed_pipeline.tracking.runs import TrackedRun


class Job(Protocol):
    """What whoever launches a job needs to know of it; the rest is for its entry point."""

    @property
    def entry_point(self) -> str:
        """The module that torchrun runs, with the job's file as its only argument."""

    @property
    def world_size(self) -> int:
        """Processes that must take part."""


@dataclass(frozen=True)
class Site:
    """Where jobs run, and the folder in which other machines look for them."""

    settings: LaunchSettings
    announcements: Path


def check_site(launch: LaunchSettings) -> None:
    """Raises ConfigurationError naming what has to be installed to launch jobs there, or a variable they may not be
    given."""
    if problem := problem_with(launch.environment):
        raise ConfigurationError(f"launch.environment: {problem}")
    if launch.kind == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigurationError(
            "launch.kind ray needs the package ray, which this environment does not have. Install it: pip install "
            "--constraint constraints.txt --editable '.[ray]'"
        )
    if launch.kind == "ray" and launch.address is None and not cluster_address():
        raise ConfigurationError(
            "launch.kind ray needs `address`, of the cluster's dashboard, e.g. http://head:8265, or the environment "
            "variable RAY_ADDRESS"
        )


def launch_job(
    job: Job,
    job_file: Path,
    tracked: TrackedRun | None = None,
    site: Site | None = None,
    *,
    env: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `job`, written at `job_file`, to its end, on this machine without a `site`.

    Rank 0 joins the MLflow run `tracked`, and no run without it.

    Raises TrainingError with the first failing rank's cause.
    """
    launch, error_file = site.settings if site else LaunchSettings(), job_file.with_name("error.json")
    env = {**(env or {}), **(tracked.environment if tracked else {})}
    if launch.environment:
        env[NAMED_VARIABLE] = ",".join(launch.environment)
    if site is not None and launch.kind == "nodes":
        lead(site.announcements, job.entry_point, job_file, job.world_size, launch, env=env, on_poll=on_poll)
        return
    if launch.kind == "slurm":
        checkpoints = job_file.with_name(CHECKPOINTS_FOLDER)
        command = slurm_command(job.entry_point, job_file, job.world_size, launch, checkpoints)
    elif launch.kind == "ray":
        command = ray_command(job.entry_point, job_file, job.world_size, launch, [*env, *launch.environment])
    else:
        command = torchrun_command(job.entry_point, job_file, job.world_size, max_restarts=launch.max_restarts)
    run_local(command, env=env, error_file=error_file, on_poll=on_poll)
