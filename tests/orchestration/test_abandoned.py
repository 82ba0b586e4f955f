"""Runs that a killed code location left behind."""

from __future__ import annotations

import time

import dagster as dg
import pytest
from click.testing import CliRunner

from embed_pipeline.orchestration.abandoned import fail_abandoned_runs, main

OURS = {"dagster/code_location": "embed_pipeline", ".dagster/grpc_info": '{"host": "code", "port": 4000}'}
STARTED = dg.DagsterRunStatus.STARTED


@dg.job
def training() -> None:
    """A job without steps: only what is recorded of its runs matters here."""


def started_run(instance: dg.DagsterInstance, tags: dict[str, str]) -> str:
    """The id of a run that stands as started, since now, and whose process is gone."""
    run = instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTING, tags=tags)
    event = dg.DagsterEvent(event_type_value="PIPELINE_START", job_name="training")
    instance.report_dagster_event(event, run_id=run.run_id)
    return run.run_id


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def test_runs_of_the_server_before_are_failed_and_those_of_this_one_go_on() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        before = started_run(instance, OURS)
        restarted = time.time()
        after = started_run(instance, OURS)

        ended = fail_abandoned_runs(instance, "embed_pipeline", restarted)

        assert ended == [before]
        assert status(instance, before) == dg.DagsterRunStatus.FAILURE
        assert status(instance, after) == STARTED
        messages = [entry.message for entry in instance.all_logs(before, dg.DagsterEventType.RUN_FAILURE)]
        assert any("killed while it worked on this run" in message for message in messages)


@pytest.mark.parametrize(
    "tags",
    [
        pytest.param({**OURS, "dagster/code_location": "another"}, id="of another code location"),
        pytest.param({"dagster/code_location": "embed_pipeline"}, id="of a command line, which no server's end ends"),
    ],
)
def test_other_runs_are_left_alone(tags: dict[str, str]) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run_id = started_run(instance, tags)

        assert fail_abandoned_runs(instance, "embed_pipeline", time.time() + 60) == []
        assert status(instance, run_id) == STARTED


def test_the_command_ends_the_mlflow_runs_too(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    import mlflow

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    with dg.DagsterInstance.get() as instance:
        killed, other = started_run(instance, OURS), started_run(instance, {})
        client = mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
        experiment = client.create_experiment("small", artifact_location=home.as_uri())
        runs = {
            run_id: client.create_run(experiment, tags={"dagster.run_id": run_id}).info.run_id
            for run_id in (killed, other)
        }

        done = CliRunner().invoke(main, ["embed_pipeline", "--started-before", str(time.time() + 60)])

        assert done.exit_code == 0, done.output
        assert f"run {killed} was abandoned" in done.output
        assert status(instance, killed) == dg.DagsterRunStatus.FAILURE
        assert client.get_run(runs[killed]).info.status == "KILLED"
        assert client.get_run(runs[other]).info.status == "RUNNING"
