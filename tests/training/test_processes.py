"""What is left of the processes of a training that does not end by itself: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from small_problem import launch

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.torchrun import torchrun_command
from embed_pipeline.training.job import TrainingJob


@pytest.fixture
def endless(job_of: Callable[..., TrainingJob], tmp_path: Path) -> TrainingJob:
    """With processes that load data, and ranks that put off a SIGTERM until the next logged step: here, for ever."""
    settings = {"epochs": 10_000, "early_stopping_patience": 100, "logging_steps": 1_000_000}
    job = job_of("embedder", tmp_path / "output", 2, **settings, arguments={"dataloader_num_workers": 1})
    job.write(tmp_path / "job.json")
    return job


def wait_for_steps(job: TrainingJob) -> None:
    deadline = time.monotonic() + 60
    log = job.output / "training_log.jsonl"
    while not (log.is_file() and '"loss"' in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def started_torchrun() -> psutil.Process:
    """The one that this process started; other tests may have left helpers of other libraries among its children."""
    (torchrun,) = (p for p in psutil.Process().children() if "embed_pipeline.launch.agent" in p.cmdline())
    return torchrun


def workers(torchrun: psutil.Process) -> list[psutil.Process]:
    return [child for child in torchrun.children() if "embed_pipeline.training.embedder" in child.cmdline()]


def started_rank_1() -> psutil.Process:
    (rank_1,) = (rank for rank in workers(started_torchrun()) if rank.environ()["RANK"] == "1")
    return rank_1


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_killing_the_launching_process_ends_every_rank(endless: TrainingJob, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import small_problem as s; from pathlib import Path; "
        "from embed_pipeline.training.job import EmbedderJob as J; f = Path(sys.argv[2]); s.launch(J.read(f), f.parent)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "job.json")])
    wait_for_steps(endless)
    family: list[psutil.Process] = []
    while len(family) < 5:  # torchrun, two ranks, a loader of each, which comes and goes with the epochs
        family = psutil.Process(launcher.pid).children(recursive=True)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_an_interrupt_ends_every_rank(endless: TrainingJob, tmp_path: Path) -> None:
    family: list[psutil.Process] = []
    began: list[float] = []

    def interrupt() -> None:
        log = endless.output / "training_log.jsonl"
        if log.is_file() and '"loss"' in log.read_text():
            torchrun = started_torchrun()
            family[:] = [torchrun, *torchrun.children(recursive=True)]
            if len(family) >= 5:  # the loaders come and go with the epochs
                began.append(time.monotonic())
                raise KeyboardInterrupt

    command = torchrun_command(endless.entry_point, tmp_path / "job.json", 2)
    with pytest.raises(KeyboardInterrupt):
        run_local(command, env={}, error_file=tmp_path / "error.json", on_poll=interrupt)
    assert time.monotonic() - began[0] < 12  # 9 by the deadlines, and what comes after may take the rest of 15
    # Whoever has taken over the loaders of a killed rank may not have asked for their exit codes yet.
    _, alive = psutil.wait_procs(family, timeout=1)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_rank_that_is_killed_is_the_cause(endless: TrainingJob, tmp_path: Path) -> None:
    def kill_rank_1() -> None:
        wait_for_steps(endless)
        rank_1 = started_rank_1()
        rank_1.kill()

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(TrainingError, match=r"rank 1 was ended by SIGKILL: killed, .*lower batch_size") as raised:
        launch(endless, tmp_path)
    killer.join()
    assert raised.value.passing


def test_a_preempted_training_may_be_tried_again(endless: TrainingJob, tmp_path: Path) -> None:
    def preempt() -> None:
        wait_for_steps(endless)
        started_torchrun().terminate()

    preemption = threading.Thread(target=preempt)
    preemption.start()
    with pytest.raises(TrainingError) as raised:
        launch(endless, tmp_path)
    preemption.join()
    assert raised.value.passing, str(raised.value)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_training_in_time(job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    job = job_of(
        "embedder", tmp_path / "output", 2, epochs=10_000, early_stopping_patience=100, logging_steps=1,
        collective_timeout_minutes=0.2,
    )  # fmt: skip

    def stop_rank_1() -> None:
        wait_for_steps(job)
        rank_1 = started_rank_1()
        rank_1.suspend()

    stopper = threading.Thread(target=stop_rank_1)
    stopper.start()
    with pytest.raises(TrainingError, match=r"did not take part in an exchange within 0\.2 minutes") as raised:
        launch(job, tmp_path)
    stopper.join()
    assert raised.value.passing
