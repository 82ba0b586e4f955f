"""The store: whole or not at all, never made twice, verifiable, prunable."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from embed_pipeline.artifacts import (
    RUN_GOES_ON,
    RUN_IS_OVER,
    Artifact,
    Claim,
    Made,
    PipelineStore,
    Produced,
    Recipe,
    RunIds,
)
from embed_pipeline.errors import ArtifactError, ConfigurationError, TrainingError


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
    orphan = table(store, "embedder", "first", None, cleaned).artifact
    table(store, "embedder", "second", {"k": 1}, cleaned)

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


def in_run(store: PipelineStore, run: str) -> PipelineStore:
    return PipelineStore(store.folder.parent, store.pipeline, run=run)


def test_two_runs_at_once_go_on_with_what_each_of_them_made(store: PipelineStore) -> None:
    """Both make a model before either evaluates; without their own notes both would evaluate the later one."""
    raw = table(store, "raw_pairs", "abc").artifact
    trained = threading.Barrier(2)

    def train_and_evaluate(run: str) -> None:
        own = in_run(store, run)
        model = table(own, "embedder", f"weights of {run}", {"run": run}, own.current("raw_pairs")).artifact
        trained.wait(timeout=30)
        assert own.current("embedder") == model
        table(own, "evaluation", f"figures of {run}", {"run": run}, own.current("embedder"))

    threads = [threading.Thread(target=train_and_evaluate, args=(run,)) for run in ("run-a", "run-b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    for run in ("run-a", "run-b"):
        own = in_run(store, run)
        evaluated = store.get("embedder", own.current("evaluation").input("embedder"))
        assert (evaluated.path / "rows.txt").read_text() == f"weights of {run}"
        assert evaluated.input("raw_pairs") == raw.version
    # Whoever asks without a run gets what was made last.
    assert store.current("embedder") in [in_run(store, run).current("embedder") for run in ("run-a", "run-b")]


def test_a_run_goes_on_with_a_version_that_it_found_made_before(store: PipelineStore) -> None:
    first = table(in_run(store, "run-a"), "raw_pairs", "abc", {"k": 1}).artifact
    table(in_run(store, "run-b"), "raw_pairs", "abd", {"k": 2})

    found = table(in_run(store, "run-c"), "raw_pairs", "abc", {"k": 1})
    table(in_run(store, "run-d"), "raw_pairs", "abe", {"k": 3})

    assert found.reused
    assert in_run(store, "run-c").current("raw_pairs") == first
    assert in_run(store, "run-e").current("raw_pairs") == store.current("raw_pairs") != first


def grow_old(store: PipelineStore, run: str, seconds: float) -> Path:
    folder = store.folder / ".runs" / run
    then = time.time() - seconds
    os.utime(folder, (then, then))
    return folder


def test_pruning_leaves_a_run_between_two_stages_what_it_goes_on_with(store: PipelineStore) -> None:
    raw = table(in_run(store, "run-a"), "raw_pairs", "abc", {"k": 1}).artifact
    made = table(in_run(store, "run-a"), "embedder", "weights", {"k": 1}, raw).artifact
    table(in_run(store, "run-b"), "raw_pairs", "abd", {"k": 2})
    table(in_run(store, "run-b"), "embedder", "other weights", {"k": 2})

    assert store.prunable() == []

    grow_old(store, "run-a", RUN_GOES_ON.total_seconds() + 60)
    assert {(a.manifest.asset, a.version) for a in store.prunable()} == {
        ("raw_pairs", raw.version),
        ("embedder", made.version),
    }


def test_notes_of_runs_long_over_are_cleaned_away(store: PipelineStore) -> None:
    for run in ("run-a", "run-b"):
        table(in_run(store, run), "raw_pairs", "abc")
    old = grow_old(store, "run-a", RUN_IS_OVER.total_seconds() + 60)

    assert store.abandoned() == [old]
    for folder in store.abandoned():
        store.remove_folder(folder)

    assert [path.name for path in (store.folder / ".runs").iterdir()] == ["run-b"]
    assert in_run(store, "run-a").current("raw_pairs") == store.current("raw_pairs")


def test_pruning_keeps_what_it_is_told_to_keep_and_what_that_was_made_from(store: PipelineStore) -> None:
    raw = table(store, "raw_pairs", "old", {"k": 1}).artifact
    model = table(store, "embedder", "old weights", {"k": 1}, raw).artifact
    other = table(store, "embedder", "other weights", {"k": 2}, raw).artifact
    table(store, "raw_pairs", "new", {"k": 2})
    table(store, "embedder", "new weights", {"k": 3})

    assert {a.version for a in store.prunable()} == {raw.version, model.version, other.version}
    assert store.prunable(keep=[("embedder", model.version), ("evaluation", "gone")]) == [other]


def test_pruning_leaves_evaluations_for_they_are_the_history(store: PipelineStore) -> None:
    table(store, "evaluation", "last month", {"k": 1})
    table(store, "evaluation", "today", {"k": 2})

    assert store.prunable() == []


def of_another_pipeline(artifact: Artifact) -> None:
    """The whole folder of another pipeline's version, put in this one's place."""
    other = PipelineStore(artifact.path.parents[2], "another")
    copied = table(other, artifact.manifest.asset, "better weights").artifact
    shutil.rmtree(artifact.path)
    shutil.copytree(copied.path, artifact.path)


def of_another_version(artifact: Artifact) -> None:
    store = PipelineStore(artifact.path.parents[2], "support")
    renamed = table(store, artifact.manifest.asset, "other weights", {"k": 2}).artifact
    table(store, artifact.manifest.asset, "abc")
    shutil.rmtree(artifact.path)
    renamed.path.rename(artifact.path)


def edited(artifact: Artifact) -> None:
    manifest = artifact.path / "manifest.json"
    told = json.loads(manifest.read_text())
    told["report"]["rows"] = 1_000_000
    manifest.write_text(json.dumps(told, indent=2))


def hidden(artifact: Artifact) -> None:
    """A file is changed, and its entry in the manifest with it."""
    (artifact.path / "rows.txt").write_text("abX")
    other = table(PipelineStore(artifact.path.parents[2], "another"), artifact.manifest.asset, "abX").artifact
    manifest = artifact.path / "manifest.json"
    told = json.loads(manifest.read_text())
    told["files"]["rows.txt"]["sha256"] = other.manifest.files["rows.txt"].sha256
    manifest.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (of_another_pipeline, r"holds another/embedder version \w+, not support/embedder version \w+: it was copied"),
        (of_another_version, r"holds support/embedder version \w+, not support/embedder version \w+: it was copied"),
        (edited, r"manifest\.json was edited after support/embedder version \w+ was published"),
        (hidden, r"manifest\.json was edited after support/embedder version \w+ was published"),
    ],
    ids=["another pipeline's", "a renamed folder", "an edited manifest", "an edited file and manifest"],
)
def test_a_version_that_is_not_what_was_published_here_is_refused_everywhere(
    store: PipelineStore, harm: Callable[[Artifact], None], said: str
) -> None:
    artifact = table(store, "embedder", "abc").artifact
    harm(artifact)
    readers: list[Callable[[], object]] = [
        lambda: store.current("embedder"),
        lambda: store.get("embedder", artifact.version),
        store.prunable,  # what it was made from cannot be told
    ]
    for read in readers:
        with pytest.raises(ArtifactError, match=said):
            read()
    assert artifact.version not in [listed.version for listed in store.versions("embedder")]

    again = table(store, "embedder", "abc")

    assert not again.reused
    assert again.artifact.version == artifact.version
    again.artifact.verify()
    assert len(store.set_aside()) == 1
    assert store.prunable() == []


def test_a_manifest_written_anew_with_the_same_content_is_the_same(store: PipelineStore) -> None:
    artifact = table(store, "raw_pairs", "abc").artifact
    manifest = artifact.path / "manifest.json"
    manifest.write_text(json.dumps(dict(sorted(json.loads(manifest.read_text()).items()))))

    assert store.current("raw_pairs") == artifact


def test_a_file_that_was_added_is_told(store: PipelineStore) -> None:
    """An adapter or a module of code beside the weights changes a model as much as other weights do."""
    artifact = table(store, "embedder", "abc").artifact
    (artifact.path / "adapter_config.json").write_text("{}")

    with pytest.raises(ArtifactError, match=r"adapter_config\.json was added after support/embedder version"):
        artifact.verify()


@pytest.mark.parametrize(
    ("pointer", "said"),
    [
        ('{"version": "0123456789abcdef", "reused": false}', r"points to version 0123456789abcdef, which is not there"),
        ('{"version": "01234', r"current\.json cannot be read"),
        ("[]", r"current\.json cannot be read"),
        ("[" * 100_000, r"current\.json cannot be read"),
        ('{"reused": false}', r"current\.json cannot be read: KeyError\('version'\)"),
    ],
)
def test_a_pointer_that_leads_nowhere_says_so_and_is_mended_by_making_it_again(
    store: PipelineStore, pointer: str, said: str
) -> None:
    artifact = table(store, "raw_pairs", "abc").artifact
    (store.folder / "raw_pairs" / "current.json").write_text(pointer)

    with pytest.raises(ArtifactError, match=rf"{said}.*Materialize support/raw_pairs again"):
        store.current("raw_pairs")

    assert table(store, "raw_pairs", "abc").reused
    assert store.current("raw_pairs") == artifact


@contextmanager
def claimed(store: PipelineStore, made_by: Recipe) -> Iterator[Claim]:
    with store.claim("embedder", made_by) as claim:
        claim.take()
        yield claim


def test_checkpoints_outlive_a_training_but_not_its_version(store: PipelineStore) -> None:
    made_by = recipe({"k": 1})
    with claimed(store, made_by) as claim:
        folder = claim.folder
        assert folder is not None
        (folder / "step-1").mkdir()
        with claimed(store, recipe({"k": 2})) as other:
            assert other.folder not in (None, folder)
    assert (folder / "step-1").is_dir()

    assert store.abandoned() == []
    for path in (folder, folder / "claim"):
        if path.exists():
            os.utime(path, (0, 0))
    assert store.abandoned() == [folder]
    with claimed(store, made_by) as claim:
        claim.remove()
    assert not folder.exists()
    with store.claim("embedder", made_by) as claim:
        claim.remove()


def claim_and_wait(root: Path, told: Connection, after: str) -> None:
    """In a process of its own: take the claim, and hold it until told; or die with it."""
    with PipelineStore(root, "support").claim("embedder", recipe({"k": 1})) as claim:
        claim.take()
        told.send(claim.folder)
        told.recv()
        if after == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if after == "publishes":
            table(PipelineStore(root, "support"), "embedder", "weights", {"k": 1})


@pytest.mark.parametrize("after", ["holds it", "dies", "publishes"])
def test_a_claim_is_one_processs_at_a_time(
    store: PipelineStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: str
) -> None:
    monkeypatch.setattr("embed_pipeline.artifacts.LEASE_SECONDS", 0.4 if after == "holds it" else 60.0)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    other = context.Process(target=claim_and_wait, args=(store.folder.parent, theirs, after))
    other.start()
    assert ours.recv() == store.folder / ".checkpoints" / "embedder" / recipe({"k": 1}).digest
    if after != "holds it":
        # Clocks do not matter: neither what the other wrote last, nor when.
        for path in (store.folder / ".checkpoints").rglob("*"):
            os.utime(path, (4e9, 4e9))
        ours.send("go on")
        other.join(timeout=30)

    with store.claim("embedder", recipe({"k": 1})) as claim:
        produced = store.produce("embedder", recipe({"k": 1}), [], weights, content=["rows.txt"], claim=claim)
        assert (claim.folder is None) == (after != "dies")
        claim.remove()

    assert produced.reused == (after == "publishes")
    if after == "holds it":
        assert f"is still being trained in process {other.pid} on {platform.node()}" in caplog.text
        assert (store.folder / ".checkpoints" / "embedder" / recipe({"k": 1}).digest).is_dir(), "it is the other's"
        ours.send("go on")
        other.join(timeout=30)
    store.current("embedder").verify()


def test_a_claim_of_another_machine_ends_when_it_falls_silent(
    store: PipelineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embed_pipeline.artifacts.LEASE_SECONDS", 0.4)
    with claimed(store, recipe()) as claim:
        assert claim.folder is not None
        lease = claim.folder / "claim"
        told = lease.read_text()
    lease.write_text(told.replace(f"host={platform.node()}", "host=another-machine"))
    os.utime(lease, (4e9, 4e9))

    with claimed(store, recipe()) as claim:
        assert claim.folder is not None


def test_a_claim_that_is_lost_takes_the_training_off_the_checkpoints(
    store: PipelineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embed_pipeline.artifacts.LEASE_SECONDS", 0.3)
    with claimed(store, recipe()) as claim:
        assert claim.folder is not None
        claim.link = tmp_path / "checkpoints"
        claim.link.symlink_to(claim.folder)
        shutil.rmtree(store.folder / ".checkpoints")
        deadline = time.monotonic() + 30
        while claim.link.is_symlink() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not claim.link.is_symlink()


# ------------------------------------------------------------------------- what is damaged or in the way


def weights(out: Path) -> Made:
    (out / "rows.txt").write_text("weights")
    return Made({}, RunIds())


def file_at(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff not yours")


def folder_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("somebody's")


def link_at(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/nowhere/at/all")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def written(path: Path, text: str) -> None:
    path.write_text(text)


VERSION = "raw_pairs/{version}"
HARM: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a flipped bit": (f"{VERSION}/rows.txt", flip),
    "a flipped bit of what is not handed over": (f"{VERSION}/rejected.txt", flip),
    "a file for a file's folder": (f"{VERSION}/rows.txt", folder_at),
    "a deleted manifest": (f"{VERSION}/manifest.json", Path.unlink),
    "an empty manifest": (f"{VERSION}/manifest.json", lambda path: written(path, "")),
    "a manifest of garbage": (f"{VERSION}/manifest.json", file_at),
    "a folder for a manifest": (f"{VERSION}/manifest.json", folder_at),
    "a file for a version": (VERSION, file_at),
    "a dead link for a version": (VERSION, link_at),
    "an empty folder for a version": (VERSION, emptied),
    "a recipe of garbage": ("raw_pairs/recipes/{recipe}", file_at),
    "a recipe too long to be a name": ("raw_pairs/recipes/{recipe}", lambda path: written(path, "a" * 5000)),
    "a recipe that leads out of the store": ("raw_pairs/recipes/{recipe}", lambda path: written(path, "../../x")),
    "a folder for a recipe": ("raw_pairs/recipes/{recipe}", folder_at),
    "a file for the recipes": ("raw_pairs/recipes", file_at),
    "a file for the asset": ("raw_pairs", file_at),
    "a pointer of garbage": ("raw_pairs/current.json", file_at),
    "a folder for the pointer": ("raw_pairs/current.json", folder_at),
    "a manifest of brackets": (f"{VERSION}/manifest.json", lambda path: written(path, "[" * 100_000)),
    "a file for what is being made": (".staging", file_at),
    "a dead link for what is being made": (".staging", link_at),
    "a file for the runs' notes": (".runs", file_at),
    "a note of a run that is garbage": (".runs/run-a/raw_pairs", file_at),
    "a file for the pipeline": ("", file_at),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_damaged_or_in_the_way_is_set_aside_and_made_again(
    store: PipelineStore, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    own = in_run(store, "run-a")
    artifact = table(own, "raw_pairs", "abc").artifact
    where, harmed = HARM[harm]
    place = store.folder / where.format(version=artifact.version, recipe=recipe().digest)
    harmed(place)
    harmed_files = {path.read_bytes() for path in (place, *place.rglob("*")) if path.is_file()}

    again = table(own, "raw_pairs", "abc")

    damaged = place.is_relative_to(artifact.path) or harm in ("a file for the asset", "a file for the pipeline")
    assert again.reused == (not damaged)
    assert again.artifact.version == artifact.version
    for reader in (store, own, in_run(store, "run-b")):
        reader.current("raw_pairs").verify()
    assert not store.in_the_making()
    # Once is enough, and nothing was lost.
    assert table(own, "raw_pairs", "abc").reused
    aside = [place for root in (store.folder, store.folder.parent) for place in (root / ".set_aside").rglob("*")]
    kept = {path.read_bytes() for path in aside if path.is_file()}
    left = {place.read_bytes()} if place.is_file() else set()
    overwritten = harm in ("a pointer of garbage", "a note of a run that is garbage")
    assert overwritten or harmed_files <= kept | left
    if kept:
        assert "was set aside, it lies at" in caplog.text


def test_a_store_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file of mine")
    for root in (tmp_path / "store", tmp_path / "store" / "deeper"):
        with pytest.raises(ConfigurationError, match=rf"{tmp_path}/store is a file.*EMBED_PIPELINE_STORE"):
            table(PipelineStore(root, "support"), "raw_pairs", "abc")
    assert (tmp_path / "store").read_text() == "a file of mine"


def test_an_old_version_that_cannot_be_read_does_not_stop_what_follows(store: PipelineStore) -> None:
    old = table(store, "evaluation", "last month", {"k": 1}).artifact
    (old.path / "manifest.json").write_text("{}")

    today = table(store, "evaluation", "today", {"k": 2}).artifact

    assert store.versions("evaluation") == [today]
    assert store.prunable() == []
    assert old.path.is_dir()


def test_what_a_killed_process_published_is_found_although_it_noted_nothing(store: PipelineStore) -> None:
    first = table(store, "raw_pairs", "abc").artifact
    shutil.rmtree(store.folder / "raw_pairs" / "recipes")
    (store.folder / "raw_pairs" / "current.json").unlink()

    assert table(store, "raw_pairs", "abc").reused
    assert store.current("raw_pairs") == first


def test_deleting_takes_what_the_store_wrote_and_follows_no_link(store: PipelineStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    folder_at(elsewhere)
    artifact = table(store, "raw_pairs", "abc").artifact
    (artifact.path / "notes").mkdir()
    (artifact.path / "notes" / "mine.txt").write_text("mine")
    (artifact.path / "linked").symlink_to(elsewhere)

    store.remove(artifact)

    assert not artifact.path.exists()
    (aside,) = store.set_aside()
    assert sorted(path.name for path in aside.rglob("*")) == ["linked", "mine.txt", "notes"]

    store.embeddings_folder.symlink_to(elsewhere)
    assert store.embeddings_folder in store.abandoned()
    store.remove_folder(store.embeddings_folder)
    assert not store.embeddings_folder.is_symlink()
    assert (elsewhere / "notes.txt").is_file()


def test_what_others_put_among_the_leftovers_is_left_alone(store: PipelineStore) -> None:
    table(in_run(store, "run-a"), "raw_pairs", "abc")
    staging, runs = store.folder / ".staging", store.folder / ".runs"
    foreign = [staging / "notes.txt", staging / "embedder~x", staging / f"embedder~{platform.node()}~4194305~00000000"]
    for path in (*foreign, runs / "notes.txt"):
        path.write_text("mine")

    assert store.in_the_making() == store.abandoned() == []
    assert store.prunable() == []
    assert set(store.foreign()) == {*foreign, runs / "notes.txt"}


def test_a_folder_that_is_deleted_while_it_is_filled_is_the_error(store: PipelineStore) -> None:
    def deleted(out: Path) -> Made:
        shutil.rmtree(out)
        raise TrainingError("the job ended with exit code 1, and no rank left an error; its log is above")

    def deleted_in_the_end(out: Path) -> Made:
        shutil.rmtree(out)
        return Made({}, RunIds())

    for make in (deleted, deleted_in_the_end):
        with pytest.raises(ArtifactError, match=r"\.staging/embedder~.* was deleted while support/embedder") as told:
            store.produce("embedder", recipe(), [], make, content=None)
        assert told.value.passing
        assert not store.has_current("embedder")


def test_an_input_that_is_deleted_while_it_is_read_is_the_error(store: PipelineStore) -> None:
    raw = table(store, "raw_pairs", "abc").artifact

    def read(out: Path) -> Made:
        shutil.rmtree(raw.path)
        return Made({"rows": (raw.path / "rows.txt").read_text()}, RunIds())

    with pytest.raises(
        ArtifactError, match=rf"{raw.path}, or a file of it, was deleted.*support/raw_pairs again, then"
    ):
        store.produce("cleaned_pairs", recipe(), [raw], read, content=None)
    assert list((store.folder / ".staging").iterdir()) == []
