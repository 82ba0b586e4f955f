"""A training opens no port that others could reach. Several nodes, Slurm and services: beside their own tests."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from small_problem import launch, read_output

from embed_pipeline.training.job import TrainingJob
from tests.listening import LOOPBACK, Seen, watched


@pytest.mark.parametrize(("kind", "processes"), [("training, one process", 1), ("training, two processes", 2)])
def test_a_training_on_this_machine_listens_on_loopback_at_most(
    kind: str, processes: int, job_of: Callable[..., TrainingJob], tmp_path: Path
) -> None:
    job = job_of("embedder", tmp_path / "output", processes, max_steps=2)
    with watched(kind) as seen:
        launch(job, tmp_path)
    assert read_output(job).summary["steps"] == 2
    assert any("embed_pipeline.launch.agent" in process for process in seen.processes)
    # Two exchange gradients over loopback: what listens is seen.
    assert bool(seen.addresses.keys() & LOOPBACK) == (processes > 1)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_who_listens_on_all_interfaces_is_found(host: str) -> None:
    family = "AF_INET6" if ":" in host else "AF_INET"
    code = (
        f"import socket, sys; s = socket.socket(socket.{family}); s.bind(({host!r}, 0)); s.listen(); "
        "print('there', flush=True); sys.stdin.read()"
    )
    if family == "AF_INET6" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        seen = Seen()
        seen.look([psutil.Process(process.pid)])
        with pytest.raises(AssertionError, match="training, two processes listens on"):
            seen.check("training, two processes")
        process.stdin.close()
