"""A model that gives every text the same answer is told when its training ends, in the log and in its figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from collapsed_models import collapse
from small_problem import Trained

from embed_pipeline.models.collapse import is_collapsed


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_a_collapsed_model_is_told(
    train_here: Callable[..., Trained],
    base_models: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    shutil.copytree(base_models[kind == "reranker"], tmp_path / "base")
    collapse(tmp_path / "base")
    lengths = {"query_max_length": 12, "passage_max_length": 20} if kind == "reranker" else {}
    trained = train_here(
        kind,
        lambda job: job.model_copy(update={"base_model": tmp_path / "base"}),
        **{"max_steps": 1, "evaluations": 1, "learning_rate": 1e-12, "dropout": 0.0, **lengths},
    )
    (warning,) = [told for told in trained.summary["warnings"] if "collapsed" in told]
    assert warning.startswith(f"the {kind} has collapsed: it gives the passages of a question all the same score")
    assert "Lower its learning_rate" in warning
    assert warning in caplog.text
    if kind == "reranker":  # it has no say where the embedder's order is better than chance
        assert json.loads((trained.output / "serving.json").read_text())["embedder_weight"] > 0


def test_a_model_that_learnt_is_not(train_here: Callable[..., Trained]) -> None:
    for kind in ("embedder", "reranker"):
        assert not any("collapsed" in told for told in train_here(kind, max_steps=2).summary["warnings"])


def test_what_counts_as_collapsed() -> None:
    generator = np.random.default_rng(0)
    spread = generator.normal(size=(40, 8)).astype(np.float32)
    assert not is_collapsed(spread)
    assert is_collapsed(np.full((40, 8), -7.3, dtype=np.float32))
    assert is_collapsed(np.full((40, 8), -7.3, dtype=np.float32) + spread * 1e-7)
    assert is_collapsed(np.repeat(spread[:, :1], 8, axis=1))  # it reads the question alone
    spread[:15] = 0.5
    assert not is_collapsed(spread)  # of some questions
    spread[:25] = 0.5
    assert is_collapsed(spread)
    assert not is_collapsed(spread[:, :1])
    assert not is_collapsed(spread[:0])
    assert not is_collapsed(np.float32(0.9) + generator.normal(size=(40, 8)).astype(np.float32) * 1e-3)
