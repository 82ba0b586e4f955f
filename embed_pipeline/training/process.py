"""One rank of a training: its place among the ranks, its device, its arithmetic, its seed."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import methodcaller
from typing import TypeVar

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.training_args import ParallelMode

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.rank import Place, meet, take_place
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
    meet(place, timedelta(minutes=job.settings.collective_timeout_minutes))
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
    """Rank 0's `value`, on every rank: numbers, texts, lists and dicts by text, as JSON has them."""
    return from_all(value)[0]


def from_all(value: T) -> list[T]:
    """Every rank's `value` (see `from_main`), on every rank; returns when each has come here."""
    if not torch.distributed.is_initialized():
        return [value]
    mine = json.dumps(value, default=methodcaller("item"))  # of numpy's numbers
    return [json.loads(told) for told in _bytes_from_all(mine.encode())]


def arrays_from_all(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Every rank's arrays of numbers, on every rank, bit by bit."""
    if not torch.distributed.is_initialized():
        return [list(arrays)]
    buffer = io.BytesIO()
    np.savez(buffer, *arrays)
    of_all = []
    for told in _bytes_from_all(buffer.getvalue()):
        with np.load(io.BytesIO(told), allow_pickle=False) as loaded:
            of_all.append([loaded[f"arr_{number}"] for number in range(len(loaded.files))])
    return of_all


def _bytes_from_all(mine: bytes) -> list[bytes]:
    """Every rank's bytes. Not torch's own collectives for objects: they unpickle what comes over the network."""
    world_size = torch.distributed.get_world_size()
    device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    size = torch.tensor([len(mine)], device=device)
    sizes = [torch.empty_like(size) for _ in range(world_size)]
    torch.distributed.all_gather(sizes, size)
    lengths = [int(one) for one in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    of_all = [torch.empty_like(padded) for _ in range(world_size)]
    torch.distributed.all_gather(of_all, padded)
    return [one[:length].cpu().numpy().tobytes() for one, length in zip(of_all, lengths, strict=True)]


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
