"""MLflow slow, full, gone, back again: the work goes on, and MLflow has everything in the end, once and in order."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.entities import Run
from mlflow.utils.validation import _validate_metric, _validate_param_name

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.command_line import main
from embed_pipeline.settings import TrackingSettings
from embed_pipeline.tracking.delivery import Sender, replay
from embed_pipeline.tracking.journal import Journal, journals, waiting
from embed_pipeline.tracking.metrics import MetricsLogger, SystemMetrics, valid_name
from embed_pipeline.tracking.runs import TrackedRun, tracked_run
from embed_pipeline.tracking.server import tracking_uri
from tests.tracking.mlflow_server import MlflowServer, wait_until

NOBODY = "http://127.0.0.1:9"  # the port of the discard service, which no machine offers any more


@pytest.fixture
def store(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineStore:
    """A store beside an MLflow on SQLite."""
    shutil.copy2(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return PipelineStore(tmp_path / "store", "support")


@pytest.fixture(scope="module")
def running(empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    shutil.copy2(empty_mlflow, server.database)
    server.start()
    yield server
    server.stop()


@contextmanager
def opened(store: PipelineStore, goes_on: str | None = None, dagster_run_id: str = "dagster-1") -> Iterator[TrackedRun]:
    settings = TrackingSettings(system_metrics=False)
    with tracked_run(settings, store, "embedder", dagster_run_id, goes_on=goes_on) as run:
        yield run


def runs_of(asset: str = "embedder") -> list[Run]:
    client = client_of()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`embed_pipeline.asset` = '{asset}'"))


def client_of() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri())


def history(run: Run, name: str) -> list[tuple[int, float]]:
    found = client_of().get_metric_history(run.info.run_id, name)
    return [(metric.step, metric.value) for metric in found]


def log(run: TrackedRun, steps: range) -> None:
    """As rank 0 of a training does."""
    logger = MetricsLogger(run.journal, system_metrics=False)
    for step in steps:
        logger.log({"loss": 1 / step, "dev_ndcg@10": step / 1000}, step)
    logger.close()


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in steps]


def test_mlflow_is_told_everything_and_the_journal_goes(store: PipelineStore) -> None:
    many = {f"parameter {number}": number for number in range(250)}  # MLflow takes a hundred at once
    with opened(store) as run:
        run.log_parameters({"optimizer": many})
        log(run, range(1, 1501))  # and a thousand metrics
        run.log_metrics({"systems/a@5": 0.5})

    (found,) = runs_of()
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.parameter 249"] == "249"
    assert history(found, "loss") == expected(range(1, 1501))
    assert len(history(found, "dev_ndcg_at_10")) == 1500
    assert found.data.metrics["systems/a_at_5"] == 0.5
    assert run.link.endswith(found.info.run_id)
    assert journals(store.folder) == []


def test_where_mlflow_is_away_from_the_start_the_run_is_made_later(
    store: PipelineStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY.replace("//", "//me:secret@"))
    with opened(store) as run:
        run.log_parameters({"learning_rate": 0.1})
        log(run, range(1, 4))
        assert not run.is_in_mlflow
    (left,) = waiting(store.folder)
    assert (left.metrics, left.others) == (6, 3)
    assert f"6 metrics and 3 other lines of embedder wait in {left.journal.path}" in caplog.text
    assert "`embed-pipeline replay-metrics support`" in caplog.text
    assert "secret" not in caplog.text

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with tracked_run(TrackingSettings(system_metrics=False), store, "evaluation", "dagster-1"):
        pass  # the next run of the pipeline takes it along

    (found,) = runs_of()
    assert found.info.status == "FINISHED"
    assert found.info.end_time - found.info.start_time < 60_000  # its own times, not those of the replay
    assert found.data.params == {"learning_rate": "0.1"}
    assert history(found, "loss") == expected(range(1, 4))
    assert found.data.tags["mlflow.parentRunId"] == runs_of("run")[0].info.run_id
    assert waiting(store.folder) == journals(store.folder) == []


def test_a_server_that_hangs_holds_nothing_up_and_has_everything_when_it_goes_on(
    store: PipelineStore, running: MlflowServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.uri)
    with opened(store) as run:
        wait_until(lambda: run._sender.flush(60))
        running.freeze()
        log(run, range(1, 601))  # returns although nothing is answered
        wait_until(lambda: "takes nothing, the work goes on" in caplog.text)
        run.log_folder(store.folder, "model")
        assert "MLflow did not take model" in caplog.text
        running.thaw()
        wait_until(lambda: run._sender.flush(60))
    wait_until(lambda: replay(store.folder, seconds=None) == [])

    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.database_uri)
    (found,) = runs_of()
    assert found.info.status == "FINISHED"
    assert history(found, "loss") == expected(range(1, 601))
    assert found.data.tags["embed_pipeline.in_the_store_only.model"] == "support"


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_everything_in_the_end(
    store: PipelineStore, running: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.uri)
    with tracked_run(TrackingSettings(system_metrics=False), store, "exports", "dagster-3") as run:
        log(run, range(1, 11))
        wait_until(lambda: run._sender.flush(60))
        running.stop()
        log(run, range(11, 21))
        assert not run._sender.flush(60)
        running.start()
        wait_until(lambda: run._sender.flush(60))
        running.stop()
        log(run, range(21, 31))
    assert [left.metrics for left in waiting(store.folder)] == [20]
    running.start()

    wait_until(lambda: replay(store.folder, seconds=None) == [])

    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.database_uri)
    (found,) = runs_of("exports")
    assert found.info.status == "FINISHED"
    assert history(found, "loss") == expected(range(1, 31))


def test_what_a_full_disk_of_the_server_refuses_is_taken_when_there_is_room(
    store: PipelineStore, running: MlflowServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.uri)
    with tracked_run(TrackingSettings(system_metrics=False), store, "reranker", "dagster-2") as run:
        wait_until(lambda: run._sender.flush(60))
        running.fill_disk()
        log(run, range(1, 1001))
        wait_until(lambda: "takes nothing, the work goes on" in caplog.text)
        assert re.search("disk is full|disk I/O error", running.log.read_text())  # SQLite's words
        running.make_room()
        log(run, range(1001, 1011))
        wait_until(lambda: run._sender.flush(60))
    wait_until(lambda: replay(store.folder, seconds=None) == [])

    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.database_uri)
    (found,) = runs_of("reranker")
    assert found.info.status == "FINISHED"
    assert history(found, "loss") == expected(range(1, 1011))


def test_a_run_that_goes_on_tells_no_step_twice(store: PipelineStore) -> None:
    with suppress(RuntimeError), opened(store) as run:
        log(run, range(1, 7))
        run.journal.append({"metrics": {"system/cpu": 1.0}, "step": 0, "at": 1})
        raise RuntimeError("the training died after step 6")
    (failed,) = runs_of()
    assert failed.info.status == "FAILED"

    with opened(store, goes_on=run.journal.name, dagster_run_id="dagster-2") as again:
        assert again.goes_on
        log(again, range(4, 11))  # from the checkpoint of step 3
        assert again._sender.flush(60)
        assert runs_of()[0].info.status == "RUNNING"
        assert SystemMetrics(again.journal)._step == 1

    (found,) = runs_of()
    assert (found.info.run_id, found.info.status) == (failed.info.run_id, "FINISHED")
    parents = {parent.info.run_id: parent for parent in runs_of("run")}
    assert parents.pop(found.data.tags["mlflow.parentRunId"]).data.tags["dagster.run_id"] == "dagster-2"
    assert [parent.info.status for parent in parents.values()] == ["FAILED"]
    assert history(found, "loss") == expected(range(1, 11))


def test_a_deleted_experiment_is_told_with_what_restores_it_and_has_everything_afterwards(
    store: PipelineStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the run is made, and while it is told: metrics wait, and nobody's run is made twice."""
    with opened(store) as run:
        assert run._sender.flush(60)
        experiment = run.experiment_id
        client_of().delete_experiment(experiment)
        log(run, range(1, 4))
    restore = f"the experiment 'support' (id {experiment}) was deleted in MLflow. Restore it"
    command = f"mlflow experiments restore -x {experiment}"
    assert restore in caplog.text
    assert command in caplog.text
    caplog.clear()
    with opened(store) as second:
        log(second, range(1, 4))
    assert command in caplog.text
    assert [command in left.sentence for left in waiting(store.folder)] == [True, True]
    told = CliRunner().invoke(main, ["replay-metrics", "support"])
    assert told.exit_code == 1
    assert command in told.output

    restored = [sys.executable, "-m", "mlflow", "experiments", "restore", "-x", experiment]
    subprocess.run(restored, env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri()}, check=True, capture_output=True)
    assert replay(store.folder, seconds=None) == []
    found = runs_of()
    assert [history(one, "loss") for one in found] == [expected(range(1, 4))] * 2
    assert all(left.sentence == "" for left in waiting(store.folder))


