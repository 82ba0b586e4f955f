"""When a loss says that a training is worth nothing, and when it only looks so."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from small_problem import Trained

from embed_pipeline.errors import TrainingError
from embed_pipeline.losses import EMBEDDER_LOSSES, RERANKER_LOSSES
from embed_pipeline.training.callbacks import FROZEN, MovingLoss, exploded, frozen


def logged(losses: list[float], norm: float = 1.0) -> list[dict[str, float]]:
    return [{"loss": loss, "grad_norm": norm} for loss in losses]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (logged([2.5] * FROZEN), True),  # to the last digit
        (logged([-2.5] * FROZEN), True),
        (logged([2.5 + i for i in range(FROZEN)], norm=0.0), True),  # batches differ, and nothing is learnt from them
        (logged([2.5] * (FROZEN - 1)), False),
        (logged([2.5] * FROZEN)[1:] + logged([2.5000001]), False),
        (logged([0.0] * FROZEN, norm=0.0), False),  # everything is learnt
        (logged([2.5] * (FROZEN - 1)) + logged([0.0]), False),
    ],
)
def test_a_frozen_loss(rows: list[dict[str, float]], expected: bool) -> None:
    assert frozen(rows) is expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0, 1.5, 1.2, 1.1, 1.0, 8, 60, 50, 40, 30, 30], 2.0),
        ([-4.0, -4.1, -4.2, -4.2, -4.3, 50, 60, 70, 80, 90], -4.0),
        ([2.0, 1.5, 1.2, 1.1, 1.0, 60, 50, 1, 40, 30, 30], None),  # it comes down again
        ([0.0] * 5 + [0.05, 0.3, 0.5, 0.9, 0.9, 0.9], None),  # a hinge that had nothing to do at first
        ([1e-4] * 5 + [9.0] * 9, None),  # another source's batches
        ([300.0, 280.0, 310.0, 290.0, 285.0] + [2_000.0] * 5, None),
        ([300.0, 280.0, 310.0, 290.0, 285.0] + [3_200.0] * 5, 310.0),
        ([100.0] * 4, None),
    ],
)
def test_a_loss_that_runs_away(losses: list[float], expected: float | None) -> None:
    assert exploded(losses) == expected


@pytest.mark.parametrize("start", [*np.geomspace(1e-4, 1e3, 8), -5.0])
def test_a_noisy_loss_on_its_way_down_is_no_alarm(start: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        way = start * np.exp(-np.linspace(0, 3, 200)) * generator.lognormal(0.0, 0.7, 200)
        assert all(exploded(way[:i].tolist()) is None for i in range(len(way)))


def test_only_losses_with_a_margin_may_rest() -> None:
    resting = {name for losses in (EMBEDDER_LOSSES, RERANKER_LOSSES) for name in losses if losses[name].has_margin}
    assert resting == {
        "TripletLoss", "ContrastiveLoss", "OnlineContrastiveLoss", "MegaBatchMarginLoss", "BatchAllTripletLoss",
        "BatchHardTripletLoss", "BatchSemiHardTripletLoss",
    }  # fmt: skip


def test_float16_that_overflows_in_every_step() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    watch = MovingLoss(False, scaler.get_scale)
    told: Any = SimpleNamespace(fp16=True, learning_rate=1.0), SimpleNamespace(global_step=20, log_history=[]), None

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            scaler.scale(weight * math.inf).backward()
            scaler.step(optimizer)
            scaler.update()
        watch.on_log(*told, logs={"loss": 1.0})

    steps(16)  # a scale of 65,536 may be too high; this is how a good one is found
    with pytest.raises(TrainingError, match=r"float16 overflows in every step.*by step 20.*precision: bfloat16"):
        steps(1)


@pytest.fixture
def collapsed(tiny_bert_folder: Path, tmp_path: Path) -> Path:
    """A model that gives every text the same embedding."""
    model = SentenceTransformer(str(tiny_bert_folder), device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("output.LayerNorm.weight"):
                parameter.zero_()
            if name.endswith("output.LayerNorm.bias"):
                parameter.fill_(1.0)
    model.save_pretrained(str(tmp_path / "collapsed"))
    return tmp_path / "collapsed"


def test_a_training_that_learns_nothing_ends(train_here: Callable[..., Trained], collapsed: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)has not moved for 20 logged figures: \d.* by step 20.*learning_rate"):
        train_here(
            "embedder",
            lambda job: job.model_copy(update={"base_model": collapsed}),
            learning_rate=1e-30, logging_steps=1, preflight=False, epochs=4,
        )  # fmt: skip


def test_a_training_that_runs_away_ends(train_here: Callable[..., Trained]) -> None:
    with pytest.raises(
        TrainingError, match=r"(?s)the loss has run away: \d.* by step \d+, after \d.* at the start.*Lower"
    ):
        train_here(
            "reranker", loss="MSELoss", learning_rate=30.0, scheduler="constant_with_warmup", warmup_ratio=0.9,
            logging_steps=1, preflight=False, epochs=6,
        )  # fmt: skip
