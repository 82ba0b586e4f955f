"""A pipeline of scored pairs: a real training of a tiny model, and from its file to its champion with a copied one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.champions import read_history
from embed_pipeline.command_line import main
from embed_pipeline.errors import GateError
from embed_pipeline.model_files import MODEL_FOLDER, SUMMARY_FILE, TRAINING_LOG_FILE
from embed_pipeline.orchestration.checks import trained_on_no_held_out_question
from embed_pipeline.retraining import retraining_due
from embed_pipeline.settings import ModelSource, PipelineSettings
from embed_pipeline.stages import (
    Launch,
    Pipeline,
    make_champion,
    make_cleaned_pairs,
    make_embedder,
    make_evaluation,
    make_raw_pairs,
    mark_challenger,
)
from embed_pipeline.tracking.promotion import check_loads
from tests.conftest import one_thread

NOUNS = ["cat", "dog", "car", "boat", "house", "river", "apple", "violin", "teacher", "mountain", "train", "letter"]
VERBS = ["is beside the gate", "was seen by nobody", "costs a lot of money", "makes no noise at night"]


def rows() -> list[dict[str, Any]]:
    """The same noun and the same verb make two sentences alike."""
    found = []
    for i, noun in enumerate(NOUNS):
        for j, verb in enumerate(VERBS):
            other, another = NOUNS[(i + j + 1) % len(NOUNS)], VERBS[(j + 1) % len(VERBS)]
            for second, score in (
                (f"Some {noun} {verb}", 5),
                (f"One {noun} {another}", 3),
                (f"No {other} {another}", 1),
            ):
                found.append({"sentence1": f"The {noun} {verb}", "sentence2": second, "score": float(score)})
    return [{**row, "split": ("train", "dev", "test", "test")[i % 4]} for i, row in enumerate(found)]


@pytest.fixture
def pipeline(
    tmp_path: Path, tiny_bert_folder: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pipeline]:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    for name in ("EMBED_PIPELINE_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    shutil.copy2(empty_mlflow, tmp_path / "mlflow.db")
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "pairs.parquet")
    translated = [
        {"sentence1": f"{noun} number {i}", "sentence2": f"nr {i} {noun}", "split": "test" if i % 2 else "train"}
        for i, noun in enumerate(NOUNS)
    ]
    pq.write_table(pa.Table.from_pylist(translated), tmp_path / "translated.parquet")
    model = {"path": str(tiny_bert_folder)}
    settings = PipelineSettings.model_validate(
        {
            "name": "likeness",
            "source": {"kind": "scored", "path": "pairs.parquet", "score_range": [1, 5]},
            "extra_sources": [{"name": "words", "kind": "parallel", "path": "translated.parquet", "teacher": model}],
            "embedder": {"base_model": model, "nproc_per_node": 1},
            "evaluation": {"bootstrap_samples": 500},
            "gate": {"min_queries": 20},
            "tracking": {"system_metrics": False, "log_model": False},
        }
    )
    with one_thread():
        yield Pipeline(settings, tmp_path, PipelineStore(tmp_path / "store", "likeness"))


def copying(model: Path) -> Launch:
    """A training whose outcome is known."""

    def launch(job: Any, job_file: Path, tracked: Any, site: Any) -> None:
        shutil.copytree(model, job.output / MODEL_FOLDER)
        (job.output / MODEL_FOLDER / "README.md").write_text("# a model\n")
        (job.output / SUMMARY_FILE).write_text(json.dumps({"steps": 1}))

    return launch


def run(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_the_file_to_the_champion(
    pipeline: Pipeline, minilm_folder: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_raw_pairs(pipeline)
    make_cleaned_pairs(pipeline)
    make_embedder(pipeline, copying(minilm_folder))
    evaluation = make_evaluation(pipeline).artifact
    assert evaluation.report["gate"]["outcome"] == "promote", evaluation.report["gate"]["sentence"]
    assert {(row["system"], row["metric"]) for row in evaluation.report["summary"]} == {
        (system, metric) for system in ("base_embedder", "embedder") for metric in ("spearman", "pearson")
    }
    told = {"embedder/words/translation_accuracy", "base_embedder/words/negative_mse"}
    assert told <= set(evaluation.report["evaluators"])
    files = {path.name for path in evaluation.path.iterdir()}
    assert {"similarities.parquet", "evaluators.json", "report.html", "parity.json"} <= files
    assert files.isdisjoint({"per_query.parquet", "rankings.parquet"})
    page = (evaluation.path / "report.html").read_text()
    for part in ("Spearman", "words/translation_accuracy", "what people said of each pair", "Pairs that moved most"):
        assert part in page
    for absent in ("BM25", "questions", "nDCG"):
        assert absent not in page, absent
    assert trained_on_no_held_out_question(pipeline) == []
    assert retraining_due(pipeline).reason.endswith("passed the gate, but it does not serve")

    promoted = make_champion(pipeline)
    assert promoted.champion.reranker is None
    assert check_loads(pipeline.store, promoted.champion) < 1e-5
    assert not retraining_due(pipeline).due
    assert make_evaluation(pipeline).reused
    shown = run("report", "likeness")
    for part in ("Spearman", "words/translation_accuracy", "Passed the gate", "pairs"):
        assert part in shown
    assert f"Spearman {promoted_value(evaluation.report):.3f}" in run("history", "likeness")
    run("champion", "likeness", "--verify")
    run("verify", "likeness")

    # A worse one, trained with other settings on the same pairs: it is compared with who serves, and refused.
    settings = pipeline.settings.model_copy(
        update={"embedder": pipeline.settings.embedder.model_copy(update={"learning_rate": 9e-5})}
    )
    later = Pipeline(settings, pipeline.folder, pipeline.store)
    make_embedder(later, copying(tiny_bert_folder))
    refused = make_evaluation(later).artifact
    assert refused.report["gate"]["outcome"] == "refuse"
    assert "the champion's embedder" in refused.report["gate"]["reasons"][0]
    mark_challenger(later)
    with pytest.raises(GateError, match="did not let"):
        make_champion(later)
    champion = read_history(pipeline.store).champion
    assert champion is not None
    assert champion.key == promoted.champion.key


KINDS = {
    "animal": ["cat", "dog", "horse", "sheep", "tiger", "mouse"],
    "vehicle": ["car", "boat", "truck", "plane", "taxi", "bus"],
}


def rows_against_the_words() -> list[dict[str, Any]]:
    """Alike is what tells of one kind of thing, in other words; what differs says the same of another kind."""
    found = []
    for kind, other in (("animal", "vehicle"), ("vehicle", "animal")):
        for i, noun in enumerate(KINDS[kind]):
            for j, verb in enumerate(VERBS):
                alike, different = KINDS[kind][(i + j + 1) % 6], KINDS[other][(i + j) % 6]
                for second, score in (
                    (f"The {alike} {VERBS[(j + 1) % len(VERBS)]}", 5.0),
                    (f"The {different} {verb}", 1.0),
                ):
                    found.append({"sentence1": f"The {noun} {verb}", "sentence2": second, "score": score})
    return [{**row, "split": ("train", "train", "dev", "test")[i // 2 % 4]} for i, row in enumerate(found)]


@pytest.mark.slow
def test_a_real_training_learns_what_people_said(pipeline: Pipeline, minilm_folder: Path) -> None:
    """By CoSENTLoss, the default, and torchrun: a model that goes by words learns to go by kinds of things."""
    pq.write_table(pa.Table.from_pylist(rows_against_the_words()), pipeline.folder / "pairs.parquet")
    base = ModelSource(path=minilm_folder)
    learning = {"base_model": base, "learning_rate": 3e-4, "epochs": 12, "batch_size": 16, "logging_steps": 1}
    settings = pipeline.settings.model_copy(
        update={
            "extra_sources": (),
            "embedder": pipeline.settings.embedder.model_copy(update=learning),
        }
    )
    real = Pipeline(settings, pipeline.folder, pipeline.store)
    make_raw_pairs(real)
    make_cleaned_pairs(real)
    embedder = make_embedder(real).artifact

    log = [json.loads(line) for line in (embedder.path / TRAINING_LOG_FILE).read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    value = {
        row["system"]: row["value"]
        for row in make_evaluation(real).artifact.report["summary"]
        if row["metric"] == "spearman"
    }
    assert value["base_embedder"] < 0.0
    assert value["embedder"] > 0.6


def promoted_value(report: dict[str, Any]) -> float:
    found: Callable[[dict[str, Any]], bool] = lambda row: (row["system"], row["metric"]) == ("embedder", "spearman")  # noqa: E731
    return float(next(row["value"] for row in report["summary"] if found(row)))
