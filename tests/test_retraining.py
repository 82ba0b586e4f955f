"""Whether there is anything to train, and what a person is told."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from embed_pipeline import retraining
from embed_pipeline.champions import Champion, RegisteredModel, changing, record
from embed_pipeline.model_files import MODEL_FOLDER, SERVING_FILE
from embed_pipeline.retraining import retraining_due
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline, make_cleaned_pairs, make_raw_pairs
from tests.made_up_models import ingest, make_up, make_up_models, pipeline_in, write_rows


@pytest.fixture
def trained(tmp_path: Path) -> Pipeline:
    """Cleaned, trained, evaluated, refused by the gate."""
    pipeline = pipeline_in(tmp_path)
    ingest(pipeline)
    make_up_models(pipeline)
    return pipeline


def reason(pipeline: Pipeline) -> str:
    """Why it is due."""
    found = retraining_due(pipeline)
    assert found.due, found.reason
    return found.reason


def test_it_is_due_until_everything_was_made_once(tmp_path: Path) -> None:
    pipeline = pipeline_in(tmp_path)
    assert reason(pipeline) == "raw_pairs was never made from these files with these settings"
    make_raw_pairs(pipeline)
    assert reason(pipeline) == "cleaned_pairs was never made"
    make_cleaned_pairs(pipeline)
    assert reason(pipeline) == "hard_negatives was never made"
    make_up_models(pipeline)
    assert not retraining_due(pipeline).due


def test_nothing_is_due_when_nothing_changed(trained: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "fingerprint", lambda *_: pytest.fail("files were read"))
    found = retraining_due(trained)
    raw, embedder = (trained.store.current(asset).version for asset in ("raw_pairs", "embedder"))
    assert not found.due
    assert found.reason == (
        f"nothing to retrain: the raw files are those that raw_pairs {raw} was read from, and embedder {embedder} was "
        "trained on their cleaned pairs and evaluated"
    )


def test_an_upgraded_library_is_due_only_where_it_is_asked(trained: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, made_with = importlib.metadata.version, importlib.metadata.version("torch")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "torch" else installed(name))
    assert not retraining_due(trained).due
    asked = trained.settings.model_copy(update={"retrain_after_library_upgrade": True})
    embedder = trained.store.current("embedder").version
    expected = f"embedder {embedder} was made with torch {made_with} (9.9 is installed)"
    assert reason(replace(trained, settings=asked)) == expected


def test_touched_files_are_not_due(trained: Pipeline) -> None:
    os.utime(trained.folder / "raw" / "pairs.parquet", (1, 1))
    assert not retraining_due(trained).due


def test_another_content_of_the_files_is_due_until_it_was_trained_on(trained: Pipeline) -> None:
    write_rows(trained.folder / "raw" / "more.parquet", range(40, 60))
    raw = trained.store.current("raw_pairs").version
    assert reason(trained) == f"the raw files are not those that raw_pairs {raw} was read from"
    ingest(trained)
    assert "hard_negatives" in reason(trained), "a night that failed after cleaning is made up for"
    make_up(trained, "hard_negatives", "cleaned_pairs")
    assert reason(trained).startswith("embedder ")
    make_up_models(trained)
    assert not retraining_due(trained).due


def test_a_row_that_is_rejected_is_due_for_reading_but_not_for_training(trained: Pipeline) -> None:
    write_rows(trained.folder / "raw" / "again.parquet", range(3))
    assert retraining_due(trained).due
    ingest(trained)
    assert not retraining_due(trained).due


def test_large_files_are_not_compared_here(trained: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retraining, "MOST_BYTES", 1)
    assert not retraining_due(trained).due
    os.utime(trained.folder / "raw" / "pairs.parquet", (1, 1))
    assert reason(trained).endswith("the run will find out what changed")
    make_raw_pairs(trained)  # which finds the same content, and remembers the state it has now
    assert not retraining_due(trained).due


def test_files_that_are_gone_are_due_so_that_a_run_fails(trained: Pipeline) -> None:
    shutil.rmtree(trained.folder / "raw")
    assert reason(trained).startswith("the run will tell what is wrong: source.path: no file matches")


def test_other_columns_in_the_yaml_are_due(trained: Pipeline) -> None:
    source = {"path": "raw/*.parquet", "columns": {"query": "passage", "passage": "query"}}
    other = pipeline_in(trained.folder, source=source)
    assert reason(other) == "raw_pairs was never made from these files with these settings"


def test_a_source_with_a_script_is_always_due(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text("")
    pipeline = pipeline_in(tmp_path, source={"path": "raw/*.parquet", "script": "build.py", "script_output": "raw"})
    assert reason(pipeline).startswith("source.script builds the raw files anew")


def test_a_merged_embedder_is_part_of_what_must_be_up_to_date(tmp_path: Path) -> None:
    guards = {"guards": [{"name": "general", "kind": "scored", "path": "pairs.parquet"}]}
    plain = pipeline_in(tmp_path)
    ingest(plain)
    make_up_models(plain)
    merging = pipeline_in(tmp_path, forgetting=guards)
    assert reason(merging) == "merged_embedder was never made"
    make_up_models(merging)
    assert not retraining_due(merging).due
    assert "merged_embedder" in retraining_due(merging).reason


def test_a_model_that_passed_the_gate_is_due_until_it_serves(tmp_path: Path) -> None:
    pipeline = pipeline_in(tmp_path)
    ingest(pipeline)
    make_up_models(pipeline, outcome="promote")
    embedder = pipeline.store.current("embedder")
    assert reason(pipeline) == f"embedder {embedder.version} passed the gate, but it does not serve"

    champion = champion_of(pipeline)
    with changing(pipeline.store) as history:
        record(pipeline.store, history, "promoted", champion, by="a test", reason="")
    assert not retraining_due(pipeline).due

    with changing(pipeline.store) as history:
        record(pipeline.store, history, "retired", None, by="a test", reason="")
    assert not retraining_due(pipeline).due, "a person took it down"


def champion_of(pipeline: Pipeline) -> Champion:
    """The current models, with the files that serving needs."""
    embedder, reranker = (pipeline.store.current(asset) for asset in ("embedder", "reranker"))
    for artifact in (embedder, reranker):
        (artifact.path / MODEL_FOLDER).mkdir()
        (artifact.path / SERVING_FILE).write_text("{}")
    return Champion(
        embedder_asset="embedder",
        embedder=embedder.version,
        reranker=reranker.version,
        cleaned_pairs=pipeline.store.current("cleaned_pairs").version,
        evaluation=pipeline.store.current("evaluation").version,
        verdict="better",
        registered_embedder=RegisteredModel(name="small-embedder", version="1"),
        registered_reranker=RegisteredModel(name="small-reranker", version="1"),
    )


def test_settings_of_the_automation() -> None:
    from tests.made_up_models import SETTINGS

    at_night = PipelineSettings.model_validate({**SETTINGS, "automation": {"retrain": "0 2 * * *"}}).automation
    assert (at_night.cron, at_night.unattended) == ("0 2 * * *", True)
    on_change = PipelineSettings.model_validate({**SETTINGS, "automation": {"retrain": "on_change"}}).automation
    assert (on_change.cron, on_change.unattended) == (None, True)
    assert not PipelineSettings.model_validate(SETTINGS).automation.unattended
