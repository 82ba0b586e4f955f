"""What is known about the raw files before any is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.check import check_sources

MISSING = {
    "file": ({"path": "no.parquet"}, r"source\.path: no such file or folder: .*no\.parquet"),
    "glob": ({"path": "no/*.parquet"}, r"source\.path: no file matches .*no/\*\.parquet"),
    "folder without parquet": ({"path": "folder"}, r"folder names 1 file.* \(first: folder/a\.csv, not a \.parquet"),
    "glob of other files": ({"path": "folder/*"}, r"names 1 file.* \(first: folder/a\.csv, not a \.parquet"),
    "folder without data": ({"path": "empty"}, r"the folder .*empty holds no \.parquet file"),
    "glob of folders": ({"path": "em*"}, r"matches 1 folder\(s\), none of which holds a \.parquet"),
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
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("query\n")
    (tmp_path / "build.py").write_text("")
    settings, message = MISSING[case]
    with pytest.raises(ConfigurationError, match=message):
        check_sources(SourceSettings.model_validate(settings), tmp_path)


def test_a_path_that_the_script_will_build_passes(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text("")
    given: dict[str, Any] = {"path": "raw/*.parquet", "script": "build.py", "script_output": "raw"}
    check_sources(SourceSettings.model_validate(given), tmp_path)
