"""The script that builds the raw files: what it replaces, and what is never deleted."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from embed_pipeline.artifacts import SMOKE_TEST_STORE, PipelineStore, pipelines_in
from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.script import run_script


def test_the_script_gets_its_folder(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'made').write_text('x')")
    run_script(
        SourceSettings.model_validate({"path": "r/o", "script": "build.py", "script_output": "r/o"}),
        tmp_path,
        lists(tmp_path),
    )
    assert (tmp_path / "r" / "o" / "made").read_text() == "x"


def lists(folder: Path) -> Path:
    """Where a store keeps what scripts wrote."""
    return folder / "store" / "lists"


def files_of(folder: Path) -> dict[str, str]:
    """What a script and others left below `folder`."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


BUILD = "import sys, pathlib; folder = pathlib.Path(sys.argv[1]); "
BUILT = SourceSettings.model_validate({"path": "raw/*.parquet", "script": "build.py", "script_output": "raw"})


def test_what_an_older_run_wrote_goes_when_the_script_succeeds(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(BUILD + "[(folder / n).write_text('old') for n in ('a.parquet', 'b.parquet')]")
    run_script(BUILT, tmp_path, lists(tmp_path))
    (tmp_path / "build.py").write_text(
        BUILD + "print(folder); assert not any(folder.iterdir()); (folder / 'b.parquet').write_text('new')"
    )
    run_script(BUILT, tmp_path, lists(tmp_path))
    assert files_of(tmp_path / "raw") == {"b.parquet": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "raw", "store"]


FAILING = {
    "raises": (
        "raise RuntimeError('the mirror is down')",
        r"(?s)build\.py failed with exit code 1.*the mirror is down",
    ),
    "half done": (BUILD + "(folder / 'a.parquet').write_text('new'); sys.exit(3)", "failed with exit code 3"),
    "writes elsewhere": ("", r"build\.py wrote nothing to the folder that is its first argument.*sys\.argv\[1\]"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_script_shows_its_last_words_and_changes_nothing(tmp_path: Path, case: str) -> None:
    code, message = FAILING[case]
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a.parquet').write_text('old')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    (tmp_path / "build.py").write_text(code)
    with pytest.raises(SourceError, match=message):
        run_script(BUILT, tmp_path, lists(tmp_path))
    assert files_of(tmp_path / "raw") == {"a.parquet": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "raw", "store"]


def test_a_linked_output_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "raw").symlink_to(tmp_path / "disk" / "data")
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a.parquet').write_text('new')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    assert (tmp_path / "raw").is_symlink()
    run_script(BUILT, tmp_path, lists(tmp_path))
    assert files_of(tmp_path / "disk" / "data") == {"a.parquet": "new"}


@pytest.mark.parametrize(
    ("script", "output", "holds"),
    [("build.py", ".", "the YAML file"), ("build.py", "..", "the YAML file"), ("raw/build.py", "raw", "the script")],
)
def test_a_folder_that_holds_more_is_not_replaced(tmp_path: Path, script: str, output: str, holds: str) -> None:
    folder = tmp_path / "pipeline"
    (folder / "raw").mkdir(parents=True)
    (folder / script).write_text("")
    settings = SourceSettings.model_validate({"path": "raw", "script": script, "script_output": output})
    with pytest.raises(ConfigurationError, match=rf"source\.script_output: .* holds {holds}.*Name a folder of its own"):
        run_script(settings, folder, lists(tmp_path))


def test_what_was_there_stays_where_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a.parquet').write_text('old')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a.parquet').write_text('new')")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if target == tmp_path / "raw" and "new" in (self / "a.parquet").read_text():
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(SourceError, match=r"raw cannot be replaced by what the script wrote: disk full"):
        run_script(BUILT, tmp_path, lists(tmp_path))
    assert (tmp_path / "raw" / "a.parquet").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "raw", "store"]


