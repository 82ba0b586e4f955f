"""What is known about the raw files before any is opened, and the script that builds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import check_sources
from embed_pipeline.sources.script import run_script

MISSING = {
    "file": ({"path": "no.parquet"}, r"source\.path: no such file or folder: .*no\.parquet"),
    "glob": ({"path": "no/*.parquet"}, r"source\.path: no file matches .*no/\*\.parquet"),
    "folder without parquet": ({"path": "folder"}, r"the folder .*folder holds no \.parquet file"),
    "glob of other files": ({"path": "folder/*"}, r"matches 1 file\(s\), none ending in \.parquet \(first: folder/a"),
    "remote": ({"path": "s3://bucket/a.parquet"}, "expected a local path"),
    "extra corpus": ({"path": "there.parquet", "extra_corpus": "no.parquet"}, r"source\.extra_corpus: no such"),
    "script": (
        {"path": "raw/*.parquet", "script": "no.py", "script_output": "raw"},
        r"source\.script: no file at .*no\.py",
    ),
    "path outside the script's output": (
        {"path": "elsewhere/*.parquet", "script": "build.py", "script_output": "raw"},
        r"source\.path: no file matches",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_not_there(tmp_path: Path, parquet: Callable[..., Path], case: str) -> None:
    parquet("there.parquet", query=["q"], passage=["p"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("query\n")
    (tmp_path / "build.py").write_text("")
    settings, message = MISSING[case]
    with pytest.raises(ConfigurationError, match=message):
        check_sources(SourceSettings.model_validate(settings), tmp_path)


def test_a_path_that_the_script_will_build_passes(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text("")
    given: dict[str, Any] = {"path": "raw/*.parquet", "script": "build.py", "script_output": "raw"}
    check_sources(SourceSettings.model_validate(given), tmp_path)


def test_the_script_gets_its_folder(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[1], 'made').write_text('x')")
    run_script(SourceSettings.model_validate({"path": "r/o", "script": "build.py", "script_output": "r/o"}), tmp_path)
    assert (tmp_path / "r" / "o" / "made").read_text() == "x"


BUILD = "import sys, pathlib; folder = pathlib.Path(sys.argv[1]); "
BUILT = SourceSettings.model_validate({"path": "raw/*.parquet", "script": "build.py", "script_output": "raw"})


def test_what_an_older_run_wrote_goes_when_the_script_succeeds(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(BUILD + "[(folder / n).write_text('old') for n in ('a.parquet', 'b.parquet')]")
    run_script(BUILT, tmp_path)
    (tmp_path / "build.py").write_text(
        BUILD + "print(folder); assert not any(folder.iterdir()); (folder / 'b.parquet').write_text('new')"
    )
    run_script(BUILT, tmp_path)
    assert {path.name: path.read_text() for path in (tmp_path / "raw").iterdir()} == {"b.parquet": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "raw"]


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
    (tmp_path / "build.py").write_text(code)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.parquet").write_text("old")
    with pytest.raises(SourceError, match=message):
        run_script(BUILT, tmp_path)
    assert {path.name: path.read_text() for path in (tmp_path / "raw").iterdir()} == {"a.parquet": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "raw"]


def test_a_linked_output_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "raw").symlink_to(tmp_path / "disk" / "data")
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a.parquet').write_text('new')")
    run_script(BUILT, tmp_path)
    assert (tmp_path / "raw").is_symlink()
    assert [path.name for path in (tmp_path / "disk" / "data").iterdir()] == ["a.parquet"]


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
        run_script(settings, folder)


def test_what_was_there_stays_where_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build.py").write_text(BUILD + "(folder / 'a.parquet').write_text('new')")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.parquet").write_text("old")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if target == tmp_path / "raw" and "new" in (self / "a.parquet").read_text():
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(SourceError, match=r"raw cannot be replaced by what the script wrote: disk full"):
        run_script(BUILT, tmp_path)
    assert (tmp_path / "raw" / "a.parquet").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "raw"]
