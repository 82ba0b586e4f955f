"""Memory of this process and what the machine, or the container around it, still has."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import torch

_GROUPS = Path("/sys/fs/cgroup")


def peak_memory(device: str) -> int:
    """Bytes that this process held at most since `forget_peak`: of the GPU, or of the machine's memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def forget_peak(device: str) -> None:
    """Let `peak_memory` begin anew, where that is possible; else it stays the highest of the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def held_memory(device: str) -> int:
    """Bytes that this process holds now."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def free_memory(device: str) -> int:
    """Bytes that could still be had: on the GPU, within the share of it that torch was given
    (`torch.cuda.set_per_process_memory_fraction`), or within the machine, its swap and every control group around us.
    """
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free + torch.cuda.memory_reserved(device), share) - torch.cuda.memory_allocated(device)
    of_machine = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([of_machine, *(limit - used for limit, used in _groups(_GROUPS, Path("/proc/self/cgroup")))])


def memory_limit(device: str) -> int:
    """Bytes that there are in all, whoever holds them now: of the GPU, or as for `free_memory`."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    of_machine = psutil.virtual_memory().total + psutil.swap_memory().total
    return min([of_machine, *(limit for limit, _ in _groups(_GROUPS, Path("/proc/self/cgroup")))])


def _groups(root: Path, membership: Path) -> list[tuple[int, int]]:
    """Limit and use of every control group of v2 or v1 around us that has a limit, from the innermost outwards."""
    found = []
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, names = root, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                top, names = (
                    root / "memory",
                    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                )
            else:
                continue
            # In a container the path may be that of the host: its own group then lies at the top.
            folder = top / path.lstrip("/")
            while folder.is_relative_to(top):
                found += _limit_and_use(folder, *names)
                if folder == top:
                    break
                folder = folder.parent
    return found


def _limit_and_use(folder: Path, limit: str, current: str, reclaimable: str) -> list[tuple[int, int]]:
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return []
        used = int((folder / current).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{reclaimable} "):
                used -= int(line.split()[1])  # files that were read, which the kernel gives up first
        return [(int(allowed), used)]
    except (OSError, ValueError):
        return []