@pytest.mark.parametrize("output", ["other", "linked", "../other", "above"])
def test_files_that_the_script_did_not_write_are_never_deleted(tmp_path: Path, output: str) -> None:
    folder = tmp_path / "pipeline"
    delivered = {"other": "other", "linked": "../disk", "../other": "../other", "above": "above/below"}[output]
    (folder / delivered).mkdir(parents=True)
    (folder / delivered / "delivered.parquet").write_text("by hand")
    if output == "linked":
        (folder / "linked").symlink_to(tmp_path / "disk")
    (folder / "build.py").write_text(BUILD + "(folder / 'ran').touch(); (folder.parent / 'ran').touch()")
    settings = SourceSettings.model_validate({"path": "raw", "script": "build.py", "script_output": output})
    for _ in range(2):
        with pytest.raises(
            ConfigurationError, match=r"holds 1 file\(s\) that build\.py did not write.*delivered\.parquet"
        ):
            run_script(settings, folder, lists(tmp_path))
    assert (folder / delivered / "delivered.parquet").read_text() == "by hand"
    assert not [*tmp_path.rglob("ran")]


@pytest.mark.parametrize("change", ["added", "edited", "replaced by a link", "of the same length", "list damaged"])
def test_what_came_or_changed_since_the_script_ran_is_kept(tmp_path: Path, change: str) -> None:
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'sub').mkdir(); (folder / 'sub' / 'a').write_text('old')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    raw = tmp_path / "raw"
    if change == "added":
        (raw / "sub" / "b").write_text("mine")
    elif change == "list damaged":
        (listed,) = lists(tmp_path).iterdir()
        listed.write_text("{")
    elif change == "replaced by a link":
        (raw / "sub" / "a").unlink()
        (raw / "sub" / "a").symlink_to(tmp_path / "build.py")
    else:
        (raw / "sub" / "a").write_text("mine" if change == "edited" else "new")
    before = files_of(raw)
    with pytest.raises(
        ConfigurationError, match=r"did not write for this store, or that were changed since: sub/[ab]\. "
    ):
        run_script(BUILT, tmp_path, lists(tmp_path))
    assert files_of(raw) == before


def test_a_list_holds_for_one_folder(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "build.py").write_text(BUILD + "(folder / 'a').write_text('x'); (folder / 'l').symlink_to('a')")
    run_script(BUILT, tmp_path / "one", lists(tmp_path))
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    with pytest.raises(
        ConfigurationError, match=r"two/raw holds 2 file\(s\) that build\.py did not write for this store"
    ):
        run_script(BUILT, tmp_path / "two", lists(tmp_path))
    assert files_of(tmp_path / "two" / "raw") == {"a": "x", "l": "x"}


