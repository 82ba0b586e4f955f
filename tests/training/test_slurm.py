"""A training in an allocation of a real Slurm cluster of two nodes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import missing, slurm_cluster
from small_problem import processes_of, read_output
from test_one_process import same_weights

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.job import Site, launch_job
from embed_pipeline.launch.slurm import sbatch_script
from embed_pipeline.settings import LaunchSettings
from embed_pipeline.training.job import EmbedderJob, TrainingJob
from tests.listening import LOOPBACK, naming, watched

needs_slurm = pytest.mark.skipif(
    bool(missing()), reason=f"needs Slurm, Debian's packages slurm-wlm and munge: {', '.join(missing())} not found"
)
ENDLESS = {"epochs": 10_000, "early_stopping_patience": 100, "logging_steps": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    with slurm_cluster() as configuration:
        yield configuration


@pytest.fixture
def allocated(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Do a job on the cluster."""
    monkeypatch.setenv("SLURM_CONF", str(cluster))

    def run(job: TrainingJob, on_poll: Callable[[], None] = lambda: None, nnodes: int = 2, **settings: object) -> None:
        launch = LaunchSettings.model_validate({"kind": "slurm", "nnodes": nnodes, "network": "lo", **settings})
        file = job.write(job.output / "job.json")
        launch_job(job, file, None, Site(launch, Path("unused")), on_poll=on_poll)

    return run


def jobs() -> dict[str, str]:
    """State by id, of what Slurm has not ended."""
    asked = subprocess.run(["squeue", "--noheader", "--format=%i %T"], capture_output=True, text=True, check=True)
    return dict(line.split() for line in asked.stdout.splitlines())


def has_steps(job: TrainingJob) -> bool:
    log = job.output / "training_log.jsonl"
    return log.is_file() and '"loss"' in log.read_text()


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@needs_slurm
def test_a_preempted_training_is_requeued_and_ends_with_the_same_weights(
    job_of: Callable[..., TrainingJob],
    allocated: Callable[..., None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = {"checkpoint_minutes": 60, "logging_steps": 1, "epochs": 3}
    undisturbed = job_of("embedder", tmp_path / "undisturbed", 2, **settings)
    # Slurm's own programs listen as well; who may speak to them, munge decides.
    with watched("training, Slurm on the network lo", naming(f"embed_pipeline.training.embedder {tmp_path}")) as seen:
        allocated(undisturbed)
    assert seen.addresses.keys() & LOOPBACK
    log = capfd.readouterr().out
    assert "is COMPLETED" in log
    assert "'loss'" in log  # followed while it ran
    preempted = job_of("embedder", tmp_path / "preempted", 2, **settings)

    def preempt() -> None:
        until(lambda: has_steps(preempted), 120)
        (id,) = jobs()
        # What Slurm does for a job of higher priority; every rank is told to end.
        subprocess.run(["scontrol", "requeue", id], check=True)

    other = threading.Thread(target=preempt)
    other.start()
    allocated(preempted)
    other.join()
    assert "going on after step" in capfd.readouterr().out
    assert same_weights(read_output(undisturbed), read_output(preempted))
    assert processes_of(preempted) == []


@needs_slurm
def test_a_cancelled_training_leaves_nothing_on_the_cluster(
    job_of: Callable[..., TrainingJob], allocated: Callable[..., None], tmp_path: Path
) -> None:
    job = job_of("embedder", tmp_path / "output", 2, **ENDLESS)
    seen: list[int] = []

    def interrupt() -> None:
        if has_steps(job):
            seen.append(len(processes_of(job)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allocated(job, interrupt)
    assert seen[0] >= 4  # two agents with a rank each
    until(lambda: jobs() == {} and processes_of(job) == [], 15)


@needs_slurm
@pytest.mark.slow
def test_killing_the_launching_process_cancels_the_job(
    job_of: Callable[..., TrainingJob], cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster))
    job = job_of("embedder", tmp_path / "output", 1, **ENDLESS)
    code = (
        "import sys; from pathlib import Path; from embed_pipeline.launch.job import *; f = Path(sys.argv[1]); "
        "from embed_pipeline.training.job import EmbedderJob as J; "
        "launch_job(J.read(f), f, None, Site(LaunchSettings(kind='slurm'), Path()))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(job.write(job.output / "job.json"))])
    until(lambda: has_steps(job), 120)
    launcher.kill()
    launcher.wait()
    until(lambda: jobs() == {} and processes_of(job) == [], 15)


@needs_slurm
def test_the_failing_rank_and_what_slurm_refuses_are_told(
    job_of: Callable[..., TrainingJob], allocated: Callable[..., None], tmp_path: Path
) -> None:
    job = job_of("embedder", tmp_path / "output", 2, learning_rate=100.0, weight_decay=10.0, epochs=100)
    with pytest.raises(TrainingError, match=r"^the loss became nan by step \d+, at learning_rate"):
        allocated(job)
    with pytest.raises(TrainingError, match=r"^sbatch refused the job: invalid partition .*\. See launch.sbatch"):
        allocated(job, sbatch={"partition": "none"})
    assert jobs() == {}


@needs_slurm
def test_what_somebody_else_cancels_is_not_tried_again(
    job_of: Callable[..., TrainingJob], allocated: Callable[..., None], tmp_path: Path
) -> None:
    def cancel() -> None:
        for id in jobs():
            subprocess.run(["scancel", id], check=True)

    # It waits for more cores than there are, so it never runs.
    job = job_of("embedder", tmp_path / "output", 1)
    with pytest.raises(TrainingError, match=r"^Slurm job \d+ was cancelled by somebody else") as raised:
        allocated(job, cancel, nnodes=1, sbatch={"begin": "now+1hour"})
    assert not raised.value.passing


def test_the_script_asks_for_what_the_yaml_says() -> None:
    launch = LaunchSettings.model_validate(
        {
            "kind": "slurm",
            "nnodes": 2,
            "network": "10.0.0.0/24",
            "gpus_per_node": 4,
            "sbatch": {"partition": "gpu", "time": "12:00:00", "exclusive": ""},
            "setup": "module load cuda",
        }
    )
    script = sbatch_script(EmbedderJob.entry_point, Path("/a store/job.json"), 8, launch, "its-name")
    for line in ("--nodes=2", "--gpus-per-node=4", "--partition=gpu", "--time=12:00:00", "--exclusive", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "--nproc-per-node=4" in script
    assert "--rdzv-conf=rank=$SLURM_NODEID,network=10.0.0.0/24," in script
    assert "\nmodule load cuda\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_process_for_each_gpu_that_is_asked_for() -> None:
    from embed_pipeline.launch.torchrun import world_size

    launch = LaunchSettings.model_validate({"kind": "slurm", "nnodes": 2, "network": "ib0", "gpus_per_node": 4})
    assert world_size(launch, "auto") == 8
    assert world_size(launch, 2) == 4
    assert world_size(LaunchSettings(kind="slurm"), "auto") == 1
