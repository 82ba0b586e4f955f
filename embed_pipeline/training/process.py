"""One rank of a training: its place among the ranks, its device, its arithmetic, its seed."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import datasets
import torch
import transformers
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.training_args import ParallelMode

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.rank import Place, take_place
from embed_pipeline.models.precision import ResolvedPrecision, resolve_precision
from embed_pipeline.training.hardware import Hardware, look
from embed_pipeline.training.job import TrainingJob

T = TypeVar("T")


@dataclass(frozen=True)
class Rank(Place):
    precision: ResolvedPrecision
    hardware: Hardware


def start_rank(job: TrainingJob) -> Rank:
    """Make this process the rank that torchrun says it is. Raises TrainingError for a job it cannot take part in."""
    place = take_place(job.world_size)
    _only_our_words(place.is_main)
    precision = resolve_precision(job.settings.precision, place.device)
    if precision == "float16" and not place.device.startswith("cuda"):
        raise TrainingError(
            f"precision: float16 trains on a CUDA GPU only; this process has {place.device}. Use auto, bfloat16 or "
            "float32"
        )
    set_seed(job.seed)
    # Processes that load rows are forked after the tokenizer ran, and it would warn that it cannot use threads there.
    os.register_at_fork(after_in_child=lambda: os.environ.setdefault("TOKENIZERS_PARALLELISM", "false"))
    if place.world_size > 1 and not torch.distributed.is_initialized():
        # Before accelerate does, which gives a CPU's processes no other time than torch's own.
        torch.distributed.init_process_group(
            "nccl" if place.device.startswith("cuda") else "gloo",
            timeout=timedelta(minutes=job.settings.collective_timeout_minutes),
        )
    hardware = look(place.device, place.threads)
    return Rank(place.rank, place.world_size, place.device, place.threads, precision, hardware)


def check_synchronised(arguments: TrainingArguments, rank: Rank) -> None:
    """Without a process group every rank would train alone, and all would end well (seen on CPUs without `use_cpu`)."""
    if rank.world_size > 1:
        assert arguments.parallel_mode is ParallelMode.DISTRIBUTED, arguments.parallel_mode
    assert arguments.world_size == rank.world_size, (arguments.world_size, rank.world_size)


def check_same_weights(model: nn.Module) -> None:
    """Raises TrainingError unless every rank holds the same parameters, as DDP leaves them bit by bit."""
    if not torch.distributed.is_initialized():
        return
    of_all = from_all([parameter.detach().double().sum().item() for parameter in model.parameters()])
    different = [rank for rank, theirs in enumerate(of_all) if theirs != of_all[0]]
    if different:
        raise TrainingError(
            f"ranks {different} ended with other weights than rank 0: gradients were not shared. Do not use the model; "
            "train with one process, and report the base model with which this happens"
        )


def from_main(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """Every rank's `value`, on every rank; returns when each has come here."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def wait() -> None:
    """Return when every rank has come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def wait_for_all() -> None:
    """Return when every rank has come here, and leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _only_our_words(is_main: bool) -> None:
    """Of the libraries, keep warnings, and the training's own progress bar; from other ranks, errors alone."""
    level = logging.WARNING if is_main else logging.ERROR
    for chatty in ("FlagEmbedding", "sentence_transformers", "httpx"):
        logging.getLogger(chatty).setLevel(level)
    transformers.logging.set_verbosity(level)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
