"""The deployment at work: a smoke test asked for in the UI, and a training that the daemon starts by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from embed_pipeline.artifacts import SMOKE_TEST_STORE, PipelineStore
from tests.deployment.conftest import Start
from tests.deployment.started_services import StartedServices
from tests.deployment.webserver import Webserver, wait_for

pytestmark = pytest.mark.services

STORE = "/var/lib/embed_pipeline/store"
TRAINED = ("embedder", "reranker", "evaluation")
ASSETS = (*TRAINED, "champion")
RUN_SECONDS = 900


@pytest.fixture(scope="module")
def deployed(start: Start) -> Iterator[StartedServices]:
    with start({"asked": {}}, EMBED_PIPELINE_SMOKE_TEST="1") as services:
        yield services


def assert_tracked(deployed: StartedServices, run_id: str, pipeline: str, assets: tuple[str, ...]) -> None:
    """The MLflow runs of a Dagster run stand in Postgres as finished, their files in the volume."""
    ended = deployed.query(
        "SELECT name, status, artifact_uri FROM runs JOIN tags USING (run_uuid) "
        f"WHERE key = 'dagster.run_id' AND value = '{run_id}'",
        "mlflow",
    )
    runs = {name: (status, uri) for name, status, uri in (line.split("|") for line in ended)}
    for asset in assets:
        status, uri = runs[f"{pipeline}/{asset}"]
        assert status == "FINISHED"
        kept = deployed.path("/var/lib/mlflow/artifacts") / uri.removeprefix("mlflow-artifacts:/")
        assert (kept / "settings.json").is_file()


def test_a_smoke_test_asked_for_in_the_ui_does_the_whole_pipeline(deployed: StartedServices) -> None:
    webserver = Webserver(deployed.address("webserver"))

    run_id = webserver.launch("asked_pipeline")

    assert webserver.wait_until_finished(run_id, RUN_SECONDS) == "SUCCESS", webserver.told(run_id)
    assert "RunEnqueuedEvent" in {event["__typename"] for event in webserver.events(run_id)}  # the daemon started it
    assert "train_loss" in webserver.output(run_id)  # printed in the code location, read by the webserver
    store = PipelineStore(deployed.path(STORE) / SMOKE_TEST_STORE, "asked")
    assert store.current("evaluation").manifest.runs.dagster == run_id
    assert_tracked(deployed, run_id, "asked", ASSETS)
    models = deployed.query("SELECT name, version FROM model_versions ORDER BY name", "mlflow")
    assert models == ["asked-embedder-smoke-test|1", "asked-reranker-smoke-test|1"]


def test_the_daemon_trains_by_itself_on_what_lies_in_the_raw_folder(start: Start) -> None:
    automation = {"watch": True, "watch_interval_seconds": 2, "retrain": "on_change"}
    with start({"unattended": {"automation": automation}}) as deployed:
        webserver = Webserver(deployed.address("webserver"))

        def training() -> dict[str, Any] | None:
            started_by = {run["tags"].get("dagster/sensor_name"): run for run in webserver.runs()}
            return started_by.get("unattended_retraining")

        run_id = wait_for(training, RUN_SECONDS)["runId"]
        webserver.wait_until_finished(run_id, RUN_SECONDS)

        # Whether so small a model passes the gate is not the question here.
        failed = [event["stepKey"] for event in webserver.events(run_id) if "StepFailure" in event["__typename"]]
        assert set(failed) <= {"unattended__evaluation_gate"}, webserver.told(run_id)
        store = PipelineStore(deployed.path(STORE), "unattended")
        assert store.current("evaluation").manifest.runs.dagster == run_id
        assert_tracked(deployed, run_id, "unattended", TRAINED)


def test_a_command_in_the_code_locations_container_is_recorded_as_well(deployed: StartedServices) -> None:
    command = ["dagster", "asset", "materialize", "-m", "embed_pipeline.definitions", "--select", "asked/raw_pairs"]

    done = deployed.execute("code", command)

    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = [run for run in Webserver(deployed.address("webserver")).runs() if run["jobName"] == "__ASSET_JOB"]
    assert run["status"] == "SUCCESS"


def test_a_command_in_the_daemons_container_queues_a_run(deployed: StartedServices) -> None:
    webserver = Webserver(deployed.address("webserver"))
    before = {run["runId"] for run in webserver.runs()}

    done = deployed.execute(
        "daemon", ["dagster", "job", "launch", "--workspace", "workspace.yaml", "--job", "asked_ingest"]
    )

    assert done.returncode == 0, done.stderr[-3000:]
    (run_id,) = {run["runId"] for run in webserver.runs()} - before
    assert webserver.wait_until_finished(run_id, RUN_SECONDS) == "SUCCESS", webserver.told(run_id)
    assert "RunEnqueuedEvent" in {event["__typename"] for event in webserver.events(run_id)}


def test_mlflow_answers_the_code_location_and_this_machine_alone(deployed: StartedServices) -> None:
    def answer(host: str) -> int:
        try:
            ask = Request(f"{deployed.address('mlflow')}/api/2.0/mlflow/experiments/get?experiment_id=0")
            ask.add_header("Host", host)
            with urlopen(ask, timeout=30) as told:
                return int(told.status)
        except HTTPError as error:
            return error.code

    assert [answer(host) for host in ("mlflow:5000", "127.0.0.1:5055", "localhost:5000")] == [200, 200, 200]
    assert answer("rebound.example") == 403


def test_each_service_reaches_its_own_database_alone(deployed: StartedServices) -> None:
    allowed = deployed.query(
        "SELECT role, database, has_database_privilege(role, database, 'CONNECT') "
        "FROM unnest(ARRAY['dagster', 'mlflow']) role, unnest(ARRAY['dagster', 'mlflow']) database ORDER BY 1, 2",
        "postgres",
    )

    assert allowed == ["dagster|dagster|t", "dagster|mlflow|f", "mlflow|dagster|f", "mlflow|mlflow|t"]


def test_an_edited_pipeline_is_taken_up_by_a_reload_and_a_mistake_in_it_is_told(deployed: StartedServices) -> None:
    webserver = Webserver(deployed.address("webserver"))
    definition = deployed.folder / "pipelines" / "asked" / "defs.yaml"
    written = definition.read_text()

    try:
        definition.write_text(written.replace("raw/*.parquet", "raw/nothing.parquet"))
        assert "nothing.parquet" in webserver.reload()
    finally:
        definition.write_text(written)
        told = webserver.reload()
    assert told == ""


def test_configuration_of_one_machine_is_found_again_in_the_volumes(deployed: StartedServices) -> None:
    inside = {path.name for path in Path(deployed.path("/opt/dagster")).iterdir()}

    assert {"dagster.yaml", "workspace.yaml"} <= inside
    assert "mlflow.db" not in inside  # nothing was kept beside the volumes
    assert "store" not in inside
