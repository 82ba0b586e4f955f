"""The store: whole or not at all, never made twice, verifiable, prunable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embed_pipeline.artifacts import Made, PipelineStore, Produced, Recipe, RunIds
from embed_pipeline.errors import ArtifactError


@pytest.fixture
def store(tmp_path: Path) -> PipelineStore:
    return PipelineStore(tmp_path / "store", "support")


def recipe(settings: dict[str, object] | None = None, **inputs: str) -> Recipe:
    return Recipe(inputs=inputs, settings=settings or {}, seed=1, code_version="1")


def table(
    store: PipelineStore, asset: str, content: str, settings: dict[str, object] | None = None, **inputs: str
) -> Produced:
    def make(out: Path) -> Made:
        (out / "rows.txt").write_text(content)
        return Made({"rows": len(content)}, RunIds(dagster="run-1"))

    return store.produce(asset, recipe(settings, **inputs), make, content=["rows.txt"])


def test_a_published_version_has_its_files_report_and_origin(store: PipelineStore) -> None:
    artifact = table(store, "raw_pairs", "abc", {"k": 1}).artifact

    assert (artifact.path / "rows.txt").read_text() == "abc"
    assert artifact.path == store.folder / "raw_pairs" / artifact.version
    assert artifact.report == {"rows": 3}
    assert artifact.manifest.runs.dagster == "run-1"
    assert artifact.manifest.recipe.settings == {"k": 1}
    assert artifact.manifest.libraries["torch"].startswith("2.")
    assert store.current("raw_pairs") == artifact
    artifact.verify()


def test_the_same_recipe_is_not_made_twice(store: PipelineStore) -> None:
    first = table(store, "raw_pairs", "abc", {"k": 1})

    def never(out: Path) -> Made:
        raise AssertionError("was made again")

    again = store.produce("raw_pairs", recipe({"k": 1}), never, content=["rows.txt"])

    assert again.reused
    assert not first.reused
    assert again.artifact == first.artifact


def test_the_version_of_a_table_is_its_content(store: PipelineStore) -> None:
    first = table(store, "raw_pairs", "abc", {"k": 1})
    same_content = table(store, "raw_pairs", "abc", {"k": 2})
    other_content = table(store, "raw_pairs", "abd", {"k": 3})

    assert same_content.artifact.version == first.artifact.version
    assert not same_content.reused
    assert other_content.artifact.version != first.artifact.version
    assert len(store.versions("raw_pairs")) == 2


def test_the_version_of_a_model_is_its_recipe(store: PipelineStore) -> None:
    def make(out: Path) -> Made:
        (out / "weights").write_text("same weights")
        return Made({}, RunIds())

    one = store.produce("embedder", recipe({"lr": 1}), make, content=None)
    two = store.produce("embedder", recipe({"lr": 2}), make, content=None)

    assert one.artifact.version != two.artifact.version


def test_nothing_stays_of_a_version_whose_making_failed(store: PipelineStore) -> None:
    table(store, "raw_pairs", "abc")

    def fail(out: Path) -> Made:
        (out / "rows.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.produce("raw_pairs", recipe({"k": 9}), fail, content=["rows.txt"])

    assert [path.name for path in (store.folder / ".staging").iterdir()] == []
    assert (store.current("raw_pairs").path / "rows.txt").read_text() == "abc"


def test_a_version_deleted_by_hand_is_made_again(store: PipelineStore) -> None:
    artifact = table(store, "raw_pairs", "abc").artifact
    store.remove(artifact)

    assert not table(store, "raw_pairs", "abc").reused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_text("abX"), "was changed after support/raw_pairs version"),
        (lambda f: f.write_text("abcd"), "4 bytes found"),
        (lambda f: f.unlink(), "is missing"),
    ],
)
def test_a_changed_file_is_told(store: PipelineStore, damage: object, message: str) -> None:
    artifact = table(store, "raw_pairs", "abc").artifact
    damage(artifact.path / "rows.txt")  # type: ignore[operator]

    with pytest.raises(ArtifactError, match=message):
        artifact.verify()


def test_a_missing_version_names_the_command_that_makes_it(store: PipelineStore) -> None:
    with pytest.raises(ArtifactError, match=r'dagster asset materialize .* --select "support/embedder"'):
        store.current("embedder")
    with pytest.raises(ArtifactError, match="has no version 123; versions there: none"):
        store.get("embedder", "123")


def test_a_manifest_that_cannot_be_read_is_told(store: PipelineStore) -> None:
    artifact = table(store, "raw_pairs", "abc").artifact
    (artifact.path / "manifest.json").write_text("{}")

    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
        store.current("raw_pairs")


def test_pruning_keeps_what_anything_current_was_made_from(store: PipelineStore) -> None:
    old_raw = table(store, "raw_pairs", "old").artifact
    old_cleaned = table(store, "cleaned_pairs", "old cleaned", raw_pairs=old_raw.version).artifact
    raw = table(store, "raw_pairs", "new").artifact
    cleaned = table(store, "cleaned_pairs", "new cleaned", raw_pairs=raw.version).artifact
    # Current, but made from the old cleaned pairs: those and their raw pairs must stay.
    table(store, "hard_negatives", "negatives", cleaned_pairs=old_cleaned.version)
    orphan = table(store, "evaluation", "first", cleaned_pairs=cleaned.version).artifact
    table(store, "evaluation", "second", cleaned_pairs=cleaned.version, embedder_note="x")

    assert [a.version for a in store.prunable()] == [orphan.version]


def test_leftovers_of_a_dead_process_are_found(store: PipelineStore) -> None:
    mine = store.folder / ".staging" / "embedder-1-00000000"  # process 1 always lives
    dead = store.folder / ".staging" / "embedder-4194305-00000000"  # above the highest process id of Linux
    mine.mkdir(parents=True)
    dead.mkdir()

    assert store.abandoned() == [dead]


def test_pointers_are_plain_json(store: PipelineStore) -> None:
    artifact = table(store, "raw_pairs", "abc").artifact
    pointer = json.loads((store.folder / "raw_pairs" / "current.json").read_text())

    assert pointer == {"version": artifact.version}
