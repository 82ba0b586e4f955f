"""A training on a real Ray cluster of one node."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from small_problem import launch, processes_of, read_output
from test_one_process import same_weights

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.job import Site, launch_job
from embed_pipeline.settings import LaunchSettings
from embed_pipeline.training.job import TrainingJob

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        port, dashboard = (one.getsockname()[1] for one in sockets)
    head = subprocess.Popen(
        [
            *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2", "--disable-usage-stats"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", dashboard), 1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        head.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()


def test_a_training_is_done_followed_and_stopped(
    address: str, job_of: Callable[..., TrainingJob], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site = Site(LaunchSettings(kind="ray", address=address), tmp_path)
    job = job_of("embedder", tmp_path / "output", 2)
    launch_job(job, job.write(job.output / "job.json"), None, site)
    assert "'loss'" in capfd.readouterr().out
    alone = job_of("embedder", tmp_path / "alone" / "output", 2)
    launch(alone, tmp_path / "alone")
    assert same_weights(read_output(job), read_output(alone))

    broken = job_of("embedder", tmp_path / "broken", 1, learning_rate=100.0, weight_decay=10.0, epochs=100)
    with pytest.raises(TrainingError, match=r"^the loss became nan"):
        launch_job(broken, broken.write(broken.output / "job.json"), None, site)

    endless = job_of("embedder", tmp_path / "endless", 2, epochs=10_000, logging_steps=1)

    def interrupt() -> None:
        log = endless.output / "training_log.jsonl"
        if log.is_file() and '"loss"' in log.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch_job(endless, endless.write(endless.output / "job.json"), None, site, on_poll=interrupt)
    deadline = time.monotonic() + 15
    while processes_of(endless):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_cluster_that_is_not_there_is_told(job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    site = Site(LaunchSettings(kind="ray", address="http://127.0.0.1:1"), tmp_path)
    job = job_of("embedder", tmp_path / "output")
    with pytest.raises(TrainingError, match=r"no Ray cluster took the job at http://127\.0\.0\.1:1") as raised:
        launch_job(job, job.write(job.output / "job.json"), None, site)
    assert raised.value.passing