def test_what_was_sent_before_an_answer_was_lost_is_kept_once(store: PipelineStore) -> None:
    with opened(store) as run:
        log(run, range(1, 6))
        run.log_parameters({"learning_rate": 0.1})
        assert run._sender.flush(60)
        run._sender._mark(bytes=0, run_id=None)  # as if killed before it marked anything, after it asked for a run
        assert run._sender.flush(60)

    (found,) = runs_of()
    assert history(found, "loss") == expected(range(1, 6))


KILLED = """
import os, signal, sys
from pathlib import Path
from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.settings import TrackingSettings
from embed_pipeline.tracking.metrics import MetricsLogger
from embed_pipeline.tracking.runs import tracked_run

store = PipelineStore(Path(sys.argv[1]), "support")
with tracked_run(TrackingSettings(system_metrics=False), store, "embedder", None) as run:
    logger = MetricsLogger(run.journal, system_metrics=False)
    for step in (1, 2):
        logger.log({"loss": 1 / step}, step)
    with run.journal.path.open("a") as file:
        file.write('{"metrics": {"loss": 0.3')
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_journal_whose_process_was_killed_is_sent_and_its_run_ends_killed(store: PipelineStore) -> None:
    arguments = [sys.executable, "-c", KILLED, str(store.folder.parent)]
    process = subprocess.run(arguments, env={**os.environ, "MLFLOW_TRACKING_URI": NOBODY}, check=False)
    assert process.returncode == -signal.SIGKILL
    (journal,) = journals(store.folder)

    assert replay(store.folder, seconds=None) == []

    (found,) = runs_of()
    assert found.info.status == "KILLED"
    assert history(found, "loss") == expected(range(1, 3))
    with opened(store, goes_on=journal.name) as run:  # its training may still go on
        log(run, range(2, 4))
    (found,) = runs_of()
    assert (found.info.status, history(found, "loss")) == ("FINISHED", expected(range(1, 4)))


def test_the_command_sends_what_waits_and_fails_where_it_cannot(
    store: PipelineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    with opened(store) as run:
        log(run, range(1, 4))

    refused = CliRunner().invoke(main, ["replay-metrics", "support"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sent = CliRunner().invoke(main, ["replay-metrics", "support"])

    assert refused.exit_code == 1
    assert f"MLflow at {NOBODY} was not told: 6 metrics and 2 other lines of embedder wait in" in refused.output
    assert sent.exit_code == 0, sent.output
    assert "sent: 6 metrics and 2 other lines of embedder waited in" in sent.output
    assert "MLflow has everything of support" in sent.output
    assert history(runs_of()[0], "loss") == expected(range(1, 4))


def test_a_run_that_is_at_work_is_left_alone(store: PipelineStore) -> None:
    with opened(store) as run:
        replay(store.folder, seconds=None)
        assert run.journal.ended is None
        with pytest.raises(BlockingIOError):
            Sender(run.journal)


def test_what_mlflow_refuses_for_good_holds_nothing_up(store: PipelineStore, caplog: pytest.LogCaptureFixture) -> None:
    with opened(store) as run:
        run.log_parameters({"epochs": 1})
        run.log_parameters({"epochs": 2, "seed": 3})
        log(run, range(1, 3))

    (found,) = runs_of()
    assert found.data.params == {"epochs": "1", "seed": "3"}
    assert history(found, "loss") == expected(range(1, 3))
    assert f"MLflow refuses params epochs = 2 of run {found.info.run_id}" in caplog.text


def test_a_run_that_a_person_deleted_is_made_again_with_everything(
    store: PipelineStore, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(store) as run:
        log(run, range(1, 4))
        assert run._sender.flush(60)
        deleted = run.run_id
        client_of().delete_run(deleted)
        log(run, range(4, 6))
        wait_until(lambda: run._sender.flush(60))
        assert run.run_id != deleted

    (found,) = runs_of()
    assert history(found, "loss") == expected(range(1, 6))
    assert f"MLflow run {deleted} is gone" in caplog.text


def test_a_training_whose_journal_cannot_be_written_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal.new(tmp_path, "embedder", {"pipeline": "support"})
    logger = MetricsLogger(journal, system_metrics=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 20, hard))  # half a line
        for step in (1, 2):
            logger.log({"loss": 0.5, "epoch": 0.1}, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    logger.log({"loss": 0.25}, 3)
    logger.close()

    assert [entry["step"] for entry, _ in journal.read() if "metrics" in entry] == [3]
    assert "the metrics of step 1 go to training_log.jsonl only" in caplog.text
    assert "4 metrics could not be written" in caplog.text


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("ndcg@10", "ndcg_at_10"),
        ("dev_shop/hits@1 (%)", "dev_shop/hits_at_1 ___"),
        ("/a//b/../c/.", "a/b/c"),
        ("", "_"),
        ("问题/recall", "问题/recall"),
    ],
)
def test_names_are_such_as_mlflow_takes(name: str, valid: str) -> None:
    assert valid_name(name) == valid
    assert valid_name(valid) == valid
    _validate_metric(valid, 1.0, 0, 0)
    _validate_param_name(valid)


def test_long_names_are_shortened_and_stay_different() -> None:
    first, second = (valid_name(f"{'very/' * 60}{end}") for end in ("a", "b"))
    assert first != second
    for name in (first, second):
        _validate_metric(name, 1.0, 0, 0)
