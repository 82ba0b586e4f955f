"""A training from the prepared trainer to the restored best weights; the same for both model kinds and engines."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import Trainer

from embed_pipeline.errors import TrainingError
from embed_pipeline.losses import EMBEDDER_LOSSES
from embed_pipeline.settings import EmbedderSettings
from embed_pipeline.training.callbacks import DevEvaluation, FiniteLoss, Reporting
from embed_pipeline.training.checkpoints import Checkpoints
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.hardware import in_force
from embed_pipeline.training.job import CHECKPOINTS_FOLDER, TrainingJob
from embed_pipeline.training.modules import merge_adapters
from embed_pipeline.training.output import Summary
from embed_pipeline.training.process import Rank, check_same_weights, check_synchronised
from embed_pipeline.training.reporting import Reporter

logger = logging.getLogger(__name__)


def work_folder(job: TrainingJob) -> Path:
    """Where a training keeps what nobody needs afterwards."""
    folder = job.output / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_work_folder(job: TrainingJob) -> None:
    shutil.rmtree(job.output / "work")
    checkpoints = job.output / CHECKPOINTS_FOLDER
    if not checkpoints.is_symlink():  # else they go when the model is safe
        shutil.rmtree(checkpoints, ignore_errors=True)


def train(
    job: TrainingJob,
    rank: Rank,
    prepared: Prepared[SentenceTransformer] | Prepared[CrossEncoder],
    measure: Callable[[], dict[str, float]] | None,
    *,
    metric: str,
    queries: int,
    dev_queries: int,
    reporter: Reporter | None,
) -> Summary:
    """Train; on rank 0 the model then has its best weights. `measure` gives the dev figures of the model as it is.

    Raises TrainingError when the loss stops being a number, memory runs out, or not one step was made.
    """
    trainer, settings = prepared.trainer, job.settings
    check_synchronised(trainer.args, rank)
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
    if reporter is not None:
        trainer.add_callback(Reporting(reporter))
    trainer.add_callback(evaluation)
    resume_from, steps_before, seconds_before = None, 0, 0.0
    if prepared.resumable:
        checkpoints = Checkpoints(job, rank, prepared, evaluation, reporter)
        trainer.add_callback(checkpoints)
        resume_from = checkpoints.resume()
        steps_before, seconds_before = checkpoints.steps_before, checkpoints.seconds_before
    habits = in_force(trainer.args, prepared.model)
    logger.info("training in %s", habits.told(rank.precision, rank.device))
    started = time.monotonic()
    _run(trainer, job, rank, sum(prepared.rows.values()), resume_from)
    seconds, steps = time.monotonic() - started, trainer.state.global_step
    check_same_weights(prepared.model)
    if rank.is_main:
        evaluation.restore_best()
        merge_adapters(prepared.model)
    return Summary(
        kind=job.entry_point.rpartition(".")[2],
        engine=settings.engine,
        queries=queries,
        rows=prepared.rows,
        steps=steps,
        epochs=round(trainer.state.epoch or 0.0, 4),
        dev_queries=dev_queries,
        dev_metric=metric,
        dev_before=evaluation.before,
        dev_best=evaluation.best,
        better_on_dev=_better(metric, evaluation.before, evaluation.best),
        best_step=evaluation.best_step,
        train_seconds=round(seconds_before + seconds, 3),
        steps_per_second=round((steps - steps_before) / seconds, 4),
        world_size=rank.world_size,
        device=rank.device.partition(":")[0],
        precision=rank.precision,
        **asdict(habits),
        threads=torch.get_num_threads(),
        seed=job.seed,
    )


def _run(trainer: Trainer, job: TrainingJob, rank: Rank, rows: int, resume_from: str | None) -> None:
    batch_size, group_size = job.settings.batch_size, job.settings.train_group_size
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory at batch_size {batch_size} x train_group_size {group_size}: {error}. {_smaller(job)}"
        ) from error
    if trainer.state.global_step == 0:
        raise TrainingError(
            f"no step was made: among {rows} rows no {batch_size * rank.world_size} have texts of their own, and equal "
            "texts never share a batch. Lower batch_size or train_group_size"
        )


def _smaller(job: TrainingJob) -> str:
    """What makes a step fit, what costs least first."""
    settings = job.settings
    if isinstance(settings, EmbedderSettings) and settings.engine == "sentence-transformers":
        loss = EMBEDDER_LOSSES[settings.loss_for(job.source_kind)]
        if loss.caches or loss.cached:  # the batch stays as it is, and so do its negatives
            part = max(1, (settings.sub_batch_size or settings.batch_size) // 2)
            return f"Set sub_batch_size: {part} (gradient caching: the same step in parts), or lower batch_size"
    if not settings.gradient_checkpointing:
        return "Set gradient_checkpointing: true, or lower batch_size"
    return "Lower batch_size, and raise gradient_accumulation_steps by as much"


def _better(metric: str, before: float | None, after: float | None) -> bool | None:
    """Whether the kept weights, which are always from after the start, do better on dev; tells when they do worse."""
    if before is None or after is None:
        return None
    if after < before:
        logger.warning(
            "dev %s fell from %.4f to %.4f: the base model does better than any evaluation of this training. "
            "Lower learning_rate, or bring more training rows",
            metric,
            before,
            after,
        )
    return after > before
