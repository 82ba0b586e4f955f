"""The torchrun command of a training job: built once, wherever it then runs. Does not import torch for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

# Present where NVIDIA's driver (bare metal, WSL) or AMD's is; without one there is no need to import torch to count.
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))
SHUTDOWN_SECONDS = 10


def torchrun_command(
    entry_point: str, job_file: Path, nproc_per_node: int, *, log_folder: Path | None = None
) -> list[str]:
    """The command that trains `job_file` (the only argument of module `entry_point`) in `nproc_per_node` processes.

    Each rank's output appears on the console behind its rank, and in files under `log_folder` (default: `logs`
    beside the job file).
    """
    return [
        sys.executable, "-m", "embed_pipeline.launch.agent",
        "--standalone",
        f"--nproc-per-node={nproc_per_node}",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--tee=3",
        f"--log-dir={log_folder or job_file.parent / 'logs'}",
        # torchrun takes a script's flags for its own when they share a prefix: hand over nothing but a path.
        "-m", entry_point, str(job_file),
    ]  # fmt: skip


def processes_per_node(setting: Literal["auto"] | int) -> int:
    """How many processes a training takes on this machine: one on a CPU, one per visible GPU, or the number given."""
    if setting != "auto":
        return setting
    if not has_gpu_driver():
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def has_gpu_driver() -> bool:
    """Whether this machine has a GPU that torch may use."""
    return any(driver.exists() for driver in GPU_DRIVERS)
