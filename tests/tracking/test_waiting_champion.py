"""MLflow is down when a candidate is to be promoted: it waits, everybody is told, and it is registered later."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import mlflow
import pytest
from click.testing import CliRunner, Result

from embed_pipeline import stages
from embed_pipeline.champions import let_wait, pointer, read_history, read_waiting
from embed_pipeline.command_line import main
from embed_pipeline.errors import ArtifactError, GateError, TrackingError
from embed_pipeline.orchestration.assets import champion as champion_module
from embed_pipeline.orchestration.assets.champion import champion_asset
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline
from embed_pipeline.tracking.promotion import disagreements, promote_waiting, retire
from embed_pipeline.tracking.registry import Registry
from tests.made_up_models import SETTINGS
from tests.tracking.candidates import Workshop
from tests.tracking.mlflow_server import MlflowServer

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def give_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def server(empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    shutil.copy2(empty_mlflow, server.database)
    server.start()
    yield server
    server.stop()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "200"})


def test_a_candidate_waits_while_the_server_is_down_and_is_registered_when_it_is_back(
    workshop: Workshop, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    candidate = workshop.candidate(1)
    server.stop()
    with pytest.raises(
        TrackingError, match=r"passed the gate and waits for MLflow since .*replay-metrics support"
    ) as told:
        workshop.promote(candidate)
    assert told.value.passing
    assert not pointer(workshop.store).exists()
    for shown in (run("versions", "support"), run("champion", "support")):
        assert f"embedder {candidate.embedder.version}, reranker" in shown.output
        assert "waits for MLflow since" in shown.output
    refused = run("replay-metrics", "support")
    assert refused.exit_code == 1
    waits = read_waiting(workshop.store)
    assert waits is not None

    server.start()
    sent = run("replay-metrics", "support")
    assert sent.exit_code == 0, sent.output
    assert "waited for MLflow, serves now" in sent.output
    champion = read_history(workshop.store).champion
    assert champion is not None
    assert champion.evaluation == candidate.evaluation.version
    assert read_history(workshop.store).promotions[0].by == "test"
    client = mlflow.MlflowClient(server.database_uri)
    assert len(client.search_model_versions("name = 'support-embedder'")) == 1
    assert Registry().aliases(["support-embedder"])["support-embedder", "champion"] == "1"
    assert not disagreements(workshop.store)
    assert "waits" not in run("versions", "support").output


def test_the_asset_tells_that_it_waits_and_the_next_run_registers(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = workshop.candidate(1)
    monkeypatch.setattr(stages, "_candidate", lambda pipeline: candidate)  # made without a pipeline's recipes
    monkeypatch.setattr(champion_module, "write_champion_cards", lambda pipeline: {})
    settings = PipelineSettings.model_validate({**SETTINGS, "name": "support", "automation": {"retries": 0}})
    asset = champion_asset(Pipeline(settings, workshop.store.folder, workshop.store))
    key = dg.AssetKey(["support", "champion"])
    with dg.DagsterInstance.ephemeral() as instance:
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", NOBODY)
            failed = dg.materialize([asset], instance=instance, raise_on_error=False)
        assert not failed.success
        assert instance.get_latest_materialization_event(key) is None
        records = instance.fetch_observations(key, limit=1).records
        observed = records[0].asset_observation
        assert observed is not None
        told = {name: value.value for name, value in observed.metadata.items()}
        assert told["status"] == "waits for MLflow"
        assert "passed the gate and waits for MLflow" in str(told["waiting"])

        done = dg.materialize([asset], instance=instance)
        (materialized,) = done.get_asset_materialization_events()
        assert materialized.materialization.metadata["status"].value == "serves"
    assert read_waiting(workshop.store) is None
    assert Registry().aliases(["support-embedder"])["support-embedder", "champion"] == "1"


def test_a_candidate_that_serves_does_not_need_mlflow(
    in_service: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serving = in_service.candidate(2, reference=read_history(in_service.store).promotions[0].champion.key)  # type: ignore[union-attr]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    assert not in_service.promote(serving).new
    assert "MLflow was not asked where its aliases stand" in caplog.text
    assert read_waiting(in_service.store) is None


def wait_in_vain(workshop: Workshop, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", NOBODY)
        with pytest.raises(TrackingError):
            workshop.promote(workshop.next(seed))


def test_a_later_candidate_takes_the_place_of_the_one_that_waits(
    in_service: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_in_vain(in_service, 4, monkeypatch)
    wait_in_vain(in_service, 5, monkeypatch)
    promoted = promote_waiting(in_service.store, in_service.tracked)
    assert promoted is not None
    assert promoted.champion.embedder == in_service.candidate(5).embedder.version
    assert promote_waiting(in_service.store, in_service.tracked) is None


def test_since_when_it_waits_is_not_forgotten_by_another_try(
    in_service: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_in_vain(in_service, 4, monkeypatch)
    waits = read_waiting(in_service.store)
    assert waits is not None
    let_wait(in_service.store, waits.model_copy(update={"since": "2026-01-01T00:00:00+00:00"}))
    wait_in_vain(in_service, 4, monkeypatch)
    again = read_waiting(in_service.store)
    assert again is not None
    assert again.since == "2026-01-01T00:00:00+00:00"


def test_who_waits_does_not_serve_after_a_person_decided_otherwise(
    in_service: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_in_vain(in_service, 4, monkeypatch)
    retire(in_service.store, reason="nobody shall serve")
    assert read_waiting(in_service.store) is None
    assert promote_waiting(in_service.store, in_service.tracked) is None


def test_one_that_may_not_serve_any_more_waits_no_longer(in_service: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_in_vain(in_service, 4, monkeypatch)
    (in_service.candidate(4, reference=in_service.serving).embedder.path / "model" / "config.json").write_text("{}")
    with pytest.raises((ArtifactError, GateError), match=r"config\.json was changed"):
        promote_waiting(in_service.store, in_service.tracked)
    assert read_waiting(in_service.store) is None


def test_prune_keeps_who_waits(in_service: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_in_vain(in_service, 4, monkeypatch)
    waiting = in_service.candidate(4, reference=in_service.serving)
    in_service.candidate(5)  # what is current is another
    assert run("prune", "support", "--yes").exit_code == 0
    assert waiting.embedder.path.is_dir()


def test_a_note_that_cannot_be_read_stops_nobody(in_service: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    (in_service.store.folder / "promotions" / "waiting.json").write_text("{")
    assert read_waiting(in_service.store) is None
    assert "who waits for MLflow is not told" in caplog.text
    assert in_service.promote(in_service.next(3)).new
