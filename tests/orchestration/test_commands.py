"""The commands of the README, as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def test_dg_scaffold_writes_a_pipeline_that_says_what_to_fill_in(make_pipeline: MakePipeline) -> None:
    listed = run(make_pipeline(), "dg", "list", "components")

    assert listed.returncode == 0, listed.stderr[-2000:]
    assert "embed_pipeline.RetrievalPipeline" in listed.stdout
