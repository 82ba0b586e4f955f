"""How many threads a process computes with: its affinity, the cores behind the CPUs, the container's limits."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from embed_pipeline.launch import cores
from embed_pipeline.launch.cores import Cores, limit_threads, usable_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


def siblings(pairs: dict[int, str]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": told for cpu, told in pairs.items()}


@pytest.mark.parametrize(
    ("allowed", "expected"), [(range(8), 4), (range(4), 4), ({0, 4}, 1), ({0, 4, 5}, 2), ({6}, 1), ({0, 9}, 2)]
)
def test_hyper_threads_of_a_core_count_once(tmp_path: Path, allowed: set[int], expected: int) -> None:
    root = write(tmp_path, siblings({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}))
    assert usable_cores(root, allowed) == Cores(expected, None)


VERSION_2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        # Version 2, in a container that sees its own group as the root.
        ({"proc/self/cgroup": "0::/", f"{VERSION_2}/cpu.max": "250000 100000"}, 2.5, 2),
        ({"proc/self/cgroup": "0::/", f"{VERSION_2}/cpu.max": "50000 100000"}, 0.5, 1),
        ({"proc/self/cgroup": "0::/", f"{VERSION_2}/cpu.max": "max 100000"}, None, 16),
        # A slice of systemd: the narrowest of the groups that lie in each other holds.
        (
            {
                "proc/self/cgroup": "0::/user.slice/job.scope",
                f"{VERSION_2}/user.slice/cpu.max": "400000 100000",
                f"{VERSION_2}/user.slice/job.scope/cpu.max": "max 100000",
            },
            4.0,
            4,
        ),
        # Version 1, where the container's path is the host's and its group is mounted as the root.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:cpuset:/docker/abc",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3.0,
            3,
        ),
        # Mounted under the controller's own name.
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/job",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            6.0,
            6,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
            16,
        ),
        # Both versions at once, as systemd has them for a while.
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/job",
                "sys/fs/cgroup/unified/job/cpu.max": "200000 100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
            2,
        ),
        ({}, None, 16),
        ({"proc/self/cgroup": "0::/", f"{VERSION_2}/cpu.max": ""}, None, 16),
    ],
)
def test_a_container_limits_the_threads(
    tmp_path: Path, files: dict[str, str], quota: float | None, threads: int
) -> None:
    found = usable_cores(write(tmp_path, files), range(16))
    assert (found, found.threads) == (Cores(16, quota), threads)


def test_a_container_never_raises_them(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/", f"{VERSION_2}/cpu.max": "3200000 100000"})
    assert usable_cores(root, {0, 1}).threads == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux limits a process to some cores")
def test_this_process_has_the_cores_that_it_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores().threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= usable_cores().threads <= len(allowed)


def test_a_process_keeps_to_the_limit_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "usable_cores", lambda: Cores(8, 3.5))
    try:
        with caplog.at_level(logging.INFO):
            torch.set_num_threads(5)
            limit_threads()
            assert torch.get_num_threads() == 3
            torch.set_num_threads(2)  # as OMP_NUM_THREADS may ask for
            limit_threads()
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    told = "computing with 3 threads instead of 5: 8 physical cores, a container limit of 3.5"
    assert [record.message for record in caplog.records] == [told]
