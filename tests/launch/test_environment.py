"""What of the surrounding environment reaches the ranks of a job, by real torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.launch.environment import compute_as_asked
from embed_pipeline.launch.job import Site, check_site, launch_job
from embed_pipeline.launch.torchrun import torchrun_command
from embed_pipeline.settings import LaunchSettings

# A rank that leaves its environment beside its job file.
WITNESS = """
import json, os, sys
from pathlib import Path
Path(sys.argv[1]).with_name(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))
"""
FOREIGN = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "PET_NNODES": "2",
    "RANK": "7",
    "WORLD_SIZE": "9",
    "MASTER_ADDR": "10.0.0.1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "another",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "NVIDIA_TF32_OVERRIDE": "1",
    "TRANSFORMERS_SDPA_FORCE_GQA": "1",
    "PYTHONOPTIMIZE": "1",
    "PYTHONSTARTUP": "/no/such/file",
    "MLFLOW_RUN_ID": "secret-of-another",
    "DAGSTER_PIPES_CONTEXT": "secret-of-another",
    "COMPANY_SETTING": "secret-of-the-company",
    "CUDNN_VERSION": "9",
    "PYTHON_VERSION": "3",
    "NVIDIA_REQUIRE_CUDA": "cuda>=12",
}
NEEDED = {
    "CUDA_VISIBLE_DEVICES": "1,0",
    "NCCL_DEBUG": "WARN",
    "HF_HOME": "/models",
    "https_proxy": "http://proxy:3128",
    "AWS_PROFILE": "store",
    "LC_TIME": "C",
    "BASH_FUNC_module%%": "() {  :\n}",  # `module load` in launch.setup
}


@dataclass(frozen=True)
class WitnessJob:
    world_size: int
    entry_point: ClassVar[str] = "witness"


@pytest.fixture
def witnesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Mapping[str, str]]]:
    """The environment of each rank that has run."""
    (tmp_path / "witness.py").write_text(WITNESS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    for name, value in {**FOREIGN, **NEEDED}.items():
        monkeypatch.setenv(name, value)
    return lambda: [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.json"))]


def test_ranks_are_given_what_they_need_and_nothing_that_steers_them(
    tmp_path: Path, witnesses: Callable[[], list[Mapping[str, str]]], caplog: pytest.LogCaptureFixture
) -> None:
    launch_job(WitnessJob(2), tmp_path / "job.json", env={"EMBED_PIPELINE_OURS": "1", "DAGSTER_PIPES_CONTEXT": "ours"})
    assert len(witnesses()) == 2
    for rank, seen in enumerate(witnesses()):
        assert {name: seen.get(name) for name in NEEDED} == NEEDED
        assert {name for name, value in FOREIGN.items() if seen.get(name) == value} == set()
        assert (seen["RANK"], seen["WORLD_SIZE"], seen["EMBED_PIPELINE_OURS"]) == (str(rank), "2", "1")
        assert seen["DAGSTER_PIPES_CONTEXT"] == "ours"
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for name in ("ACCELERATE_MIXED_PRECISION", "PET_NNODES", "WORLD_SIZE", "ONEDNN_DEFAULT_FPMATH_MODE"):
        assert name in told
    # What steers no library, and what an image of a container says of itself.
    for name in ("COMPANY_SETTING", "CUDNN_VERSION", "PYTHON_VERSION", "NVIDIA_REQUIRE_CUDA"):
        assert name not in told
    assert "bf16" not in caplog.text
    assert "secret" not in caplog.text


def test_variables_that_the_settings_name_are_passed_on(
    tmp_path: Path, witnesses: Callable[[], list[Mapping[str, str]]]
) -> None:
    site = Site(LaunchSettings(environment=("COMPANY_SETTING", "NOT_SET")), tmp_path)
    launch_job(WitnessJob(1), tmp_path / "job.json", site=site)
    [seen] = witnesses()
    assert seen["COMPANY_SETTING"] == FOREIGN["COMPANY_SETTING"]
    assert "NOT_SET" not in seen


def test_what_a_cluster_adds_on_its_own_machines_is_taken_away_there(
    tmp_path: Path, witnesses: Callable[[], list[Mapping[str, str]]]
) -> None:
    """A line of `launch.setup`, or the environment that a Ray node was started in: the launcher never saw it."""
    command = torchrun_command("witness", tmp_path / "job.json", 1)
    added = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"), "EMBED_PIPELINE_JOB_VARIABLES": "COMPANY_SETTING"}
    done = subprocess.run(command, env={**os.environ, **added}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [seen] = witnesses()
    kept = {name for name, value in FOREIGN.items() if seen.get(name) == value}
    assert kept == {"COMPANY_SETTING", "DAGSTER_PIPES_CONTEXT"}  # the latter is the launcher's, where it comes so far
    assert {name: seen.get(name) for name in NEEDED} == NEEDED
    assert "PET_NNODES" in done.stderr


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_MIXED_PRECISION steers the libraries"),
        ("PYTHONSTARTUP", "steers the libraries"),
        ("MLFLOW_RUN_ID", "is set by the pipeline itself"),
        ("A=1", "expected names of variables"),
        ("A,B", "expected names of variables"),
    ],
)
def test_a_name_that_would_change_results_is_refused(name: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=f"launch.environment: .*{problem}"):
        check_site(LaunchSettings(environment=("FINE", name)))
    check_site(LaunchSettings(environment=("FINE", "HF_HOME")))


def test_a_process_that_computes_itself_gives_up_what_changes_its_arithmetic(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setenv("PET_NNODES", "2")
    compute_as_asked()
    assert "ONEDNN_DEFAULT_FPMATH_MODE" not in os.environ
    assert os.environ["PET_NNODES"] == "2"  # torchrun's own, which does not run here
    assert "ONEDNN_DEFAULT_FPMATH_MODE" in caplog.text
    # Gone for the libraries as well, which ask the process and not Python.
    code = "import os; raise SystemExit('ONEDNN_DEFAULT_FPMATH_MODE' in os.environ)"
    subprocess.run([sys.executable, "-c", code], check=True)
