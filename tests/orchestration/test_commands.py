"""The commands of the README, as processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.orchestration.conftest import SmallPipeline

MakePipeline = Callable[..., SmallPipeline]
REPOSITORY = Path(__file__).resolve().parents[2]


def run(small: SmallPipeline, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EMBED_PIPELINE_DEFS": str(small.folder), "NO_COLOR": "1"}
    tool = str(Path(sys.executable).with_name(command[0]))
    return subprocess.run([tool, *command[1:]], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def materialize(small: SmallPipeline, selection: str, config: dict[str, object]) -> subprocess.CompletedProcess[str]:
    given = json.dumps({"ops": config})
    module = ("-m", "embed_pipeline.definitions")
    return run(small, "dagster", "asset", "materialize", *module, "--select", selection, "--config-json", given)


def test_dagster_asset_materialize_takes_a_runs_settings_and_tells_failure(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    to_negatives = "small/raw_pairs,small/cleaned_pairs,small/hard_negatives"

    done = materialize(small, to_negatives, {"small__hard_negatives": {"config": {"num_negatives": 2}}})

    assert done.returncode == 0, done.stderr[-2000:]
    negatives = small.store.current("hard_negatives")
    assert negatives.report["num_negatives"] == 2
    assert negatives.manifest.runs.dagster is not None

    refused = materialize(small, "small/hard_negatives", {"small__hard_negatives": {"config": {"range_min": 99}}})

    assert refused.returncode == 1
    assert "range_min (99) must be below top_k (20)" in refused.stderr + refused.stdout


@pytest.mark.parametrize("command", [("dg", "check", "defs"), ("dg", "list", "defs", "--json")])
def test_dg_knows_the_pipelines(make_pipeline: MakePipeline, command: tuple[str, ...]) -> None:
    small = make_pipeline()

    done = run(small, *command)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if command[1] == "list":
        assert "small/embedder" in done.stdout
        assert "demo/embedder" in done.stdout


def test_dg_launch_materializes(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()

    done = run(small, "dg", "launch", "--assets", "small/raw_pairs")

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert small.store.current("raw_pairs").report["rows"] == 120


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project without the demo, which `dg` may write into."""
    folder = tmp_path / "project"
    leave = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(REPOSITORY / "embed_pipeline", folder / "embed_pipeline", ignore=leave)
    (folder / "embed_pipeline" / "defs").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def run_in(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command on the copy alone, whose code comes before that of the installed project."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EMBED_PIPELINE_")}
    environment = {**inherited, "PYTHONPATH": str(project), "DAGSTER_HOME": str(project), "NO_COLOR": "1"}
    tool = str(Path(sys.executable).with_name(command[0]))
    return subprocess.run([tool, *command[1:]], cwd=project, env=environment, capture_output=True, text=True)


def test_dg_scaffold_writes_a_pipeline_that_loads_once_it_is_filled_in(project: Path) -> None:
    scaffolded = run_in(project, "dg", "scaffold", "defs", "embed_pipeline.RetrievalPipeline", "support")
    assert scaffolded.returncode == 0, scaffolded.stdout[-2000:] + scaffolded.stderr[-2000:]
    written = project / "embed_pipeline" / "defs" / "support" / "defs.yaml"
    assert "name: support" in written.read_text()

    open_yet = run_in(project, "dg", "check", "defs")
    assert open_yet.returncode == 1
    told = open_yet.stdout + open_yet.stderr
    assert f"{written}:" in told
    assert "needs `revision`: the 40-digit commit hash" in told

    written.write_text(
        written.read_text().replace("FILL IN: 40-digit commit", "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a")
    )
    (written.parent / "raw").mkdir()
    pq.write_table(pa.table({"query": ["what"], "passage": ["this"]}), written.parent / "raw" / "pairs.parquet")
    listed = run_in(project, "dg", "list", "defs", "--json")
    assert listed.returncode == 0, listed.stderr[-2000:]
    assert "support/champion" in listed.stdout
    assert "broken_yaml" not in listed.stdout


def test_a_broken_yaml_fails_the_check_and_not_the_runs_of_others(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    broken = small.folder / "broken" / "defs.yaml"
    broken.parent.mkdir()
    broken.write_text("type: embed_pipeline.RetrievalPipeline\nattributes:\n  name: broken\n")

    done = materialize(small, "small/raw_pairs", {})
    assert done.returncode == 0, done.stderr[-2000:]
    assert small.store.current("raw_pairs").report["rows"] == 120
    assert f"{broken}:2: source is required" in done.stderr

    refused = materialize(small, "key:broken/*", {})
    assert refused.returncode == 1
    assert f"{broken}:2: source is required" in refused.stderr + refused.stdout

    checked = run(small, "dg", "check", "defs")
    assert checked.returncode == 1
    assert f"{broken}:2: source is required" in checked.stdout + checked.stderr
