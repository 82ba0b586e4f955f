"""A pipeline as a smoke test of itself: in small, beside the real thing, with an exit code that CI can believe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from embed_pipeline.artifacts import PipelineStore, pipelines_in
from embed_pipeline.settings import SMOKE_TEST_QUERIES, PipelineSettings, smoke_test_of
from embed_pipeline.stages import Pipeline, make_raw_pairs
from tests.made_up_models import SETTINGS
from tests.orchestration.conftest import SmallPipeline

MakePipeline = Callable[..., SmallPipeline]
REPOSITORY = Path(__file__).resolve().parents[2]

REFUSING = """
import dagster as dg

@dg.asset_check(asset=["small", "raw_pairs"], blocking=True)
def nobody_likes_them() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False)
"""


def smoke_test(small: SmallPipeline, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EMBED_PIPELINE_DEFS": str(small.folder), "EMBED_PIPELINE_SMOKE_TEST": "1"}
    tool = str(Path(sys.executable).with_name(command[0]))
    return subprocess.run([tool, *command[1:]], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def materialize(small: SmallPipeline, selection: str) -> subprocess.CompletedProcess[str]:
    module = ("-m", "embed_pipeline.definitions")
    return smoke_test(small, "dagster", "asset", "materialize", *module, "--select", selection)


def small_store(small: SmallPipeline) -> PipelineStore:
    return PipelineStore(small.home / "store" / "smoke-test", "small")


def test_how_much_is_done_is_capped_and_nothing_else_changes() -> None:
    demo = yaml.safe_load((REPOSITORY / "embed_pipeline" / "defs" / "demo" / "defs.yaml").read_text())["attributes"]
    guards = [{"name": "general", "kind": "scored", "path": "sick.parquet", "max_loss": 0.01}]
    automation = {"watch": False, "retrain": "0 2 * * *"}
    whole = PipelineSettings.model_validate({**demo, "forgetting": {"guards": guards}, "automation": automation})

    small = smoke_test_of(whole)

    assert small.embedder.base_model == whole.embedder.base_model
    assert small.embedder.encoding == whole.embedder.encoding
    assert small.reranker.engine == whole.reranker.engine
    assert (small.source, small.cleaning, small.gate, small.name) == (whole.source, whole.cleaning, whole.gate, "demo")
    assert small.embedder.max_steps == small.reranker.max_steps == 4
    assert small.forgetting.guards[0].max_queries == 50
    assert small.forgetting.guards[0].max_loss == 0.01
    assert not small.automation.unattended
    assert small.tracking.experiment == "demo-smoke-test"


def test_what_is_small_already_stays_as_it_is() -> None:
    changed: dict[str, Any] = {
        **SETTINGS,
        "mining": {"top_k": 60, "range_min": 50},
        "embedder": {**SETTINGS["embedder"], "max_steps": 2, "dev_passages": 7},
    }
    small = smoke_test_of(PipelineSettings.model_validate(changed))
    assert (small.mining.range_min, small.mining.top_k) == (50, 60)
    assert (small.embedder.max_steps, small.embedder.dev_passages) == (2, 7)


@pytest.mark.parametrize(("asked", "small"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_asks_for_it(
    asked: str | None, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBED_PIPELINE_STORE", str(tmp_path))
    if asked is None:
        monkeypatch.delenv("EMBED_PIPELINE_SMOKE_TEST", raising=False)
    else:
        monkeypatch.setenv("EMBED_PIPELINE_SMOKE_TEST", asked)
    pipeline = Pipeline.of(PipelineSettings.model_validate(SETTINGS), tmp_path)
    assert pipeline.smoke_test == small
    assert pipeline.settings.embedder.max_steps == (4 if small else None)
    assert pipeline.store.folder == (tmp_path / "smoke-test" / "small" if small else tmp_path / "small")


@pytest.mark.parametrize("command", ["dagster", "dg"])
def test_a_failing_blocking_check_is_the_exit_code(make_pipeline: MakePipeline, command: str) -> None:
    small = make_pipeline()
    make_raw_pairs(Pipeline(small_settings(small), small.yaml_file.parent, small.store))
    real = small.store.current("raw_pairs")
    (small.folder / "refusing.py").write_text(REFUSING)

    if command == "dagster":
        done = materialize(small, "small/raw_pairs,small/cleaned_pairs")
    else:
        done = smoke_test(small, "dg", "launch", "--assets", "small/raw_pairs,small/cleaned_pairs")

    assert done.returncode == 1
    assert "nobody_likes_them" in done.stdout + done.stderr
    assert not small_store(small).has_current("cleaned_pairs")
    sampled = small_store(small).current("raw_pairs")
    assert sampled.manifest.recipe.settings["sampled_queries"] == SMOKE_TEST_QUERIES
    assert sampled.manifest.recipe.digest != real.manifest.recipe.digest
    assert [artifact.version for artifact in small.store.versions("raw_pairs")] == [real.version]
    assert [store.pipeline for store in pipelines_in(small.home / "store")] == ["small"]


def small_settings(small: SmallPipeline) -> PipelineSettings:
    return PipelineSettings.model_validate(yaml.safe_load(small.yaml_file.read_text())["attributes"])


@pytest.mark.slow
def test_the_whole_pipeline_in_small(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()

    done = materialize(small, 'key:"small/*"')

    assert done.returncode == 0, done.stderr[-4000:]
    evaluation = small_store(small).current("evaluation")
    assert evaluation.report["gate"]["outcome"] != "promote", "so few questions tell nothing, and stop nothing here"
    client = mlflow.MlflowClient(f"sqlite:///{small.home / 'mlflow.db'}")
    assert [experiment.name for experiment in client.search_experiments() if experiment.name != "Default"] == [
        "small-smoke-test"
    ]
    assert all(model.name.endswith("-smoke-test") for model in client.search_registered_models())
    assert not small.store.folder.exists()
