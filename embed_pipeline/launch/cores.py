"""How many threads a process may usefully compute with on this machine.

Two hyper-threads of a core share its multipliers, so a second one adds waiting and no speed. A container's limit is
processor time in each tenth of a second: threads beyond it use the time up at once, and then all of them stand still.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cores:
    """What this process may use of its machine."""

    physical: int  # of those that its affinity allows
    quota: float | None  # the container's limit, in cores

    @property
    def threads(self) -> int:
        return self.physical if self.quota is None else max(1, min(self.physical, int(self.quota)))

    def __str__(self) -> str:
        limit = "no container limit" if self.quota is None else f"a container limit of {self.quota:g}"
        return f"{self.physical} physical cores, {limit}"


def usable_cores(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Cores:
    """The cores of this process. `root` is where /proc and /sys lie, `allowed` the CPUs that its affinity names."""
    if allowed is None and hasattr(os, "sched_getaffinity"):  # not on macOS
        allowed = os.sched_getaffinity(0)
    if allowed is None:
        return Cores(psutil.cpu_count(logical=False) or os.cpu_count() or 1, None)
    return Cores(_physical(root, allowed), _quota(root))


def limit_threads() -> None:
    """Lower the threads of torch to the usable cores; a number that is lower already stays."""
    import torch

    cores = usable_cores()
    if cores.threads < torch.get_num_threads():
        logger.info("computing with %d threads instead of %d: %s", cores.threads, torch.get_num_threads(), cores)
        torch.set_num_threads(cores.threads)


def _physical(root: Path, allowed: Collection[int]) -> int:
    """The kernel names the CPUs that share a core with each; where it does not, each counts as a core."""
    siblings = set()
    for cpu in allowed:
        try:
            told = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            told = str(cpu)
        siblings.add(told)
    return max(1, len(siblings))


def _quota(root: Path) -> float | None:
    """The lowest limit of this process's control group and of those that it lies in, in cores."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container sees its own group as the root, or the host's path to it, of which then nothing is mounted.
        inner = Path(group.lstrip("/"))
        for part in (inner, *inner.parents):
            for mounted in ("", "unified") if not controllers else (controllers, "cpu"):
                folder = root / "sys/fs/cgroup" / mounted / part
                yield from _limit(folder) if controllers else _limit_v2(folder)


def _limit_v2(folder: Path) -> Iterator[float]:
    """`cpu.max` holds microseconds and their period, or `max`."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return
    if quota != "max":
        yield int(quota) / int(period)


def _limit(folder: Path) -> Iterator[float]:
    """Version 1 has a file for each, and -1 for no limit."""
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return
    if quota > 0:
        yield quota / period
