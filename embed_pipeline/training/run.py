"""A training from the prepared trainer to the weights that are kept; the same for both model kinds and engines."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import Trainer

from embed_pipeline.errors import TrainingError
from embed_pipeline.evaluation.evaluators import Figures
from embed_pipeline.model_files import CHECKPOINTS_FOLDER
from embed_pipeline.training.callbacks import DevEvaluation, FiniteLoss, MovingLoss, Reporting
from embed_pipeline.training.checkpoints import Checkpoints, remove_checkpoints
from embed_pipeline.training.collapse import collapsed
from embed_pipeline.training.data_checks import DataReport, check_data
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.forecast import less_memory
from embed_pipeline.training.hardware import in_force
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.modules import merge_adapters
from embed_pipeline.training.output import Summary
from embed_pipeline.training.preflight import Forecast, preflight
from embed_pipeline.training.process import Rank, check_same_weights, check_synchronised, from_main
from embed_pipeline.training.reporting import Reporter
from embed_pipeline.training.sources import TrainingSource

logger = logging.getLogger(__name__)

WORK_FOLDER = ".training_work"  # the output may be a folder in which a person keeps a `work`


def work_folder(job: TrainingJob) -> Path:
    """Where a training keeps what nobody needs afterwards."""
    folder = job.output / WORK_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_work_folder(job: TrainingJob) -> None:
    shutil.rmtree(job.output / WORK_FOLDER, ignore_errors=True)
    checkpoints = job.output / CHECKPOINTS_FOLDER
    if not checkpoints.is_symlink():  # else they go when the model is safe
        remove_checkpoints(checkpoints)


def train(
    job: TrainingJob,
    rank: Rank,
    prepared: Prepared[SentenceTransformer] | Prepared[CrossEncoder],
    sources: Sequence[TrainingSource],
    measure: Callable[[], Figures] | None,
    *,
    metric: str,
    queries: int,
    dev_queries: int,
    reporter: Reporter | None,
) -> Summary:
    """Train; on rank 0 the model then has the weights that are kept.

    `measure` gives the dev figures of the model as it is.

    Raises TrainingError when its rows or its preflight show that it cannot end well, when the loss stops being a number
    or moving, memory runs out, or not one step was made.
    """
    trainer, settings = prepared.trainer, job.settings
    check_synchronised(trainer.args, rank)
    report = DataReport(**from_main(asdict(check_data(job, prepared.model, sources)) if rank.is_main else {}))
    evaluation = DevEvaluation(
        measure,
        metric,
        prepared.model,
        work_folder(job) / "best.safetensors",
        evaluations=settings.evaluations,
        patience=settings.early_stopping_patience,
        reporter=reporter,
    )
    trainer.add_callback(FiniteLoss())
    has_margin = settings.engine == "sentence-transformers" and any(source.facts.has_margin for source in sources)
    trainer.add_callback(MovingLoss(has_margin, lambda: trainer.accelerator.scaler.get_scale()))
    if reporter is not None:
        trainer.add_callback(Reporting(reporter))
    trainer.add_callback(evaluation)
    resume_from, steps_before, seconds_before = None, 0, 0.0
    if prepared.resumable:
        checkpoints = Checkpoints(job, rank, prepared, evaluation, reporter)
        trainer.add_callback(checkpoints)
        resume_from = checkpoints.resume()
        steps_before, seconds_before = checkpoints.steps_before, checkpoints.seconds_before
    habits = in_force(trainer.args, prepared.model, rank.hardware)
    logger.info("training in %s", habits.told(rank.precision, rank.device))
    logger.info(
        "learning rate %g, batches of %d x %d passages",
        settings.learning_rate,
        settings.batch_size,
        settings.train_group_size,
    )
    forecast = None
    with plain_memory_errors(job):
        if settings.preflight:
            forecast = preflight(job, rank, prepared, sources, resumed=resume_from is not None)
        started = time.monotonic()
        evaluation_seconds = evaluation.measure_before(trainer.args)
        told = _tell(forecast, report, evaluation_seconds, settings.evaluations, reporter)
        _run(trainer, job, rank, sum(prepared.rows.values()), resume_from)
    seconds, steps = time.monotonic() - started, trainer.state.global_step
    check_same_weights(prepared.model)
    choice = None
    if rank.is_main:
        choice = evaluation.keep()
        merge_adapters(prepared.model)
        if (collapse := collapsed(prepared.model, sources, rank)) is not None:
            logger.warning("%s", collapse)
            told["warnings"] = [*told["warnings"], collapse]
            if reporter is not None:
                reporter.tell({"warnings": [collapse]})
    return Summary(
        kind=job.entry_point.rpartition(".")[2],
        engine=settings.engine,
        queries=queries,
        rows=prepared.rows,
        steps=steps,
        epochs=round(trainer.state.epoch or 0.0, 4),
        dev_queries=dev_queries,
        dev_metric=metric,
        dev_before=evaluation.before.figure.value if evaluation.before else None,
        dev_kept=choice.value if choice else None,
        kept_step=choice.step if choice else None,
        kept_because=choice.sentence if choice else None,
        dev_verdict=choice.verdict if choice else None,
        dev_gain=choice.over_base if choice else None,
        train_seconds=round(seconds_before + seconds, 3),
        steps_per_second=round((steps - steps_before) / seconds, 4),
        world_size=rank.world_size,
        device=rank.device.partition(":")[0],
        precision=rank.precision,
        **asdict(habits),
        threads=torch.get_num_threads(),
        seed=job.seed,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        train_group_size=settings.train_group_size,
        sub_batch_size=getattr(settings, "parts", None),
        **told,
    )


def _tell(
    forecast: Forecast | None, report: DataReport, evaluation: float, evaluations: int, reporter: Reporter | None
) -> dict[str, Any]:
    """Tell a person what is coming, in the log and in Dagster; the same for the summary."""
    told: dict[str, Any] = {"truncated": report.truncated, "warnings": report.warnings}
    for warning in report.warnings if reporter is not None else ():
        logger.warning("%s", warning)
    if forecast is not None:
        seconds = forecast.seconds(evaluation, evaluations)
        told |= {
            "preflight": forecast.sentence(seconds),
            "forecast_seconds": round(seconds, 1),
            "forecast_memory": forecast.memory,
        }
        if reporter is not None:
            logger.info("%s", told["preflight"])
    if reporter is not None:
        reporter.tell(told)
    return told


def _run(trainer: Trainer, job: TrainingJob, rank: Rank, rows: int, resume_from: str | None) -> None:
    batch_size = job.settings.batch_size
    trainer.train(resume_from_checkpoint=resume_from)
    if trainer.state.global_step == 0:
        raise TrainingError(
            f"no step was made: among {rows} rows no {batch_size * rank.world_size} have texts of their own, and equal "
            "texts never share a batch. Lower batch_size or train_group_size"
        )


@contextlib.contextmanager
def plain_memory_errors(job: TrainingJob) -> Iterator[None]:
    """Memory that cannot be had, on a GPU or a CPU, becomes a TrainingError with what takes less of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of {'GPU ' if on_gpu else ''}memory at batch_size {job.settings.batch_size} x train_group_size "
            f"{job.settings.train_group_size}: {error}. {less_memory(job.settings, job.source_kind)}"
        ) from error
