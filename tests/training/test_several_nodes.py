"""A training on two nodes: on loopback, and in two network namespaces that see each other through one cable."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from small_problem import Trained, launch, read_output
from test_one_process import same_weights

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.job import Site, launch_job
from embed_pipeline.settings import LaunchSettings
from embed_pipeline.training.job import TrainingJob
from tests.joined_node import joined
from tests.listening import LOOPBACK, watched

# What a launching machine does; a training that lost a node is launched again, as Dagster's retry would.
LEADER = textwrap.dedent(
    """
    import logging, sys
    from pathlib import Path
    from embed_pipeline.errors import TrainingError
    from embed_pipeline.launch.job import Site, launch_job
    from embed_pipeline.settings import LaunchSettings
    from embed_pipeline.training.job import EmbedderJob

    logging.basicConfig(level=logging.INFO)
    file, store, network = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    site = Site(LaunchSettings(kind="nodes", nnodes=2, network=network), store / "shop" / ".nodes")
    for again in (True, False):
        try:
            launch_job(EmbedderJob.read(file), file, None, site)
            break
        except TrainingError as error:
            print(f"FAILED passing={error.passing}: {error}", flush=True)
            if not (again and error.passing):
                raise
    """
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How many processes share a machine's cores decides the last bits: with one core it is the same everywhere."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun sets it where a node has several processes
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def undisturbed(job_of: Callable[..., TrainingJob], folder: Path, **settings: object) -> Trained:
    """The same two ranks on this machine alone."""
    job = job_of("embedder", folder / "alone", 2, **settings)
    folder.joinpath("alone").mkdir()
    launch(job, folder / "alone")
    return read_output(job)


def test_two_nodes_do_one_training_and_a_failure_on_either_ends_both(
    job_of: Callable[..., TrainingJob], tmp_path: Path
) -> None:
    shop = tmp_path / "store" / "shop"
    site = Site(LaunchSettings(kind="nodes", nnodes=2, network="127.0.0.0/8"), shop / ".nodes")
    with joined(tmp_path / "store", tmp_path / "join.log") as joiner:
        job = job_of("embedder", shop / "output", 2)
        with watched("training, two nodes on the network lo") as seen:
            launch_job(job, job.write(job.output / "job.json"), None, site)
        assert all(any(f"=rank={rank},network=" in process for process in seen.processes) for rank in (0, 1))
        assert seen.addresses.keys() & LOOPBACK
        assert same_weights(read_output(job), undisturbed(job_of, tmp_path))
        # Nothing is left of it, and the same node joins the next one.
        assert list(site.announcements.iterdir()) == []
        broken = job_of("embedder", shop / "broken", 2, learning_rate=100.0, weight_decay=10.0, epochs=100)
        with pytest.raises(TrainingError, match="the loss became nan"):
            launch_job(broken, broken.write(broken.output / "job.json"), None, site)
        wait_until(lambda: joiner.children() == [], joiner, 30)


def test_too_few_nodes_and_a_silent_one_are_told(
    job_of: Callable[..., TrainingJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = LaunchSettings(kind="nodes", nnodes=2, network="lo", wait_minutes=0.01)
    site = Site(launch, tmp_path / ".nodes")
    job = job_of("embedder", tmp_path / "output", 2)
    file = job.write(job.output / "job.json")
    with pytest.raises(TrainingError, match=r"0 of 1 other nodes joined within .* Run `embed-pipeline join`"):
        launch_job(job, file, None, site)

    def sits_down() -> None:
        for announced in tmp_path.glob(".nodes/*/job.json"):
            announced.with_name("seat-1").touch()

    monkeypatch.setattr("embed_pipeline.launch.heartbeat.SILENCE_SECONDS", 0.5)
    with pytest.raises(TrainingError, match="the node of seat-1 was not heard of for 0 s: it is down") as raised:
        launch_job(job, file, None, site, on_poll=sits_down)
    assert raised.value.passing
    assert not any((tmp_path / ".nodes").iterdir())


@pytest.fixture
def two_networks() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Commands that put another into one of two network namespaces, 10.77.0.1 and 10.77.0.2."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"ep{os.getpid()}{side}" for side in "ab"]
    cables = [f"v{os.getpid()}{side}" for side in "ab"]
    steps = [
        *(f"netns add {name}" for name in names),
        f"link add {cables[0]} type veth peer name {cables[1]}",
        *(f"link set {cable} netns {name}" for cable, name in zip(cables, names, strict=True)),
        *(f"-n {name} link set lo up" for name in names),
        *(f"-n {name} link set {cable} up" for cable, name in zip(cables, names, strict=True)),
        *(f"-n {name} addr add 10.77.0.{i + 1}/24 dev {cables[i]}" for i, name in enumerate(names)),
    ]
    try:
        for step in steps:
            made = subprocess.run(["ip", *step.split()], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: ip {step}: {made.stderr.strip()}")
        first, second = (("ip", "netns", "exec", name) for name in names)
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_node_that_dies_ends_the_other_and_a_new_launch_ends_with_the_same_weights(
    job_of: Callable[..., TrainingJob],
    tmp_path: Path,
    two_networks: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    first, second = two_networks
    settings = {"checkpoint_minutes": 0, "logging_steps": 2, "epochs": 3}
    store = tmp_path / "store"
    job = job_of("embedder", store / "shop" / "output", 2, **settings)
    file = job.write(job.output / "job.json")
    with (tmp_path / "leader.log").open("w") as log:
        leader = psutil.Popen(
            [*first, sys.executable, "-c", LEADER, str(file), str(store), "10.77.0.0/24"],
            stdout=log,
            stderr=log,
        )
    try:
        with joined(store, tmp_path / "join.log", *second) as node:
            wait_until(lambda: (job.output / "checkpoints" / "step-4").is_dir(), leader)
            for process in (*node.children(recursive=True), node):  # as when the power is cut
                process.send_signal(signal.SIGKILL)
        wait_until(lambda: "FAILED passing=True" in (tmp_path / "leader.log").read_text(), leader)
        with joined(store, tmp_path / "join.log", *second):
            assert leader.wait(120) == 0, (tmp_path / "leader.log").read_text()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            leader.kill()
    assert "going on after step" in (tmp_path / "leader.log").read_text() + (tmp_path / "join.log").read_text()
    assert same_weights(read_output(job), undisturbed(job_of, tmp_path, **settings))


def wait_until(true: Callable[[], bool], alive: psutil.Popen, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        assert alive.poll() is None
        time.sleep(0.05)
