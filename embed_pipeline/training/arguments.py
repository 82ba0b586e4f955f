"""The settings in the words of transformers' TrainingArguments, which both engines extend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embed_pipeline.errors import TrainingError
from embed_pipeline.library_arguments import arguments_for
from embed_pipeline.training.hardware import arguments_of
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.process import Rank


def trainer_arguments(job: TrainingJob, rank: Rank, work: Path) -> dict[str, Any]:
    """Keyword arguments of a TrainingArguments. Evaluation and the best weights are `callbacks.DevEvaluation`'s."""
    settings = job.settings
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        # The re-entrant kind cannot be combined with DDP's search for unused parameters.
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return {
        "output_dir": str(work / "trainer"),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup_ratio,  # below 1 it is a share of all steps
        "lr_scheduler_type": settings.scheduler,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": rank.precision == "bfloat16",
        "fp16": rank.precision == "float16",
        **checkpointing,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # callbacks.FiniteLoss wants to see them
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",  # reporting.Reporter does
        # A last batch of another size makes FlagEmbedding's losses fail or silently train on nothing, and gives
        # in-batch negatives another difficulty in both engines.
        "dataloader_drop_last": True,
        "use_cpu": rank.device == "cpu",  # unset on a CPU, every rank trains alone
        "seed": job.seed,
        "data_seed": job.seed,
        "disable_tqdm": not rank.is_main,
        **arguments_of(rank.hardware),
        **arguments_for(settings, "training"),
    }


def check_steps(job: TrainingJob, rank: Rank, rows: int, what: str, rows_each: int = 1) -> None:
    """Raises TrainingError when `rows` do not fill one batch of every process.

    A batch has `batch_size` times `rows_each` of them.
    """
    needed = job.settings.batch_size * rows_each * rank.world_size
    if rows < needed:
        times = f" x {rows_each} rows" if rows_each > 1 else ""
        raise TrainingError(
            f"{rows} {what} do not fill one step: batch_size {job.settings.batch_size}{times} x {rank.world_size} "
            f"process(es) = {needed}. Lower batch_size to {max(1, rows // (rows_each * rank.world_size))} or less, or "
            "bring more training rows"
        )
