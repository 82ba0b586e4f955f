"""The ledger of promotions: whole or not at all, one after the other, never guessed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embed_pipeline.artifacts import Artifact, PipelineStore
from embed_pipeline.champions import Champion, History, changing, models_of, pair_key, pointer, read_history, record
from embed_pipeline.errors import ArtifactError
from tests.conftest import REPOSITORY
from tests.small_ledger import model, pair, promote


@pytest.fixture
def store(tmp_path: Path) -> PipelineStore:
    return PipelineStore(tmp_path / "store", "support")


def models(store: PipelineStore, name: str) -> tuple[Artifact, Artifact]:
    return model(store, "embedder", name), model(store, "reranker", name)


def champion(store: PipelineStore, name: str) -> Champion:
    embedder, reranker = models(store, name)
    return pair(embedder.version, reranker.version)


def start(what: str, store: PipelineStore, champion: Champion, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.small_ledger", what, str(store.folder), champion.embedder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([*command, champion.reranker, *more], cwd=REPOSITORY, text=True, **pipes)


def test_nobody_was_promoted(store: PipelineStore) -> None:
    history = read_history(store)
    assert (history.champion, history.previous, history.beaten_by("x"), history.taken_down("x")) == (None,) * 4


def test_a_promotion_is_found_by_path_and_remembers_whom_it_replaced(store: PipelineStore) -> None:
    first, second = champion(store, "first"), champion(store, "second")
    promote(store, first)
    promotion = promote(store, second)

    history = read_history(store)
    assert history.promotions[-1] == promotion
    assert [(entry.number, entry.event, entry.replaced) for entry in history.promotions] == [
        (1, "promoted", None),
        (2, "promoted", first),
    ]
    assert (history.champion, history.previous) == (second, first)
    assert (promotion.by, promotion.reason) == ("test", "because")
    assert (pointer(store) / "embedder" / "weights").read_text() == "second"
    assert (pointer(store) / "reranker" / "weights").read_text() == "second"
    assert json.loads((pointer(store) / "serving.json").read_text())["of"] == "second"
    assert models_of(store, second) == models(store, "second")
    assert second.key == pair_key(*models(store, "second"))
    assert second.versions == (("embedder", second.embedder), ("reranker", second.reranker), ("evaluation", "e"))


def test_the_store_can_be_moved_with_its_champion(store: PipelineStore, tmp_path: Path) -> None:
    promote(store, champion(store, "first"))
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")

    moved = PipelineStore(tmp_path / "elsewhere", "support")

    assert (pointer(moved) / "embedder" / "weights").read_text() == "first"
    assert read_history(moved).champion is not None


def test_rollback_and_retirement_are_entries_of_the_history(store: PipelineStore) -> None:
    first, second = champion(store, "first"), champion(store, "second")
    promote(store, first)
    promote(store, second)
    assert read_history(store).taken_down(second.key) is None

    promote(store, first, "rolled_back")

    history = read_history(store)
    assert history.champion == first
    assert history.taken_down(second.key) == history.promotions[-1]
    assert history.taken_down(first.key) is None
    assert (pointer(store) / "embedder" / "weights").read_text() == "first"

    promote(store, None, "retired")

    history = read_history(store)
    assert history.champion is None
    assert history.taken_down(first.key) == history.promotions[-1]
    assert not (pointer(store) / "embedder").exists()
    assert [entry.event for entry in history.promotions] == ["promoted", "promoted", "rolled_back", "retired"]

    promote(store, second)

    assert read_history(store).taken_down(second.key) is None  # promoted again: forgiven


def test_whom_the_champion_beat(store: PipelineStore) -> None:
    first, second = champion(store, "first"), champion(store, "second")
    promote(store, first)
    assert read_history(store).beaten_by(first.key) is None  # nobody served before
    promote(store, second)
    assert read_history(store).beaten_by(second.key) == first
    assert read_history(store).beaten_by(first.key) is None  # not the champion any more
    promote(store, first, "rolled_back")
    assert read_history(store).beaten_by(first.key) is None  # as when it was promoted, not whom it was put back for


@pytest.mark.parametrize("left", ["folder", "all but the link", "link not moved"])
def test_an_entry_that_never_came_into_force_does_not_count(store: PipelineStore, left: str) -> None:
    first, second = champion(store, "first"), champion(store, "second")
    promote(store, first)
    entry = store.folder / "promotions" / "0002"
    if left == "folder":
        entry.mkdir()
    else:
        shutil.copytree(store.folder / "promotions" / "0001", entry, symlinks=True)
        if left == "link not moved":
            (store.folder / ".champion.2").symlink_to("promotions/0002")

    assert read_history(store).champion == first
    assert promote(store, second).number == 2
    assert read_history(store).champion == second
    assert (pointer(store) / "embedder" / "weights").read_text() == "second"
    assert [path.name for path in store.folder.glob(".champion.*")] == []


def test_a_kill_at_any_moment_leaves_the_old_champion_or_the_new_one(store: PipelineStore) -> None:
    first, second = champion(store, "first"), champion(store, "second")
    promote(store, first)

    process = start("die", store, second)
    output, _ = process.communicate(timeout=60)

    killed = [json.loads(line) for line in output.splitlines()]
    assert process.returncode == 0
    assert len(killed) > 8  # the lock, a folder, two links, two files, the pointer made and moved, who waited
    old, new = (1, first.embedder, "first", "first"), (2, second.embedder, "second", "second")
    seen = [tuple(seen[1:]) for seen in killed]
    moved = seen.index(new)
    assert moved > 7
    assert seen[:moved] == [old] * moved
    assert {one[1:] for one in seen[moved:]} == {new[1:]}  # who comes after one that was killed promotes it again
    assert killed[-1][0] == 0


def test_two_processes_at_once_get_numbers_of_their_own(store: PipelineStore) -> None:
    first, second = champion(store, "first"), champion(store, "second")
    times = 20
    processes = [start("race", store, one, str(times)) for one in (first, second)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    numbers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]

    assert sorted(numbers[0] + numbers[1]) == list(range(1, 2 * times + 1))
    history = read_history(store)
    for before, after in zip(history.promotions, history.promotions[1:], strict=False):
        assert after.replaced == before.champion
    by = {number: one for one, got in zip((first, second), numbers, strict=True) for number in got}
    assert [entry.champion for entry in history.promotions] == [by[n] for n in range(1, 2 * times + 1)]


def cut(store: PipelineStore) -> None:
    (store.folder / "promotions" / "0001" / "promotion.json").write_text('{"number": 1, "ev')


def take_away(store: PipelineStore) -> None:
    shutil.rmtree(store.folder / "promotions" / "0001")


def copy_over(store: PipelineStore) -> None:
    shutil.copy(*(store.folder / "promotions" / number / "promotion.json" for number in ("0002", "0001")))


def without_links(store: PipelineStore) -> None:
    """A backup that followed the link."""
    kept = pointer(store).resolve()
    pointer(store).unlink()
    shutil.copytree(kept, pointer(store))


def link_elsewhere(store: PipelineStore) -> None:
    pointer(store).unlink()
    pointer(store).symlink_to("embedder")


def remove_link(store: PipelineStore) -> None:
    pointer(store).unlink()


def set_back(store: PipelineStore) -> None:
    pointer(store).unlink()
    pointer(store).symlink_to("promotions/0001")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, r"0001/promotion\.json cannot be read"),
        (take_away, r"0001/promotion\.json cannot be read"),
        (copy_over, r"0001/promotion\.json is promotion 2: it was copied there"),
        (without_links, r"champion is not a link to a promotion"),
        (link_elsewhere, r"champion is not a link to a promotion"),
        (remove_link, r"0002 stands, but .*champion is gone"),
        (set_back, r"0003 stands, but .*champion was set back to 1"),
    ],
    ids=[
        "cut short",
        "deleted",
        "copied over another",
        "links followed",
        "link astray",
        "link deleted",
        "link set back",
    ],
)
def test_a_history_that_cannot_be_right_is_an_error_not_a_guess(
    store: PipelineStore, harm: Callable[[PipelineStore], None], said: str
) -> None:
    for name in ("first", "second", "third"):
        promote(store, champion(store, name))
    kept = sorted(path.name for path in (store.folder / "promotions").iterdir())
    harm(store)

    with pytest.raises(ArtifactError, match=rf"(?s){said}.*who is the champion of support cannot be told.*backup"):
        read_history(store)
    with pytest.raises(ArtifactError, match="cannot be told"):
        promote(store, champion(store, "fourth"))
    left = sorted(path.name for path in (store.folder / "promotions").iterdir())
    assert left == (kept if harm is not take_away else [name for name in kept if name != "0001"])


def test_a_promotion_by_an_old_history_is_refused(store: PipelineStore) -> None:
    first = champion(store, "first")
    promote(store, first)

    with changing(store), pytest.raises(AssertionError, match="the history has moved on"):
        record(store, History(), "promoted", first, by="test", reason="")
    assert len(read_history(store).promotions) == 1


def test_a_champion_whose_model_is_gone_is_not_promoted(store: PipelineStore) -> None:
    first, second = champion(store, "first"), champion(store, "second")
    promote(store, first)
    store.remove(store.get("reranker", second.reranker))

    with pytest.raises(ArtifactError, match=f"support/reranker has no version {second.reranker}"):
        promote(store, second)
    assert read_history(store).champion == first
