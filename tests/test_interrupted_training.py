"""A step that was killed leaves a checkpoint, and the next one goes on from it, in its MLflow run."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from safetensors.torch import load_file

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline, make_cleaned_pairs, make_embedder, make_hard_negatives, make_raw_pairs
from embed_pipeline.tracking.server import tracking_uri
from embed_pipeline.training.run import WORK_FOLDER
from tests.orchestration.conftest import settings_of, write_pipeline

TRAINING = {"checkpoint_minutes": 0, "logging_steps": 2, "max_steps": 16, "epochs": 4, "dropout": 0.1}


def pipeline(folder: Path, model: Path, store: str) -> Pipeline:
    told: dict[str, Any] = settings_of(model)
    told["embedder"] |= TRAINING
    told["tracking"] = {"system_metrics": False, "log_model": False}
    settings = PipelineSettings.model_validate(told)
    return Pipeline(settings, folder / "defs" / "small", PipelineStore(folder / store, "small"))


def train(folder: Path, model: Path) -> None:
    make_embedder(pipeline(folder, model, "killed"))


def test_it_goes_on_in_the_same_mlflow_run(
    tmp_path: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_pipeline(tmp_path / "defs", settings_of(tiny_bert_folder))
    for store in ("undisturbed", "killed"):
        one = pipeline(tmp_path, tiny_bert_folder, store)
        for make in (make_raw_pairs, make_cleaned_pairs, make_hard_negatives):
            make(one)
    undisturbed = make_embedder(pipeline(tmp_path, tiny_bert_folder, "undisturbed")).artifact

    killed = pipeline(tmp_path, tiny_bert_folder, "killed")
    step = multiprocessing.get_context("spawn").Process(target=train, args=(tmp_path, tiny_bert_folder))
    step.start()
    while not list(killed.store.folder.glob(".checkpoints/embedder/*/step-4")):
        assert step.is_alive()
        time.sleep(0.02)
    launched = psutil.Process(step.pid).children(recursive=True)
    step.kill()
    step.join()
    psutil.wait_procs(launched, timeout=30)
    assert not killed.store.has_current("embedder")

    resumed = make_embedder(killed).artifact

    weights = [load_file(made.path / "model" / "model.safetensors") for made in (undisturbed, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert resumed.version == undisturbed.version
    assert not [name for name in resumed.manifest.files if name.startswith(("checkpoints", WORK_FOLDER))]
    assert not list(killed.store.folder.glob(".checkpoints/embedder/*"))

    client = mlflow.MlflowClient(tracking_uri())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, "tags.`embed_pipeline.asset` = 'embedder'")
    assert len(found) == 2  # one of each store
    assert resumed.manifest.runs.mlflow in {run.info.run_id for run in found}
    assert {run.info.status for run in found} == {"FINISHED"}
    assert resumed.manifest.runs.mlflow is not None
    for name in ("grad_norm", "dev_ndcg_at_10"):
        steps = [metric.step for metric in client.get_metric_history(resumed.manifest.runs.mlflow, name)]
        assert len(steps) == len(set(steps)), "a step that was made again is told once"
        if name == "grad_norm":
            assert steps == [1, *range(2, 17, 2)]
