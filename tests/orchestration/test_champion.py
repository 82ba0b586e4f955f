"""`champion` under Dagster: only behind a passed gate, in a smoke test behind any, and a rollback from the UI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml

from embed_pipeline.champions import pointer, read_history
from embed_pipeline.orchestration.assets.champion import champion_asset
from embed_pipeline.orchestration.rollback import rollback_job
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline
from embed_pipeline.tracking.registry import Registry
from tests.orchestration.conftest import SmallPipeline, settings_of
from tests.tracking.candidates import Workshop

MakePipeline = Callable[..., SmallPipeline]


def aliases(*names: str) -> dict[tuple[str, str], str | None]:
    return {key: version for key, version in Registry().aliases(names).items() if version is not None}


def champion_of(result: dg.ExecuteInProcessResult) -> dg.AssetMaterialization | None:
    events = result.get_asset_materialization_events()
    return next((e.materialization for e in events if e.asset_key and e.asset_key.path[-1] == "champion"), None)


def test_a_refused_candidate_is_a_challenger_and_a_smoke_test_promotes(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    refused = small.materialize(raise_on_error=False)
    assert not refused.success
    assert champion_of(refused) is None
    assert aliases("small-embedder", "small-reranker") == {
        ("small-embedder", "challenger"): "1",
        ("small-reranker", "challenger"): "1",
    }
    assert not pointer(small.store).exists()

    attributes = yaml.safe_load(small.yaml_file.read_text())["attributes"]
    settings = PipelineSettings.model_validate(attributes)
    in_small = champion_asset(Pipeline(settings, small.yaml_file.parent, small.store, smoke_test=True))
    promoted = dg.materialize([in_small], instance=small.instance)
    champion = champion_of(promoted)
    assert champion is not None
    told = {key: value.value for key, value in champion.metadata.items()}
    serving = read_history(small.store).champion
    assert serving is not None
    assert (told["event"], told["promotion"], told["replaced"], told["reused"]) == ("promoted", 1, "nobody", False)
    assert told["verdict"] == serving.verdict
    assert f'SentenceTransformer("{pointer(small.store)}/embedder")' in told["load"]
    assert 'load_model("models:/small-reranker-smoke-test@champion")' in told["load"]
    assert told["registered_embedder"].endswith("/#/models/small-embedder-smoke-test/versions/1")
    assert told["by"] == f"Dagster run {promoted.run_id}"

    again = champion_of(dg.materialize([in_small], instance=small.instance))
    assert again is not None
    assert again.metadata["reused"].value is True
    assert again.tags is not None
    assert champion.tags is not None
    assert again.tags["dagster/data_version"] == champion.tags["dagster/data_version"]

    small.materialize("cleaned_pairs", config={"cleaned_pairs": {"split": {"test": 0.3}}})
    assert not small.materialize("champion", raise_on_error=False).success
    assert len(read_history(small.store).promotions) == 1


@pytest.fixture
def pipeline(in_service: Workshop, tiny_bert_folder: Path) -> Iterator[Pipeline]:
    settings = PipelineSettings.model_validate({**settings_of(tiny_bert_folder), "name": "support"})
    return Pipeline(settings, tiny_bert_folder, in_service.store)


def test_a_person_rolls_back_in_the_ui_and_the_asset_knows(pipeline: Pipeline) -> None:
    serving = read_history(pipeline.store).champion
    with dg.DagsterInstance.ephemeral() as instance:
        config = {"ops": {"support_roll_back": {"config": {"reason": "customers complain"}}}}
        done = rollback_job(pipeline).execute_in_process(run_config=config, instance=instance)
        event = instance.get_latest_materialization_event(dg.AssetKey(["support", "champion"]))
        assert event is not None
        assert event.asset_materialization is not None
        told = {key: value.value for key, value in event.asset_materialization.metadata.items()}

        refused = rollback_job(pipeline).execute_in_process(run_config=config, instance=instance, raise_on_error=False)
    history = read_history(pipeline.store)
    assert history.champion is not None
    assert serving is not None
    assert history.champion.key != serving.key
    assert (told["event"], told["reason"], told["by"]) == (
        "rolled_back",
        "customers complain",
        f"Dagster run {done.run_id}",
    )
    assert told["embedder"] == history.champion.embedder
    assert not refused.success
    failure = refused.failure_data_for_node("support_roll_back")
    assert failure is not None
    assert failure.user_failure_data is not None
    assert "nobody is left to go back to" in str(failure.user_failure_data.description)
