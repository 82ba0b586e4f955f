"""The largest batch that a GPU holds, found before the training: `find_batch_size`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from transformers import set_seed

from embed_pipeline.errors import TrainingError
from embed_pipeline.model_files import CHECKPOINTS_FOLDER
from embed_pipeline.training.batches import batches_of
from embed_pipeline.training.checkpoints import BATCH_SIZE_FILE
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.forecast import NEAR, less_memory
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.memory import forget_peak, free_memory, held_memory, peak_memory
from embed_pipeline.training.preflight import (
    as_in_training,
    left_as_found,
    losses_of,
    of_size,
    optimizer_bytes,
    step,
)
from embed_pipeline.training.process import Rank, from_all, from_main
from embed_pipeline.training.sources import TrainingSource

logger = logging.getLogger(__name__)

Job = TypeVar("Job", bound=TrainingJob)


def prepare_with_batch_size(
    job: Job, rank: Rank, sources: Sequence[TrainingSource], prepare: Callable[[Job], Prepared[Any]]
) -> tuple[Job, Prepared[Any]]:
    """The prepared training, and its job with the batch size that was found, where one is to be found.

    `settings.batch_size` is the upper bound. Raises TrainingError where there is no GPU, or not even one row fits.
    """
    if not job.settings.find_batch_size:
        return job, prepare(job)
    if not rank.device.startswith("cuda"):
        raise TrainingError(
            f"find_batch_size: true tries batches on a CUDA GPU only, because a {rank.device} that runs out of memory "
            "ends the process; set find_batch_size: false and choose batch_size"
        )
    bound = job.settings.batch_size
    prepared = prepare(job)
    known = recorded(job, BATCH_SIZE_FILE, rank)
    found = None if known is None else known.found
    if found is None:
        tried = prepared
        found = largest_that_fits(bound, lambda size: all(from_all(fits(job, rank, tried, sources, size))))
        del tried
        if found is None:
            advice = less_memory(job.settings, job.source_kind)
            raise TrainingError(f"not even batch_size 1 fits the GPU's memory. {advice}")
        if rank.is_main:
            logger.info("find_batch_size: %d is the largest that fits, of at most %d", found, bound)
        record(job, BATCH_SIZE_FILE, rank, found)
    if found == bound:
        return job, prepared
    del prepared
    torch.cuda.empty_cache()
    settings = job.settings.model_copy(update={"batch_size": found})
    job = job.model_copy(update={"settings": settings})
    set_seed(job.seed)  # as if it had been the batch size from the beginning
    return job, prepare(job)


def largest_that_fits(bound: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of bound, bound // 2, bound // 4, ... 1 that `fits`, by bisection; None where none does."""
    sizes = [bound]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    if fits(sizes[0]):
        return sizes[0]
    too_large, small_enough = 0, len(sizes)  # positions
    while small_enough - too_large > 1:
        middle = (too_large + small_enough) // 2
        if fits(sizes[middle]):
            small_enough = middle
        else:
            too_large = middle
    return sizes[small_enough] if small_enough < len(sizes) else None


def fits(job: TrainingJob, rank: Rank, prepared: Prepared[Any], sources: Sequence[TrainingSource], size: int) -> bool:
    """Whether the longest step of every source, and the optimizer, take at most nine tenths of the memory."""
    there = free_memory(rank.device) + held_memory(rank.device)
    forget_peak(rank.device)
    try:
        with left_as_found(prepared), as_in_training(job, prepared), _alone(prepared), of_size(prepared, size):
            for one in batches_of(job, prepared, sources):
                step(prepared, one, one.longest(max(1, one.size * size // job.settings.batch_size)))
    except torch.OutOfMemoryError:
        return False
    return peak_memory(rank.device) + optimizer_bytes(prepared, rank) <= NEAR * there


@contextlib.contextmanager
def _alone(prepared: Prepared[Any]) -> Iterator[None]:
    """Without the other ranks' negatives: a rank that is out of memory must not leave the others waiting for it."""
    trainer: Any = prepared.trainer
    gathering = [
        (module, name)
        for top in (trainer.model, *losses_of(trainer).values())
        for module in top.modules()
        for name in ("gather_across_devices", "negatives_cross_device")
        if module.__dict__.get(name)
    ]
    for module, name in gathering:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in gathering:
            setattr(module, name, True)


@dataclass(frozen=True)
class Found:
    """What was found for a batch size; it lies beside the checkpoints, since a training that goes on must keep it."""

    bound: int  # the batch size that was asked for
    found: int | None


def recorded(job: TrainingJob, name: str, rank: Rank) -> Found | None:
    """What an earlier try of this training found, the same in every rank; None where there is none."""
    told = None
    if rank.is_main:
        with contextlib.suppress(OSError, ValueError):
            told = json.loads((job.output / CHECKPOINTS_FOLDER / name).read_text())
    told = from_main(told)
    if not isinstance(told, dict) or told.get("bound") != job.settings.batch_size:
        return None
    found = told.get("found")
    return Found(job.settings.batch_size, int(found) if found is not None else None)


def record(job: TrainingJob, name: str, rank: Rank, found: int | None) -> None:
    if job.settings.checkpoint_minutes is None or not rank.is_main:
        return
    folder = job.output / CHECKPOINTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}"
    partial.write_text(json.dumps(asdict(Found(job.settings.batch_size, found))))
    partial.replace(folder / name)
