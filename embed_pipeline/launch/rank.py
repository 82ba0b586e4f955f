"""One process of a torchrun job: its place among the others, its device, its threads, its process group."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import FileStore, distributed_c10d

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.cores import usable_cores
from embed_pipeline.launch.parent_death import die_with_parent
from embed_pipeline.models.precision import default_device

logger = logging.getLogger(__name__)

RANKS_FILE_VARIABLE = "EMBED_PIPELINE_RANKS_FILE"  # where the ranks of a job meet; `launch.rendezvous` sets it


# What torchrun tells a process of its place. accelerate opens a store at MASTER_ADDR wherever it finds LOCAL_RANK.
_TORCHRUN_PLACE = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    device: str  # cpu, mps or cuda:<local rank>
    threads: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def take_place(world_size: int) -> Place:
    """Make this process the rank that torchrun says it is; raises TrainingError where a job is for `world_size` others.

    It ends with its parent, and its share of the cores decides its threads.
    """
    # SIGKILL to torchrun would otherwise leave its workers at work; SIGTERM might find them waiting for each other.
    die_with_parent(signal.SIGKILL)
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    started, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO if rank == 0 else logging.WARNING
    )
    if started != world_size:
        raise TrainingError(
            f"this job is for {world_size} processes, but {started} were started. Start it with torchrun's "
            f"--nproc-per-node times --nnodes = {world_size}, or write the job anew"
        )
    device = device_of(default_device(), local_rank, torch.cuda.device_count())
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # Sums may depend on how they are divided over threads: decide it here, not by whoever starts the process.
    cores = usable_cores()
    threads = max(1, cores.threads // local_size)
    torch.set_num_threads(threads)
    logger.info("computing with %d threads in each of %d processes of this machine: %s", threads, local_size, cores)
    if "LOCAL_RANK" in os.environ:
        # accelerate would set the machine's physical cores instead, of which a process may have fewer.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return Place(rank, world_size, device, threads)


def meet(place: Place, timeout: timedelta) -> None:
    """Form the process group of a training, before a library does it over a port that all the network can reach.

    A process alone on a CPU needs none: libraries are to take it for one that torchrun did not start. From here on no
    process unpickles what another sends. Raises TrainingError in a process that was started by torchrun itself, which
    does not know the file in which the processes meet.
    """
    if torch.distributed.is_initialized() or "LOCAL_RANK" not in os.environ:
        return
    on_gpu = place.device.startswith("cuda")
    if place.world_size == 1 and not on_gpu:  # on a GPU, transformers would take all of the machine's
        for name in _TORCHRUN_PLACE:
            os.environ.pop(name, None)
        return
    path = os.environ.get(RANKS_FILE_VARIABLE)
    if path is None:
        raise TrainingError(
            "torchrun itself lets its processes meet at a port that everybody can reach. Start them by `python -m "
            "embed_pipeline.launch.agent --rdzv-backend=files`, which takes torchrun's other options"
        )
    assert hasattr(distributed_c10d, "_unpickler")
    distributed_c10d._unpickler = _refuse  # type: ignore[assignment]
    store = FileStore(path, place.world_size)
    store.set_timeout(timeout)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
    )


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "a library exchanges pickled objects between the processes of this training. The network between them is not "
        "authenticated, so whoever is on it could run code here: exchange tensors, or text"
    )


def device_of(kind: str, local_rank: int, gpus: int) -> str:
    """The device of a rank: cpu, mps or cuda:<local rank>. Raises TrainingError for a rank that has no GPU."""
    if kind != "cuda":
        return kind
    if local_rank >= gpus:
        raise TrainingError(
            f"process {local_rank + 1} of this machine has no GPU of its own: {gpus} are visible. Lower "
            "nproc_per_node to that number (auto takes one process per GPU), or make more visible in "
            "CUDA_VISIBLE_DEVICES"
        )
    return f"cuda:{local_rank}"