def test_files_copied_back_are_still_the_scripts(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a').write_text('x'); (folder / 'l').symlink_to('a')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    shutil.copytree(tmp_path / "raw", tmp_path / "copy", symlinks=True, copy_function=shutil.copy)
    shutil.rmtree(tmp_path / "raw")
    (tmp_path / "copy").rename(tmp_path / "raw")
    run_script(BUILT, tmp_path, lists(tmp_path))
    assert files_of(tmp_path / "raw") == {"a": "x", "l": "x"}


def entry(name: str, content: bytes) -> dict[str, str | int]:
    return {
        "name": name,
        "what": "file",
        "bytes": len(content),
        "modified_ns": 0,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_a_list_that_was_delivered_authorises_nothing(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a').write_text('new')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    (listed,) = lists(tmp_path).iterdir()
    delivered = json.loads(listed.read_text())
    delivered["written"] = [entry("d.parquet", b"mine")]
    (tmp_path / "raw" / "a").unlink()
    (tmp_path / "raw" / "d.parquet").write_bytes(b"mine")
    for name in (listed.name, ".written-by-script.json"):
        (tmp_path / "raw" / name).write_text(json.dumps(delivered))
    with pytest.raises(ConfigurationError, match=r"holds 3 file\(s\) that build\.py did not write.*d\.parquet"):
        run_script(BUILT, tmp_path, lists(tmp_path))
    assert (tmp_path / "raw" / "d.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize("way", ["absolute", "above", "through a link"])
def test_no_list_leads_out_of_the_folder(tmp_path: Path, way: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    victim = tmp_path / "elsewhere" / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "build.py").write_text(BUILD + f"(folder / 'link').symlink_to({str(victim.parent)!r})")
    run_script(BUILT, tmp_path, lists(tmp_path))
    (listed,) = lists(tmp_path).iterdir()
    told = json.loads(listed.read_text())
    name = {"absolute": str(victim), "above": "../elsewhere/victim", "through a link": "link/victim"}[way]
    told["written"].append(entry(name, b"mine"))
    listed.write_text(json.dumps(told))
    run_script(BUILT, tmp_path, lists(tmp_path))
    assert victim.read_bytes() == b"mine"


def test_a_run_that_was_killed_leaves_files_that_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a').write_text('old')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    before = [path.read_bytes() for path in lists(tmp_path).iterdir()]
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a').write_text('newer')")
    rename = Path.rename

    class Killed(BaseException):
        pass

    def last(self: Path, target: Path) -> Path:
        found = rename(self, target)
        if target == tmp_path / "raw":
            raise Killed
        return found

    monkeypatch.setattr(Path, "rename", last)
    with pytest.raises(Killed):
        run_script(BUILT, tmp_path, lists(tmp_path))
    monkeypatch.undo()
    assert files_of(tmp_path / "raw") == {"a": "newer"}
    assert [path.read_bytes() for path in lists(tmp_path).iterdir()] != before
    run_script(BUILT, tmp_path, lists(tmp_path))


@pytest.mark.parametrize("output", ["store/pipeline", "store", "home"])
def test_the_store_is_not_replaced(tmp_path: Path, output: str) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "build.py").write_text("")
    settings = SourceSettings.model_validate({"path": "x", "script": "build.py", "script_output": f"../{output}"})
    where = tmp_path / "home" / "store" / "lists" if output == "home" else lists(tmp_path)
    with pytest.raises(ConfigurationError, match=r"script_output: .* (lies in|holds) the store.*Name a folder"):
        run_script(settings, folder, where)


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(
        "import os, sys; open(os.fsencode(sys.argv[1]) + b'/\\xff.txt', 'w'); open(sys.argv[1] + '/a', 'w')"
    )
    with pytest.raises(SourceError, match=r"whose name is not UTF-8: '\\udcff\.txt'"):
        run_script(BUILT, tmp_path, lists(tmp_path))
    assert not (tmp_path / "raw").exists()


def test_a_link_that_the_script_wrote_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.parquet").write_text("by hand")
    (tmp_path / "build.py").write_text(BUILD + f"(folder / 'linked').symlink_to({str(tmp_path / 'disk')!r})")
    run_script(BUILT, tmp_path, lists(tmp_path))
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'b').write_text('new')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    assert files_of(tmp_path / "raw") == {"b": "new"}
    assert files_of(tmp_path / "disk") == {"a.parquet": "by hand"}


def test_another_script_does_not_replace_it(tmp_path: Path) -> None:
    for name in ("build.py", "other.py"):
        (tmp_path / name).write_text(BUILD + f"(folder / 'a').write_text({name!r})")
    run_script(BUILT, tmp_path, lists(tmp_path))
    with pytest.raises(ConfigurationError, match=r"was built by another script, .*/build\.py, and .*/other\.py"):
        run_script(BUILT.model_copy(update={"script": Path("other.py")}), tmp_path, lists(tmp_path))
    assert files_of(tmp_path / "raw") == {"a": "build.py"}


def test_a_file_that_came_while_the_script_ran_is_kept(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a').write_text('old')")
    run_script(BUILT, tmp_path, lists(tmp_path))
    (tmp_path / "build.py").write_text(
        BUILD + f"(folder / 'a').write_text('new'); pathlib.Path({str(tmp_path)!r}, 'raw', 'b').write_text('mine')"
    )
    with pytest.raises(ConfigurationError, match=r"changed since: b\. "):
        run_script(BUILT, tmp_path, lists(tmp_path))
    assert files_of(tmp_path / "raw") == {"a": "old", "b": "mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "raw", "store"]


def test_a_smoke_test_and_a_run_in_full_know_the_same_files(tmp_path: Path) -> None:
    small, whole = PipelineStore(tmp_path / SMOKE_TEST_STORE, "a"), PipelineStore(tmp_path, "b")
    assert small.script_lists == whole.script_lists
    assert not [*pipelines_in(tmp_path)]
    small.script_lists.mkdir()
    assert not [*pipelines_in(tmp_path)]
