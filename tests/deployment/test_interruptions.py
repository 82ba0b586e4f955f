"""A training that is cut short: by a person, by an upgrade, and by a code location that is killed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import psutil
import pytest

from tests.deployment.conftest import Start
from tests.deployment.started_services import StartedServices
from tests.deployment.webserver import Webserver, wait_for

pytestmark = pytest.mark.services

SECONDS = 300
numbers = count(1)


@pytest.fixture(scope="module")
def deployed(start: Start) -> Iterator[StartedServices]:
    """The services, with everything made that a training of `small/embedder` needs."""
    with start({"small": {}}) as services:
        webserver = Webserver(services.address("webserver"))
        run_id = webserver.launch("small_pipeline", ["small/raw_pairs", "small/cleaned_pairs", "small/hard_negatives"])
        assert webserver.wait_until_finished(run_id, SECONDS) == "SUCCESS", webserver.told(run_id)
        yield services


@pytest.fixture
def webserver(deployed: StartedServices) -> Iterator[Webserver]:
    """The webserver; what runs or waits when the test is over is cancelled."""
    server = Webserver(deployed.address("webserver"))
    yield server
    for run in server.runs():
        if run["status"] in ("QUEUED", "STARTING", "STARTED"):
            server.terminate(run["runId"])
            server.wait_until_finished(run["runId"], SECONDS)


def training_that_takes_hours(webserver: Webserver) -> str:
    """The id of a run in which torchrun has made its first steps."""
    config = {"max_steps": 100_000, "evaluations": 1, "learning_rate": next(numbers) / 1000}
    run_id = webserver.launch("small_pipeline", ["small/embedder"], {"ops": {"small__embedder": {"config": config}}})

    def makes_steps() -> bool:
        assert webserver.status(run_id) not in ("FAILURE", "SUCCESS"), webserver.told(run_id)
        return any((event.get("message") or "").startswith("step ") for event in webserver.events(run_id))

    wait_for(makes_steps, SECONDS)
    return run_id


def trainings() -> list[str]:
    """Command lines of the trainings' processes on this machine that work on `small`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "embed_pipeline.training.embedder" in line and "/deployed" in line:
            found.append(line)
    return found


def mlflow_statuses(deployed: StartedServices, run_id: str) -> set[str]:
    joined = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE key = 'dagster.run_id' AND value"
    return set(deployed.query(f"{joined} = '{run_id}'", "mlflow"))


def retry_of(webserver: Webserver, run_id: str) -> str | None:
    return next((run["runId"] for run in webserver.runs() if run["tags"].get("dagster/parent_run_id") == run_id), None)


def test_terminating_a_run_in_the_ui_ends_its_processes(deployed: StartedServices, webserver: Webserver) -> None:
    run_id = training_that_takes_hours(webserver)
    assert trainings()

    webserver.terminate(run_id)

    assert webserver.wait_until_finished(run_id, 60) == "CANCELED"
    assert trainings() == []
    assert mlflow_statuses(deployed, run_id) == {"KILLED"}
    assert retry_of(webserver, run_id) is None


def test_a_new_code_location_takes_up_the_training_that_its_stop_ended(
    deployed: StartedServices, webserver: Webserver
) -> None:
    run_id = training_that_takes_hours(webserver)

    assert deployed.stop("daemon") == 0  # compose stops what depends on a service with `restart: true` first
    assert deployed.stop("code") == 0
    assert webserver.status(run_id) == "FAILURE"
    assert trainings() == []
    assert mlflow_statuses(deployed, run_id) == {"KILLED"}

    deployed.start("code")
    deployed.start("daemon")

    retry = wait_for(lambda: retry_of(webserver, run_id), SECONDS)
    wait_for(lambda: webserver.status(retry) == "STARTED", SECONDS)


def test_a_killed_code_location_leaves_no_run_that_stands_for_ever(
    deployed: StartedServices, webserver: Webserver
) -> None:
    run_id = training_that_takes_hours(webserver)

    deployed.kill("code")
    assert webserver.status(run_id) == "STARTED"
    assert mlflow_statuses(deployed, run_id) == {"RUNNING"}
    deployed.start("code")

    assert webserver.wait_until_finished(run_id, 120) == "FAILURE"
    wait_for(lambda: mlflow_statuses(deployed, run_id) == {"KILLED"}, 60)
    assert wait_for(lambda: retry_of(webserver, run_id), SECONDS)
