"""The whole DAG through Dagster, with real torchrun, real MLflow on SQLite and a tiny model."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sentence_transformers import CrossEncoder, SentenceTransformer

from embed_pipeline.artifacts import ASSETS
from embed_pipeline.champions import read_history
from tests.orchestration.conftest import SmallPipeline, write_yaml

MakePipeline = Callable[..., SmallPipeline]
# Those only with guard sets, or where the YAML asks for them.
MADE = [asset for asset in ASSETS if asset not in ("merged_embedder", "exports", "hub")]


def made(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    """asset -> whether it was computed in this run (and not used again)."""
    return {
        event.asset_key.path[-1]: not event.materialization.metadata["reused"].value
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }


def contents(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """asset -> the data version Dagster was told."""
    return {
        event.asset_key.path[-1]: event.materialization.tags["dagster/data_version"]
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None and event.materialization.tags
    }


def test_the_whole_pipeline_and_what_a_second_run_does(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()

    first = small.materialize(raise_on_error=False)

    assert made(first) == dict.fromkeys(MADE, True)
    checks = {e.check_name: e.passed for e in first.get_asset_check_evaluations()}
    # Twenty-four questions are too few for the gate, so the run fails, and there is no champion.
    assert not first.success
    assert not checks.pop("gate")
    assert not read_history(small.store).promotions
    assert checks == {
        "every_file_was_read": True,
        "splits_do_not_leak_and_rows_add_up": True,
        "answers_are_in_the_corpus": True,
        "no_positive_among_negatives": True,
        "trained_on_no_held_out_question": True,
    }
    assert contents(first) == {asset: small.store.current(asset).content for asset in MADE}
    _models_load(small)
    _figures_are_complete(small)
    _metrics_came_live(first)
    _trainings_are_shown(first)
    _mlflow_has_everything(small, first.run_id)
    runs = set(_mlflow_runs(small))

    second = small.materialize(raise_on_error=False)

    assert made(second) == dict.fromkeys(MADE, False)
    assert contents(second) == contents(first)
    assert set(_mlflow_runs(small)) == runs

    other_rate = small.materialize(config={"embedder": {"learning_rate": 0.002}}, raise_on_error=False)

    assert made(other_rate) == {
        "raw_pairs": False,
        "cleaned_pairs": False,
        "hard_negatives": False,
        "embedder": True,
        "reranker": True,
        "evaluation": True,
    }
    _a_stale_or_changed_model_is_refused(small)


def _models_load(small: SmallPipeline) -> None:
    embedder = SentenceTransformer(str(small.store.current("embedder").path / "model"), device="cpu")
    reranker = CrossEncoder(str(small.store.current("reranker").path / "model"), device="cpu")
    assert embedder.encode_query(["where is the river"]).shape == (1, 32)
    assert reranker.predict([("where is the river", "river stone")]).shape == (1,)
    assert 0 <= json.loads((small.store.current("reranker").path / "serving.json").read_text())["embedder_weight"] <= 1


def _figures_are_complete(small: SmallPipeline) -> None:
    evaluation = small.store.current("evaluation")
    summary = json.loads((evaluation.path / "summary.json").read_text())
    assert {row["system"] for row in summary} == {"bm25", "base_embedder", "embedder", "base_reranker", "reranker"}
    keys = "system, metric, value, gain, interval_low, interval_high, p_value, num_queries"
    assert set(summary[0]) == set(keys.split(", "))
    assert "<html" in (evaluation.path / "report.html").read_text()
    assert evaluation.input("embedder") == small.store.current("embedder").version


def _metrics_came_live(result: dg.ExecuteInProcessResult) -> None:
    observed = [
        event.asset_observation_data.asset_observation
        for event in result.all_events
        if event.event_type == dg.DagsterEventType.ASSET_OBSERVATION
    ]
    of_embedder = [o for o in observed if o.asset_key.path[-1] == "embedder"]
    losses = [o.metadata["loss"].value for o in of_embedder if "loss" in o.metadata]
    assert len(losses) == 4
    assert any("dev_ndcg_at_10" in o.metadata for o in of_embedder)
    assert [o.metadata["preflight"].value for o in of_embedder if "preflight" in o.metadata]


def _trainings_are_shown(result: dg.ExecuteInProcessResult) -> None:
    """Figures, the model's card and a picture of loss and dev figure, in both trainings' metadata."""
    metadata = {
        event.asset_key.path[-1]: event.materialization.metadata
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }
    for model in ("embedder", "reranker"):
        shown = {name: value.value for name, value in metadata[model].items()}
        assert {"steps", "dev_before", "dev_kept", "precision"} <= set(shown)
        assert "Fine-tuned with embed_pipeline from" in str(shown["card"])
        title, _, encoded = str(shown["curve"]).partition("](data:image/svg+xml;base64,")
        assert title == "![loss and the dev figure over steps"
        svg = base64.b64decode(encoded.removesuffix(")")).decode()
        assert {">loss<", ">step<", ">dev ndcg_at_10 (ring: kept)<"} <= set(re.findall(r">[a-z_0-9 (:)]+<", svg))


def _mlflow_runs(small: SmallPipeline) -> dict[str, mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{small.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    runs = client.search_runs([experiment.experiment_id], max_results=50)
    return {f"{run.data.tags['embed_pipeline.asset']} {run.info.run_id}": run for run in runs}


def _mlflow_has_everything(small: SmallPipeline, dagster_run_id: str) -> None:
    runs = {name.split()[0]: run for name, run in _mlflow_runs(small).items()}
    assert set(runs) == {"run", "embedder", "reranker", "evaluation", "challenger"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags["dagster.run_id"] for run in runs.values()} == {dagster_run_id}
    for child in ("embedder", "reranker", "evaluation"):
        assert runs[child].data.tags["mlflow.parentRunId"] == runs["run"].info.run_id
    embedder = runs["embedder"]
    assert embedder.data.params["settings.learning_rate"] == "0.001"
    assert {"loss", "dev_ndcg_at_10", "learning_rate"} <= set(embedder.data.metrics)
    assert {i.dataset.name for i in embedder.inputs.dataset_inputs} == {"small/cleaned_pairs", "small/hard_negatives"}
    assert runs["evaluation"].data.metrics["embedder/ndcg_at_10"] > 0
    artifacts = small.home / "mlflow-artifacts"
    assert list(artifacts.glob(f"{embedder.info.run_id}/artifacts/model/*.safetensors"))
    assert list(artifacts.glob(f"{runs['evaluation'].info.run_id}/artifacts/evaluation/report.html"))
    link = small.store.current("embedder").manifest.runs.mlflow_link
    assert link is not None
    assert link.endswith(embedder.info.run_id)


def _a_stale_or_changed_model_is_refused(small: SmallPipeline) -> None:
    small.materialize("cleaned_pairs", config={"cleaned_pairs": {"split": {"test": 0.3}}})
    refused = small.materialize("evaluation", raise_on_error=False)
    assert not refused.success
    assert "its test questions may have been trained on" in _failure(refused, "evaluation")

    small.materialize("cleaned_pairs")
    attributes = yaml.safe_load(small.yaml_file.read_text())["attributes"]
    other_encoding = {**attributes["embedder"], "encoding": {"query_max_length": 12}}
    write_yaml(small.yaml_file, {**attributes, "embedder": other_encoding})
    refused = small.materialize("evaluation", raise_on_error=False)
    assert "not trained from the base model and encoding that the YAML names now" in _failure(refused, "evaluation")

    write_yaml(small.yaml_file, attributes)
    weights = small.store.current("embedder").path / "model" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    # Another setting, so that the evaluation that was made before is not simply used again.
    refused = small.materialize("evaluation", config={"evaluation": {"examples": 1}}, raise_on_error=False)
    assert "model.safetensors was changed after small/embedder version" in _failure(refused, "evaluation")


def _failure(result: dg.ExecuteInProcessResult, asset: str) -> str:
    error = result.failure_data_for_node(f"small__{asset}")
    assert error is not None
    assert error.user_failure_data is not None
    return str(error.user_failure_data.description)


def test_the_cause_of_a_failing_training_is_the_error_of_the_asset(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    small.materialize("raw_pairs", "cleaned_pairs", "hard_negatives")

    diverging = {"learning_rate": 100.0, "weight_decay": 10.0, "max_steps": 30}
    result = small.materialize("embedder", config={"embedder": diverging}, raise_on_error=False)

    assert "Lower learning_rate" in _failure(result, "embedder")
    assert not small.store.has_current("embedder")
    assert list((small.store.folder / ".staging").iterdir()) == []
    statuses = {name.split()[0]: run.info.status for name, run in _mlflow_runs(small).items()}
    assert statuses == {"run": "FAILED", "embedder": "FAILED"}


def test_the_same_files_in_another_place_make_the_same_contents(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_pipeline()
    tables = ("raw_pairs", "cleaned_pairs", "hard_negatives")
    first = contents(small.materialize(*tables))

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    elsewhere = tmp_path / "moved"
    (tmp_path / "defs").rename(elsewhere)
    again = contents(SmallPipeline(elsewhere, tmp_path / "other", small.store).materialize(*tables))

    assert again == first


def test_another_seed_makes_other_splits(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    first = contents(small.materialize("raw_pairs", "cleaned_pairs"))
    attributes = yaml.safe_load(small.yaml_file.read_text())["attributes"]
    write_yaml(small.yaml_file, {**attributes, "seed": 8})

    again = contents(small.materialize("raw_pairs", "cleaned_pairs"))

    assert again["raw_pairs"] == first["raw_pairs"]
    assert again["cleaned_pairs"] != first["cleaned_pairs"]


def test_an_override_that_cannot_be_is_refused_before_any_work(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    small.materialize("raw_pairs")

    result = small.materialize("cleaned_pairs", config={"cleaned_pairs": {"split": {"dev": 0.9}}}, raise_on_error=False)

    assert "dev + test must leave rows for train; found 0.9 + 0.2" in _failure(result, "cleaned_pairs")


def test_overrides_reach_the_check_of_what_they_made(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    small.materialize("raw_pairs", "cleaned_pairs")

    # Far laxer than the YAML: judged by the YAML's ratio these negatives would be too near.
    result = small.materialize("hard_negatives", config={"hard_negatives": {"max_score_ratio": 1.0}})

    assert [e.passed for e in result.get_asset_check_evaluations()] == [True]


def test_a_row_more_that_is_dropped_retrains_nothing(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    tables = ("raw_pairs", "cleaned_pairs", "hard_negatives")
    first = contents(small.materialize(*tables))
    raw = small.yaml_file.parent / "raw" / "pairs.parquet"
    rows = pq.read_table(raw)
    pq.write_table(pa.concat_tables([rows, rows.slice(0, 1)]), raw)

    again = small.materialize(*tables)

    assert made(again) == {"raw_pairs": True, "cleaned_pairs": True, "hard_negatives": False}
    assert contents(again)["cleaned_pairs"] == first["cleaned_pairs"]
    assert small.store.current("cleaned_pairs").report["rejected_by_reason"]["duplicate"] == 1
