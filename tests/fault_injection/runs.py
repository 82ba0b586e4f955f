"""The whole of a tiny pipeline in a process of its own, which can be killed at any moment.

The process is forked from a server that has imported everything, so that a run takes seconds.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal

# Imported for the forked processes, which then need not.
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import sentence_transformers  # noqa: F401
import torch

import embed_pipeline.evaluation.evaluate
import embed_pipeline.mining.mine
import embed_pipeline.training.checkpoints
import embed_pipeline.training.embedder
import embed_pipeline.training.reranker  # noqa: F401
from embed_pipeline import stages
from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.errors import UserError
from embed_pipeline.launch.job import Job, Site, launch_job
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.tracking.runs import TrackedRun
from tests.orchestration.conftest import settings_of

ORDER = ("raw_pairs", "cleaned_pairs", "hard_negatives", "embedder", "reranker", "evaluation")
SECONDS = 600.0  # a run that takes longer hangs

Status = Literal["ok", "told", "raw", "killed"]


@dataclass(frozen=True)
class Workplace:
    """Where the faults happen: `defs/small` with the raw rows, the base model, MLflow's empty tables."""

    folder: Path
    model: Path
    torchrun: bool = False  # trainings as they are launched in earnest; else in the process of the run

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def pipeline(self, store: Path, run: str | None = None) -> stages.Pipeline:
        told: dict[str, Any] = settings_of(self.model)
        for kind in ("embedder", "reranker"):
            told[kind] |= {"checkpoint_minutes": 0, "max_steps": 6, "preflight": False}
        told["tracking"] = {"system_metrics": False, "log_model": False}
        settings = PipelineSettings.model_validate(told)
        return stages.Pipeline(settings, self.folder / "defs" / "small", PipelineStore(store, "small", run), run)


@dataclass(frozen=True)
class Outcome:
    status: Status
    message: str = ""
    seconds: float = 0.0


class Run:
    """A run of all stages by a process of its own."""

    def __init__(self, workplace: Workplace, store: Path, name: str) -> None:
        self.outcome_file = workplace.folder / f"{name}.outcome.json"
        self.log = workplace.folder / f"{name}.log"
        self.outcome_file.unlink(missing_ok=True)
        self.process = _server().Process(target=_all_stages, args=(workplace, store, name, self.outcome_file, self.log))
        self.began = time.monotonic()
        self.process.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, or so many seconds; whether it has ended."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL to the process and all that it started."""
        if self.process.exitcode is None and self.process.pid is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet, or it has just ended
                self.process.kill()
        self.process.join()

    def outcome(self) -> Outcome:
        if not self.wait(SECONDS):
            self.kill()
            return Outcome("raw", f"it hung for {SECONDS:.0f} s: {self.log.read_text()[-3000:]}")
        seconds = time.monotonic() - self.began
        if not self.outcome_file.is_file():
            killed = self.process.exitcode == -signal.SIGKILL
            told = "" if killed else f"exit code {self.process.exitcode}: {self.log.read_text()[-3000:]}"
            return Outcome("killed" if killed else "raw", told, seconds)
        return Outcome(**json.loads(self.outcome_file.read_text()), seconds=seconds)


def start_server() -> None:
    """Start what processes are forked from, which imports everything: once, and not while a run is timed."""
    process = _server().Process(target=_nothing)
    process.start()
    process.join()


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _nothing() -> None:
    pass


def _all_stages(workplace: Workplace, store: Path, name: str, outcome_file: Path, log: Path) -> None:
    os.setsid()
    for number, stream in enumerate(("w", "a"), start=1):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if stream == "w" else os.O_APPEND))
        os.dup2(descriptor, number)
    home = workplace.folder / f"{name}.home"
    if not home.is_dir():
        home.mkdir()
        shutil.copy2(workplace.home / "mlflow.db", home / "mlflow.db")
    os.environ |= {"DAGSTER_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    outcome = {"status": "ok", "message": ""}
    try:
        pipeline = workplace.pipeline(store, name)
        launch = launch_job if workplace.torchrun else _here
        for asset in ORDER:
            logging.info("stage %s", asset)
            make = getattr(stages, f"make_{asset}")
            make(pipeline) if asset in ("raw_pairs", "cleaned_pairs") else make(pipeline, launch)
    except UserError as error:
        outcome = {"status": "told", "message": str(error)}
    except BaseException:
        outcome = {"status": "raw", "message": traceback.format_exc()}
    partial = outcome_file.with_suffix(".partial")
    partial.write_text(json.dumps(outcome))
    partial.replace(outcome_file)
    os._exit(0)


def _here(job: Job, job_file: Path, tracked: TrackedRun | None, site: Site) -> None:
    """Train in this process, on one thread: the same bits in every run."""
    from embed_pipeline.launch import rank

    rank._usable_cores = lambda: 1
    importlib.import_module(job.entry_point).main(job_file)


def leave_out(store: Path, assets: Sequence[str]) -> None:
    """Delete what was made of some assets, as if they were still to come."""
    for asset in assets:
        shutil.rmtree(store / "small" / asset, ignore_errors=True)
