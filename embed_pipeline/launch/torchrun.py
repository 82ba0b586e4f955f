"""The torchrun command of a job: built once, wherever it then runs. Does not import torch for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embed_pipeline.settings import LaunchSettings

# Present where NVIDIA's driver (bare metal, WSL) or AMD's is; without one there is no need to import torch to count.
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))
# From SIGTERM to SIGKILL of a rank: time for a checkpoint, and less than whoever launched torchrun waits for it
# (`local.TERMINATE_SECONDS`), also on a busy machine.
SHUTDOWN_SECONDS = 5


# Runs a module, but none that lies in the folder where it is started: others may be able to write there.
PYTHON = (sys.executable, "-P", "-m")
RENDEZVOUS_BACKEND = "files"  # launch.rendezvous, as torchrun knows it
ONE_NODE: Sequence[str] = ("--nnodes=1", "--rdzv-id=alone")
# Every module that a job may run; a node takes no other from an announcement.
EntryPoint = Literal[
    "embed_pipeline.training.embedder", "embed_pipeline.training.reranker", "embed_pipeline.models.rank"
]


@dataclass(frozen=True)
class Rendezvous:
    """Where the agents of several nodes meet."""

    id: str
    folder: Path | str  # of this user alone, which every node sees
    nnodes: int
    network: str  # the nodes' own: its addresses, or the interface's name
    wait_seconds: int  # for all nodes to come

    def options(self, rank: int | str) -> list[str]:
        """`rank`: this node's, or a word that a shell turns into it. Rank 0 of the job is on node 0."""
        return [
            f"--nnodes={self.nnodes}",
            f"--rdzv-id={self.id}",
            f"--rdzv-endpoint={self.folder}",
            f"--rdzv-conf=rank={rank},network={self.network},join_timeout={self.wait_seconds}",
        ]


def torchrun_command(
    entry_point: str,
    job_file: Path,
    nproc_per_node: int,
    *,
    max_restarts: int = 0,
    rendezvous: Sequence[str] = ONE_NODE,
    log_folder: Path | None = None,
) -> list[str]:
    """The command that does `job_file` (the only argument of module `entry_point`) in `nproc_per_node` processes.

    `rendezvous` are `Rendezvous.options` where there are several nodes. Each rank's output appears on the console
    behind its rank, and in files under `log_folder` (default: `logs` beside the job file).
    """
    return [
        *PYTHON, "embed_pipeline.launch.agent",
        f"--rdzv-backend={RENDEZVOUS_BACKEND}",
        *rendezvous,
        f"--nproc-per-node={nproc_per_node}",
        f"--max-restarts={max_restarts}",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--tee=3",
        f"--log-dir={log_folder or job_file.parent / 'logs'}",
        # torchrun takes a script's flags for its own when they share a prefix: hand over nothing but a path.
        "-m", entry_point, str(job_file),
    ]  # fmt: skip


def world_size(launch: LaunchSettings, nproc_per_node: Literal["auto"] | int) -> int:
    """How many processes a job has over all nodes; elsewhere than here, `auto` is one for each GPU asked for."""
    if nproc_per_node == "auto" and launch.elsewhere:
        nproc_per_node = launch.gpus_per_node or 1
    return launch.nnodes * processes_per_node(nproc_per_node)


def processes_per_node(setting: Literal["auto"] | int) -> int:
    """How many processes a job has on this machine: one on a CPU, one per visible GPU, or the number given."""
    if setting != "auto":
        return setting
    if not has_gpu_driver():
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def has_gpu_driver() -> bool:
    """Whether this machine has a GPU that torch may use."""
    return any(driver.exists() for driver in GPU_DRIVERS)
