"""The torchrun command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embed_pipeline.launch import torchrun
from embed_pipeline.launch.torchrun import processes_per_node, torchrun_command


def test_the_script_gets_nothing_but_the_job_file() -> None:
    command = torchrun_command("some.entry_point", Path("/jobs/job.json"), 4)
    assert command[:4] == [sys.executable, "-P", "-m", "embed_pipeline.launch.agent"]
    assert command[-3:] == ["-m", "some.entry_point", "/jobs/job.json"]
    assert {"--nproc-per-node=4", "--nnodes=1", "--rdzv-backend=files", "--log-dir=/jobs/logs"} <= set(command)


def test_torchrun_knows_every_option() -> None:
    from torch.distributed.run import parse_args

    arguments = parse_args(torchrun_command("some.entry_point", Path("/jobs/job.json"), 2)[4:])
    assert (arguments.training_script, arguments.training_script_args) == ("some.entry_point", ["/jobs/job.json"])
    assert (arguments.nproc_per_node, arguments.shutdown_timeout, arguments.tee) == (
        "2",
        torchrun.SHUTDOWN_SECONDS,
        "3",
    )


def test_a_number_of_processes_is_taken_and_a_machine_without_a_gpu_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torchrun, "GPU_DRIVERS", ())
    assert (processes_per_node(3), processes_per_node("auto")) == (3, 1)


def test_every_visible_gpu_gets_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torchrun, "GPU_DRIVERS", (tmp_path,))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes_per_node("auto") == 4


def test_building_a_command_imports_no_torch() -> None:
    code = (
        "import sys; import embed_pipeline.launch.torchrun as t, embed_pipeline.launch.local, "
        "embed_pipeline.training.job; t.processes_per_node('auto'); t.GPU_DRIVERS[0].exists() or "
        "sys.exit('torch' in sys.modules or 'dagster' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
