"""One rank of a training: its place among the ranks, its device, its arithmetic, its seed."""

from __future__ import annotations

import contextlib
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
from embed_pipeline.launch.parent_death import die_with_parent
from embed_pipeline.models.precision import ResolvedPrecision, default_device, resolve_precision
from embed_pipeline.training.hardware import Hardware, device_of, look
from embed_pipeline.training.job import TrainingJob

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    rank: int
    world_size: int
    device: str  # cpu, mps or cuda:<local rank>
    precision: ResolvedPrecision
    threads: int
    hardware: Hardware

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_rank(job: TrainingJob) -> Rank:
    """Make this process the rank that torchrun says it is. Raises TrainingError for a job it cannot take part in."""
    # SIGKILL to torchrun would otherwise leave its workers training.
    die_with_parent()
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO if rank == 0 else logging.WARNING
    )
    _only_our_words(rank == 0)
    if world_size != job.world_size:
        raise TrainingError(
            f"this job is for {job.world_size} processes, but {world_size} were started. Start it with torchrun's "
            f"--nproc-per-node times --nnodes = {job.world_size}, or write the job anew"
        )
    device = device_of(default_device(), local_rank, torch.cuda.device_count())
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    precision = resolve_precision(job.settings.precision, device)
    if precision == "float16" and not device.startswith("cuda"):
        raise TrainingError(
            f"precision: float16 trains on a CUDA GPU only; this process has {device}. Use auto, bfloat16 or float32"
        )
    # Sums depend on how they are divided over threads: decide it here, not by whoever starts the process.
    threads = max(1, _usable_cores() // local_size)
    torch.set_num_threads(threads)
    if "LOCAL_RANK" in os.environ:
        # accelerate would set the machine's physical cores instead, where a process may use fewer.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    set_seed(job.seed)
    # Processes that load rows are forked after the tokenizer ran, and it would warn that it cannot use threads there.
    os.register_at_fork(after_in_child=lambda: os.environ.setdefault("TOKENIZERS_PARALLELISM", "false"))
    if world_size > 1 and not torch.distributed.is_initialized():
        # Before accelerate does, which gives a CPU's processes no other time than torch's own.
        torch.distributed.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            timeout=timedelta(minutes=job.settings.collective_timeout_minutes),
        )
    return Rank(rank, world_size, device, precision, threads, look(device, threads))


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


def _usable_cores() -> int:
    with contextlib.suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
