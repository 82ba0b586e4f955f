"""A training started from a shell, a pod or a cluster that was set up for another program: the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_problem import Trained, launch, read_output

from embed_pipeline.training.job import TrainingJob

# Each alone changed the weights, hung, or failed.
FOREIGN = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "3",
    "WORLD_SIZE": "4",
    "RANK": "2",
    "MASTER_ADDR": "192.0.2.1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "PYTHONOPTIMIZE": "1",
}


def test_a_foreign_environment_changes_nothing(
    train: Callable[..., Trained],
    job_of: Callable[..., TrainingJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = train("embedder", max_steps=4)
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    # It starts in a folder where somebody else put modules that the training has under the same names.
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for module in ("psutil", "torch", "json", "embed_pipeline"):
        (downloads / f"{module}.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    monkeypatch.chdir(downloads)
    job = job_of("embedder", tmp_path / "output", max_steps=4)
    launch(job, tmp_path)
    found = read_output(job)
    assert not (tmp_path / "was run").exists()
    assert found.summary["precision"] == "float32"
    assert (found.model / "model.safetensors").read_bytes() == (expected.model / "model.safetensors").read_bytes()
