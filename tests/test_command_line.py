"""`embed-pipeline`: the store and the report from a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from embed_pipeline.artifacts import Artifact, Made, PipelineStore, Recipe, RunIds
from embed_pipeline.command_line import main


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineStore:
    monkeypatch.setenv("EMBED_PIPELINE_STORE", str(tmp_path))
    return PipelineStore(tmp_path, "support")


def publish(store: PipelineStore, seed: int) -> Artifact:
    def make(out: Path) -> Made:
        (out / "rows.txt").write_text(str(seed))
        return Made({}, RunIds())

    recipe = Recipe(inputs={}, settings={}, seed=seed, code_version="1")
    return store.produce("raw_pairs", recipe, [], make, content=["rows.txt"]).artifact


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "200"})


def test_versions_lists_all_and_marks_the_current_one(store: PipelineStore) -> None:
    old, new = publish(store, 1), publish(store, 2)

    shown = run("versions").output

    assert old.version in shown
    assert ["*", "support/raw_pairs", new.version] in [line.split()[:3] for line in shown.splitlines()]


def test_prune_shows_first_and_deletes_only_when_told(store: PipelineStore) -> None:
    old, new = publish(store, 1), publish(store, 2)

    assert f"would delete support/raw_pairs {old.version}" in run("prune", "support").output
    assert old.path.is_dir()

    assert f"deleted support/raw_pairs {old.version}" in run("prune", "support", "--yes").output
    assert not old.path.exists()
    assert new.path.is_dir()


def test_prune_waits_for_a_run_that_is_making_something(store: PipelineStore) -> None:
    publish(store, 1)
    (store.folder / ".staging" / "embedder~another-machine~1~00000000").mkdir(parents=True)

    result = run("prune", "support", "--yes")

    assert result.exit_code == 1
    assert "a run is making embedder" in result.output


def test_verify_names_a_changed_file(store: PipelineStore) -> None:
    artifact = publish(store, 1)
    assert "1 files as published" in run("verify", "support").output

    (artifact.path / "rows.txt").write_text("2")
    result = run("verify", "support")

    assert result.exit_code == 1
    assert "rows.txt was changed after support/raw_pairs version" in result.output


def test_an_unknown_pipeline_is_told_which_there_are(store: PipelineStore) -> None:
    publish(store, 1)

    result = run("report", "suport")

    assert result.exit_code == 1
    assert "no pipeline 'suport'" in result.output
    assert "there: support" in result.output


def test_a_report_that_was_never_made_names_the_command(store: PipelineStore) -> None:
    publish(store, 1)

    assert "dagster asset materialize" in run("report", "support").output
