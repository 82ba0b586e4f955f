"""`exports` and `hub` as assets: there where they are asked for, after the champion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dagster as dg
import pytest

from embed_pipeline.orchestration.assets.exports import exports_asset
from embed_pipeline.orchestration.assets.hub import hub_asset
from embed_pipeline.settings import PipelineSettings, smoke_test_of
from embed_pipeline.stages import Pipeline
from tests.publishing.conftest import SETTINGS
from tests.publishing.local_hub import LocalHub

VECTORS = {"embeddings": ["int8", "binary"], "dimensions": [16], "max_loss": 1.0}


def with_exports(pipeline: Pipeline, **exports: Any) -> Pipeline:
    settings = PipelineSettings.model_validate({**SETTINGS, "exports": exports})
    return replace(pipeline, settings=settings)


def materialize(pipeline: Pipeline, asset: dg.AssetsDefinition | None) -> dict[str, Any]:
    assert asset is not None
    result = dg.materialize([asset], instance=dg.DagsterInstance.ephemeral())
    (event,) = result.get_asset_materialization_events()
    return {name: value.value for name, value in event.materialization.metadata.items()}


def test_they_are_there_only_where_they_are_asked_for(in_force: Pipeline) -> None:
    plain = replace(in_force, settings=in_force.settings.model_copy(update={"hub": None}))
    assert exports_asset(plain) is None
    assert hub_asset(plain) is None
    hub = hub_asset(with_exports(in_force, **VECTORS))
    assert hub is not None
    assert {key.path[-1] for key in hub.keys_by_input_name.values()} == {"champion", "exports"}


def test_a_smoke_test_exports_on_few_questions_and_pushes_nothing(in_force: Pipeline) -> None:
    small = smoke_test_of(with_exports(in_force, formats=["onnx"]).settings)
    assert small.exports.formats == ("onnx",)
    assert small.exports.queries == 20
    assert small.hub is None


def test_exports_are_measured_once_and_go_along_to_the_hub(in_force: Pipeline, hub: LocalHub) -> None:
    pipeline = with_exports(in_force, **VECTORS)
    told = materialize(pipeline, exports_asset(pipeline))
    assert not told["reused"]
    assert "| binary |" in told["table"]
    assert told["published"] == ["binary", "dimensions-16"], "there is no train question to calibrate int8 on"
    assert materialize(pipeline, exports_asset(pipeline))["reused"]

    pushed = materialize(pipeline, hub_asset(pipeline))
    assert "your-company/support-embedder" in pushed["repositories"]
    files = hub.files("your-company/support-embedder")
    assert "exports/binary/README.md" in files
    assert "| binary |" in files["README.md"].read_text()
    assert materialize(pipeline, hub_asset(pipeline))["reused"]


def test_exports_of_another_champion_are_not_pushed(in_force: Pipeline, hub: LocalHub, in_service: Any) -> None:
    from embed_pipeline.tracking.promotion import roll_back

    pipeline = with_exports(in_force, **VECTORS)
    materialize(pipeline, exports_asset(pipeline))
    roll_back(in_service.store, reason="a test")
    with pytest.raises(dg.Failure, match="Materialize support/exports first"):
        materialize(pipeline, hub_asset(pipeline))
    assert not hub.private
