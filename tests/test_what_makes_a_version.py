"""What of the machine and its libraries makes a new version: the arithmetic does, a library only where it is asked."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from embed_pipeline.artifacts import PipelineStore, Produced
from embed_pipeline.command_line import main
from embed_pipeline.libraries import upgrades_since
from embed_pipeline.models import bfloat16
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import (
    Pipeline,
    make_cleaned_pairs,
    make_embedder,
    make_hard_negatives,
    make_raw_pairs,
)
from embed_pipeline.training.job import TrainingJob
from tests.conftest import one_thread
from tests.orchestration.conftest import settings_of, write_pipeline

PipelineOf = Callable[..., Pipeline]


@pytest.fixture
def pipeline_of(tmp_path: Path, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelineOf]:
    """A pipeline over one store, with other settings at its top level; its pairs are cleaned."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.delenv("EMBED_PIPELINE_STORE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_pipeline(tmp_path / "defs", settings_of(tiny_bert_folder))

    def make(**changed: Any) -> Pipeline:
        told: dict[str, Any] = {**settings_of(tiny_bert_folder), "encode_precision": "auto", **changed}
        told["tracking"] = {"system_metrics": False, "log_model": False}
        store = PipelineStore(tmp_path / "store", "small")
        return Pipeline(PipelineSettings.model_validate(told), tmp_path / "defs" / "small", store)

    make_raw_pairs(make())
    make_cleaned_pairs(make())
    with one_thread():
        yield make


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this machine's CPU have instructions for bfloat16, or not."""

    def become(flags: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu sse avx512bw avx512vl avx512dq {flags}\n")

    monkeypatch.setattr(bfloat16, "CPU_INFO", tmp_path / "cpuinfo")
    return become


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    version = importlib.metadata.version
    return lambda: monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9.9" if name == "transformers" else version(name)
    )


def test_arithmetic_that_the_machine_decides_makes_a_version_of_its_own(
    pipeline_of: PipelineOf, cpu: Callable[[str], None]
) -> None:
    cpu("")
    in_float32 = make_hard_negatives(pipeline_of()).artifact
    assert in_float32.manifest.recipe.settings["encode_precision"] == "float32"
    # What `auto` stands for counts, not that it was asked for.
    assert make_hard_negatives(pipeline_of(encode_precision="float32")).reused
    cpu("amx_tile amx_bf16")
    in_bfloat16 = make_hard_negatives(pipeline_of())
    assert not in_bfloat16.reused
    assert in_bfloat16.artifact.version != in_float32.version
    assert make_hard_negatives(pipeline_of(encode_precision="float32")).artifact.version == in_float32.version


def test_every_process_of_a_training_is_told_the_arithmetic(
    pipeline_of: PipelineOf, cpu: Callable[[str], None]
) -> None:
    cpu("amx_tile amx_bf16")
    jobs: list[TrainingJob] = []

    class LaunchedError(Exception):
        pass

    def launch(job: Any, *_: Any) -> None:
        jobs.append(job)
        raise LaunchedError

    pipeline = pipeline_of(embedder={**pipeline_of().settings.embedder.model_dump(), "precision": "auto"})
    make_hard_negatives(pipeline)
    for flags in ("amx_tile amx_bf16", ""):
        cpu(flags)
        with pytest.raises(LaunchedError):
            make_embedder(pipeline, launch)
    assert [job.settings.precision for job in jobs] == ["bfloat16", "float32"]
    # On a cluster whose machines are not known here, each job finds out.
    elsewhere = pipeline_of(
        embedder={**pipeline.settings.embedder.model_dump()}, launch={"kind": "slurm", "sbatch": {"partition": "gpu"}}
    )
    with pytest.raises(LaunchedError):
        make_embedder(elsewhere, launch)
    assert jobs[-1].settings.precision == "auto"


def test_an_upgraded_library_is_told_and_makes_nothing_anew(
    pipeline_of: PipelineOf, upgraded: Callable[[], None]
) -> None:
    mined = make_hard_negatives(pipeline_of())
    made_with = importlib.metadata.version("transformers")
    assert upgrades_since(mined.artifact) is None
    assert "made with the installed torch, transformers" in check()
    upgraded()
    again = make_hard_negatives(pipeline_of())
    assert again.reused
    assert upgrades_since(again.artifact) == f"made with transformers {made_with} (9.9.9 is installed)"
    assert f"made with transformers {made_with} (9.9.9 is installed)" in check()
    # Nothing that a model has a part in.
    assert upgrades_since(pipeline_of().store.current("cleaned_pairs")) is None


def test_an_upgraded_library_makes_a_version_where_it_is_asked(
    pipeline_of: PipelineOf, upgraded: Callable[[], None]
) -> None:
    def mine() -> Produced:
        return make_hard_negatives(pipeline_of(retrain_after_library_upgrade=True))

    before = mine()
    assert mine().reused
    upgraded()
    after = mine()
    assert (after.reused, mine().reused) == (False, True)
    assert after.artifact.version != before.artifact.version
    assert upgrades_since(after.artifact) is None
    assert make_cleaned_pairs(pipeline_of(retrain_after_library_upgrade=True)).reused


def check() -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["check", "small"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output
