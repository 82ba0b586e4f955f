"""`sub_batch_size: auto`: a batch that does not fit the memory takes the same step in parts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_problem import Trained
from test_one_process import same_weights

from embed_pipeline.model_files import CHECKPOINTS_FOLDER
from embed_pipeline.settings import EmbedderSettings
from embed_pipeline.training import batch_size, preflight, sub_batch
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.process import Rank

EXACT = {"dropout": 0.0, "batch_size": 8, "max_steps": 4, "checkpoint_minutes": 0}


@pytest.fixture
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let a row of three texts need 30 bytes beside the 100 of the process, and the memory have so many."""

    def set_up(there: float) -> None:
        monkeypatch.setattr(sub_batch, "memory_there", lambda rank: there)
        monkeypatch.setattr(sub_batch, "needs_of", needs_of)

    def needs_of(rank: Any, prepared: Any, batches: Any, part: int) -> preflight.Needs:
        preflight.step(prepared, batches, batches.longest(part))  # whose shapes are seen
        return preflight.Needs(fixed=100, row=30.0)

    return set_up


def test_a_batch_that_does_not_fit_is_encoded_in_the_largest_parts_that_do(
    train_here: Callable[..., Trained], with_memory: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    whole = train_here("embedder", **EXACT)
    assert whole.summary["sub_batch_size"] is None
    assert same_weights(whole, train_here("embedder", sub_batch_size=None, **EXACT))  # looking left nothing behind
    with_memory(175.0)  # of which 57 are for activations: 240 are needed by all, about 12 by a text
    with caplog.at_level(logging.INFO):
        in_parts = train_here("embedder", **EXACT)
    assert in_parts.summary["sub_batch_size"] == 4
    assert "sub_batch_size: auto: a batch of 8 x 3 needs about" in caplog.text
    assert "encoded in parts of 4 (gradient caching)" in caplog.text
    assert same_weights(in_parts, train_here("embedder", sub_batch_size=4, **EXACT))
    assert _difference(whole, in_parts) < 1e-5
    with_memory(140.0)
    assert train_here("embedder", **EXACT).summary["sub_batch_size"] == 2


def test_what_was_found_is_kept_when_a_training_goes_on(
    train_here: Callable[..., Trained], with_memory: Callable[[float], None]
) -> None:
    def kept(found: int | None) -> Callable[[TrainingJob], TrainingJob]:
        def before(job: TrainingJob) -> TrainingJob:
            folder = job.output / CHECKPOINTS_FOLDER
            folder.mkdir(parents=True)
            (folder / "sub_batch_size.json").write_text(json.dumps({"bound": 8, "found": found}))
            return job

        return before

    with_memory(1e9)
    assert train_here("embedder", kept(2), **EXACT).summary["sub_batch_size"] == 2
    with_memory(1.0)
    assert train_here("embedder", kept(None), **EXACT).summary["sub_batch_size"] is None


@pytest.mark.parametrize(
    "settings",
    [
        {"sub_batch_size": None},
        {"engine": "flag-embedding"},  # encodes in parts, but keeps all
        {"loss": "TripletLoss"},  # has no form with gradient caching
        {"loss_wrapper": "AdaptiveLayerLoss"},  # cannot be put around one
        {"loss": "GISTEmbedLoss", "guide": {"path": "guide"}},  # learns from other rows with gradient caching
    ],
)
def test_a_loss_that_would_learn_something_else_is_never_cached(
    train_here: Callable[..., Trained],
    with_memory: Callable[[float], None],
    tiny_bert_folder: Path,
    settings: dict[str, Any],
) -> None:
    def guided(job: TrainingJob) -> TrainingJob:
        return job.model_copy(update={"guides": {"shop": tiny_bert_folder}}) if "guide" in settings else job

    with_memory(1.0)
    assert train_here("embedder", guided, **{**EXACT, **settings}).summary["sub_batch_size"] is None


def test_on_a_gpu_parts_are_tried(train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that says it is a GPU: memory runs out with more than three texts at a time."""
    entry = importlib.import_module("embed_pipeline.training.embedder")

    def on_gpu(job: Any, rank: Rank, *given: Any) -> Any:
        return sub_batch.prepare_within_memory(job, dataclasses.replace(rank, device="cuda:0"), *given)

    def step(prepared: Any, batches: Any, inputs: Any) -> None:
        preflight.step(prepared, batches, inputs)
        with preflight.seen_shapes(prepared) as seen, torch.no_grad():
            preflight.loss_of(prepared.trainer, inputs)
        if max(shape[0] for shape in seen) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(entry, "prepare_within_memory", on_gpu)
        patch.setattr(batch_size, "step", step)
        patch.setattr(sub_batch, "memory_there", lambda rank: 10**12)
        for name, found in (("free_memory", 10**12), ("held_memory", 0), ("peak_memory", 0), ("forget_peak", 0)):
            patch.setattr(batch_size, name, lambda device, found=found: found)
        searched = train_here("embedder", **EXACT)
    assert searched.summary["sub_batch_size"] == 2
    assert same_weights(searched, train_here("embedder", sub_batch_size=2, **EXACT))


def test_what_is_not_known_yet_is_no_part_size() -> None:
    told = {"base_model": {"path": "x"}}
    assert EmbedderSettings.model_validate(told).sub_batch_size == "auto"
    assert EmbedderSettings.model_validate(told).parts is None
    assert EmbedderSettings.model_validate({**told, "sub_batch_size": 4}).parts == 4


def _difference(one: Trained, other: Trained) -> float:
    first, second = load_file(one.model / "model.safetensors"), load_file(other.model / "model.safetensors")
    return max(float((first[name] - second[name]).abs().max()) for name in first)
