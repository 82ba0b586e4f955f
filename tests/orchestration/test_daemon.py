"""The real daemon against a real instance: files are dropped, the DAG trains; nothing is dropped, it rests."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import dagster as dg
import psutil
import pyarrow.parquet as pq
import pytest

from tests.orchestration.conftest import SmallPipeline

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 240.0  # of each wait; a busy machine takes its time
T = TypeVar("T")


@pytest.mark.slow
def test_a_dropped_file_is_trained_on_and_then_the_daemon_rests(make_pipeline: Callable[..., SmallPipeline]) -> None:
    small = make_pipeline(
        automation={"watch": True, "watch_interval_seconds": 1, "retrain": "on_change", "retries": 0},
        tracking={"system_metrics": False},
    )
    # Whole files come into the folder by one rename, as an export should deliver them.
    raw = small.yaml_file.parent / "raw"
    pairs = (raw / "pairs.parquet").rename(small.home / "pairs.parquet")
    with daemon(small) as watched:
        pairs.rename(raw / "pairs.parquet")
        first = watched.finished("small_ingest")
        assert first.status == dg.DagsterRunStatus.SUCCESS
        assert first.tags["embed_pipeline/reason"] == "1 file settled, with a new content"

        training = watched.finished("__ASSET_JOB")
        assert training.tags["dagster/sensor_name"] == "small_retraining"
        assert training.tags["dagster/max_runtime"] == str(24 * 3600)
        # Whether so small a model passes the gate is not the question here, but it was asked, and nothing else failed.
        assert watched.failed_steps(training) <= {"small__evaluation_gate"}
        evaluation = small.store.current("evaluation")
        assert evaluation.manifest.runs.dagster == training.run_id
        assert evaluation.input("cleaned_pairs") == small.store.current("cleaned_pairs").version

        watched.looks_twice()
        assert len(watched.runs()) == 2, "nothing was dropped"

        doubles = pq.read_table(raw / "pairs.parquet").slice(0, 2)
        pq.write_table(doubles, small.home / "doubles.parquet")
        (small.home / "doubles.parquet").rename(raw / "doubles.parquet")
        second = watched.finished("small_ingest")
        assert second.run_id != first.run_id
        assert second.status == dg.DagsterRunStatus.SUCCESS
        assert small.store.current("cleaned_pairs").report["rejected_rows"] == 2
        watched.looks_twice()
        assert len(watched.runs()) == 3, "rows that are rejected train nothing"


class Daemon:
    """What the daemon does, as its instance tells."""

    def __init__(self, instance: dg.DagsterInstance, process: subprocess.Popen[bytes], log: Path) -> None:
        self.instance, self.process, self.log = instance, process, log
        self.seen: set[str] = set()

    def runs(self) -> list[dg.DagsterRun]:
        return list(self.instance.get_runs())

    def finished(self, job: str) -> dg.DagsterRun:
        """The next finished run of a job."""

        def found() -> dg.DagsterRun | None:
            new = (run for run in self.runs() if run.run_id not in self.seen)
            return next((run for run in new if run.job_name == job and run.is_finished), None)

        run = self.eventually(found, f"no run of {job}")
        self.seen.add(run.run_id)
        return run

    def failed_steps(self, run: dg.DagsterRun) -> set[str | None]:
        events = self.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        return {event.dagster_event.step_key for event in events if event.dagster_event}

    def looks_twice(self) -> None:
        """Until both sensors have looked twice after now."""
        now = time.time()
        states = {state.instigator_name: state for state in self.instance.all_instigator_state()}

        def looked(sensor: str) -> bool:
            state = states[sensor]
            ticks = self.instance.get_ticks(state.instigator_origin_id, state.selector_id, after=now)
            return sum(tick.is_completed for tick in ticks) >= 2

        self.eventually(
            lambda: all(looked(f"small_{name}") for name in ("raw_files", "retraining")), "the sensors look no more"
        )

    def eventually(self, found: Callable[[], T | None], complaint: str) -> T:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (result := found()):
            assert self.process.poll() is None, f"the daemon ended\n{self.log.read_text()[-5000:]}"
            assert time.monotonic() < deadline, f"{complaint}\n{self.log.read_text()[-5000:]}"
            time.sleep(0.2)
        return result


@contextlib.contextmanager
def daemon(small: SmallPipeline) -> Iterator[Daemon]:
    """`dagster-daemon run` on the repository's own workspace and instance settings, ended with all it started."""
    shutil.copy(REPOSITORY / "dagster_home" / "dagster.yaml", small.home / "dagster.yaml")
    log = small.home / "daemon.log"
    # Opened first: two processes that make the same SQLite files at the same time get in each other's way.
    with dg.DagsterInstance.from_config(str(small.home)) as instance, log.open("wb") as output:
        instance.all_instigator_state()
        process = subprocess.Popen(
            [Path(sys.executable).with_name("dagster-daemon"), "run", "-w", "workspace.yaml"],
            cwd=REPOSITORY,
            env={**os.environ, "EMBED_PIPELINE_DEFS": str(small.folder)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Daemon(instance, process, log)
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the daemon in order, and kill what is left of the processes it started."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()  # it ignores SIGINT when it runs in the background
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    _, left = psutil.wait_procs(family, timeout=30)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.kill()
    process.wait()
