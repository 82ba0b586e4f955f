"""Where the steps of a run get their processes: forked from a server that has loaded what they share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from embed_pipeline.artifacts import Made, Recipe, RunIds
from tests.orchestration.conftest import SmallPipeline

MakePipeline = Callable[..., SmallPipeline]
REPOSITORY = Path(__file__).resolve().parents[2]

# Python beside a pipeline is run whenever definitions are loaded.
COUNTING = """
import os
from pathlib import Path

with Path(__file__).with_name("loads.txt").open("a") as loads:
    print(os.getpid(), file=loads)
"""
# Imports what the server imports, with everything watched that a fork would not survive.
WATCHED = """
import json, os, signal, sys, threading
import torch

asked = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, _name=name, _own=getattr(torch.cuda, name): asked.append(_name) or _own())
import embed_pipeline.orchestration.step_server

os.kill(os.getpid(), signal.SIGTERM)  # as all processes of a service are told to stop: the run ends the server
print(json.dumps({
    "asked": asked,
    "threads": threading.active_count(),
    "modules": [name for name in sys.modules if "." not in name],
    "capability": os.environ.get("ATEN_CPU_CAPABILITY"),
}))
"""


def materialize(small: SmallPipeline, selection: str, **config: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EMBED_PIPELINE_DEFS": str(small.folder)}
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "embed_pipeline.definitions"]
    told = ["--config-json", json.dumps(config)] if config else []
    return subprocess.run(
        [*command, "--select", selection, *told], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


def processes_of_steps(small: SmallPipeline) -> list[str]:
    with small.instance as instance:
        run = instance.get_runs(limit=1)[0]
        events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTED)
    return [str(event.dagster_event.engine_event_data.metadata["pid"].value) for event in events]


def test_steps_have_processes_of_their_own_and_load_nothing_again(make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    (small.folder / "counting.py").write_text(COUNTING)

    done = materialize(small, "small/raw_pairs,small/cleaned_pairs")

    assert done.returncode == 0, done.stdout + done.stderr
    steps = processes_of_steps(small)
    assert len(steps) == len(set(steps)) > 3  # two assets and their checks
    loads = (small.folder / "loads.txt").read_text().split()
    assert len(loads) == 2  # the run, and the server
    assert not set(loads) & set(steps)


@pytest.mark.parametrize("start", ["spawn", "in_process"])
def test_a_run_may_ask_for_another_start(start: str, make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    (small.folder / "counting.py").write_text(COUNTING)
    spawned = {"multiprocess": {"start_method": {"spawn": {}}, "max_concurrent": 1}}
    asked = spawned if start == "spawn" else {"in_process": {}}

    done = materialize(small, "small/raw_pairs", execution={"config": asked})

    assert done.returncode == 0, done.stdout + done.stderr
    steps, loads = processes_of_steps(small), (small.folder / "loads.txt").read_text().split()
    assert len(set(loads)) == len(steps) + 1  # each loaded them for itself: the run, and what it started
    assert set(steps) <= set(loads)
    assert (steps == []) == (start == "in_process")


@pytest.mark.parametrize("first", [True, False])
def test_the_server_starts_no_thread_and_asks_for_no_gpu(first: bool, make_pipeline: MakePipeline) -> None:
    small = make_pipeline()
    if not first:
        recipe = Recipe(inputs={}, settings={}, seed=1, code_version="1")
        small.store.produce("evaluation", recipe, [], lambda _: Made({}, RunIds()), content=None)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}

    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True, env=environment)

    told = json.loads(done.stdout.splitlines()[-1])
    assert told["asked"] == []
    assert told["threads"] == 1
    assert {"matplotlib", "sqlalchemy"} <= set(told["modules"])  # what every step needs
    assert ("sentence_transformers" in told["modules"]) == ("mlflow" in told["modules"]) == first
    assert told["capability"] == "default"  # the step tells that it ignores it
