"""The store: whole or not at all, never made twice, verifiable, prunable."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from embed_pipeline.artifacts import Artifact, Made, PipelineStore, Produced, Recipe, RunIds
from embed_pipeline.errors import ArtifactError


@pytest.fixture
def store(tmp_path: Path) -> PipelineStore:
    return PipelineStore(tmp_path / "store", "support")


def recipe(settings: dict[str, object] | None = None, **inputs: str) -> Recipe:
    return Recipe(inputs=inputs, settings=settings or {}, seed=1, code_version="1")


def table(
    store: PipelineStore, asset: str, content: str, settings: dict[str, object] | None = None, *inputs: Artifact
) -> Produced:
    """Publish a table of one file, and another file that is not handed over."""

    def make(out: Path) -> Made:
        (out / "rows.txt").write_text(content)
        (out / "rejected.txt").write_text(str(settings))
        return Made({"rows": len(content)}, RunIds(dagster="run-1"))

    told = recipe(settings, **{artifact.manifest.asset: artifact.content for artifact in inputs})
    return store.produce(asset, told, inputs, make, content=["rows.txt"])


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

    again = store.produce("raw_pairs", recipe({"k": 1}), [], never, content=["rows.txt"])

    assert again.reused
    assert not first.reused
    assert again.artifact == first.artifact


def test_equal_tables_have_equal_content_and_a_version_for_each_origin(store: PipelineStore) -> None:
    first = table(store, "raw_pairs", "abc", {"k": 1}).artifact
    same_rows = table(store, "raw_pairs", "abc", {"k": 2}).artifact
    other_rows = table(store, "raw_pairs", "abd", {"k": 3}).artifact

    assert same_rows.content == first.content != other_rows.content
    assert len({first.version, same_rows.version, other_rows.version}) == 3
    # What is not handed over is kept as each recipe made it.
    assert (store.current("raw_pairs").path / "rejected.txt").read_text() == "{'k': 3}"
    assert (same_rows.path / "rejected.txt").read_text() == "{'k': 2}"


def test_what_follows_equal_tables_is_not_made_again_and_names_what_it_was_made_from(store: PipelineStore) -> None:
    first = table(store, "raw_pairs", "abc", {"k": 1}).artifact
    cleaned = table(store, "cleaned_pairs", "cleaned", None, first).artifact
    again = table(store, "raw_pairs", "abc", {"k": 2}).artifact

    reused = table(store, "cleaned_pairs", "cleaned", None, again)

    assert reused.reused
    assert store.was_reused("cleaned_pairs")
    assert reused.artifact.input("raw_pairs") == first.version
    # Another recipe with the same rows names its own input.
    other = table(store, "cleaned_pairs", "cleaned", {"k": 1}, again).artifact
    assert other.content == cleaned.content
    assert other.input("raw_pairs") == again.version


def test_the_content_of_a_model_is_its_recipe(store: PipelineStore) -> None:
    def make(out: Path) -> Made:
        (out / "weights").write_text("same weights")
        return Made({}, RunIds())

    one = store.produce("embedder", recipe({"lr": 1}), [], make, content=None)
    two = store.produce("embedder", recipe({"lr": 2}), [], make, content=None)

    assert one.artifact.content != two.artifact.content


def test_a_changed_input_is_refused_before_anything_is_made_from_it(store: PipelineStore) -> None:
    raw = table(store, "raw_pairs", "abc").artifact
    (raw.path / "rows.txt").write_text("abX")

    with pytest.raises(ArtifactError, match="was changed after support/raw_pairs version"):
        table(store, "cleaned_pairs", "cleaned", None, raw)
    assert not store.has_current("cleaned_pairs")


def test_a_truncated_version_is_made_again(store: PipelineStore) -> None:
    artifact = table(store, "raw_pairs", "abc").artifact
    (artifact.path / "rows.txt").write_text("a")

    assert not table(store, "raw_pairs", "abc").reused
    store.current("raw_pairs").verify()


def test_nothing_stays_of_a_version_whose_making_failed(store: PipelineStore) -> None:
    table(store, "raw_pairs", "abc")

    def fail(out: Path) -> Made:
        (out / "rows.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.produce("raw_pairs", recipe({"k": 9}), [], fail, content=["rows.txt"])

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
    old_cleaned = table(store, "cleaned_pairs", "old cleaned", None, old_raw).artifact
    raw = table(store, "raw_pairs", "new").artifact
    cleaned = table(store, "cleaned_pairs", "new cleaned", None, raw).artifact
    # Current, but made from the old cleaned pairs: those and their raw pairs must stay.
    table(store, "hard_negatives", "negatives", None, old_cleaned)
    orphan = table(store, "evaluation", "first", None, cleaned).artifact
    table(store, "evaluation", "second", {"k": 1}, cleaned)

    assert [a.version for a in store.prunable()] == [orphan.version]


def test_leftovers_of_a_dead_process_are_found(store: PipelineStore) -> None:
    staging = store.folder / ".staging"
    machine = platform.node()
    names = {
        "alive": f"embedder~{machine}~1~00000000",  # process 1 always lives
        "elsewhere": "embedder~another-machine~4194305~00000000",
        "dead": f"embedder~{machine}~4194305~00000000",  # above the highest process id of Linux
    }
    for name in names.values():
        (staging / name).mkdir(parents=True)

    assert store.abandoned() == [staging / names["dead"]]
    assert store.in_the_making() == sorted([staging / names["alive"], staging / names["elsewhere"]])


def test_a_version_whose_input_was_deleted_by_hand_can_still_be_listed(store: PipelineStore) -> None:
    raw = table(store, "raw_pairs", "abc").artifact
    cleaned = table(store, "cleaned_pairs", "cleaned", None, raw).artifact
    store.remove(raw)

    assert store.lineage(cleaned) == {"cleaned_pairs": {cleaned.version}}
