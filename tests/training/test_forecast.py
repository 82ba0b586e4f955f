"""What a training will need, told from sizes alone, beside what autograd really keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problem import Problem
from transformers import BertConfig, BertModel

from embed_pipeline.errors import ModelError, TrainingError
from embed_pipeline.fitting import FittedEmbedderSettings, FittedRerankerSettings
from embed_pipeline.models.shape import ModelShape, shape_of
from embed_pipeline.training import before_mining
from embed_pipeline.training.before_mining import Planned, check_before_mining
from embed_pipeline.training.forecast import (
    Arithmetic,
    Texts,
    batch_of,
    forecast_memory,
    layer_bytes,
    verdict,
)

SHAPE = ModelShape(layers=2, hidden=192, heads=6, intermediate=768, words=500, positions=512)
BASE = ModelShape(layers=12, hidden=768, heads=12, intermediate=3072, words=30522, positions=512)
EAGER = Arithmetic(half=False, eager=True, dropout=True)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [32, 256])
def test_the_activations_are_those_that_autograd_keeps(half: bool, dropout: float, tokens: int) -> None:
    arithmetic = Arithmetic(half=half, eager=True, dropout=dropout > 0)
    kept = _kept(SHAPE, 4, tokens, half, dropout) / 4 / SHAPE.layers
    assert layer_bytes(SHAPE, tokens, arithmetic) == pytest.approx(kept, rel=0.15)


def _kept(shape: ModelShape, texts: int, tokens: int, half: bool, dropout: float) -> int:
    """Bytes of the tensors that the layers keep for the backward pass, without their weights."""
    config = BertConfig(
        vocab_size=shape.words,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config._attn_implementation = "eager"
    model = BertModel(config).train()
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.dim() > 2 or tensor.shape[0] == texts * tokens:  # else weights, as they are or in half precision
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        hidden = torch.randn(texts, tokens, shape.hidden, requires_grad=True)
        model.encoder(hidden, attention_mask=torch.zeros(texts, 1, 1, tokens))
    return sum(kept.values())


def test_a_shape_is_read_off_the_folder(tiny_bert_folder: Path, tmp_path: Path) -> None:
    shape = shape_of(tiny_bert_folder)
    assert shape is not None
    assert (shape.layers, shape.hidden, shape.heads, shape.intermediate) == (2, 32, 2, 64)
    assert shape.dropout
    assert shape.architecture == "bert"
    (tmp_path / "config.json").write_text(json.dumps({"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}))
    distilled = shape_of(tmp_path)  # DistilBERT's names
    assert distilled is not None
    assert (distilled.layers, distilled.hidden, distilled.intermediate) == (6, 768, 3072)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of nobody"}))
    assert shape_of(tmp_path) is None


def test_the_default_batch_of_a_base_model_needs_more_than_24_gb_unless_it_is_encoded_in_parts() -> None:
    settings = _embedder(Path("x"), batch_size=64, train_group_size=5).settings
    batch = batch_of(settings, "pairs", 32, 256)
    assert batch == [Texts(64, 32), *[Texts(64, 256)] * 5]
    whole = forecast_memory(settings, BASE, batch, EAGER, on_gpu=False)
    in_parts = forecast_memory(settings, BASE, batch, EAGER, on_gpu=False, parts=16)
    assert whole > 24e9
    assert in_parts < 12e9
    assert forecast_memory(settings, BASE, batch, EAGER, on_gpu=False, parts=64) < whole


@pytest.mark.parametrize(
    ("memory", "limit", "free", "expected"),
    [(13.1, 10, 10, "impossible"), (12.9, 10, 10, "near"), (8.9, 10, 10, "fits"), (8.9, 10, 9, "near")],
)
def test_only_what_is_clearly_impossible_is_refused(memory: float, limit: float, free: float, expected: str) -> None:
    assert verdict(BASE, memory, limit, free) == expected
    guessed = dataclasses.replace(BASE, architecture="of nobody")
    assert verdict(guessed, memory, limit, free) == ("fits" if expected == "fits" else "near")


def _embedder(folder: Path, **told: Any) -> Planned:
    given = {"batch_size": 4, "train_group_size": 3, "learning_rate": 1e-3, **told}
    settings = FittedEmbedderSettings.model_validate({"base_model": {"path": str(folder)}, **given})
    return Planned(settings, folder, "float32", 1)


def _reranker(folder: Path, **told: Any) -> Planned:
    given = {"batch_size": 4, "random_negatives": 0, "learning_rate": 1e-3, **told}
    settings = FittedRerankerSettings.model_validate({"base_model": {"path": str(folder)}, **given})
    return Planned(settings, folder, "float32", 1)


def test_what_cannot_fit_is_told_before_mining(
    problem: Problem, tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(planned: Planned) -> None:
        check_before_mining(problem.cleaned_pairs, "pairs", [planned], "cpu")

    check(_embedder(tiny_bert_folder))
    assert not caplog.records
    for name in ("memory_limit", "free_memory"):
        monkeypatch.setattr(before_mining, name, lambda device: 650_000_000)
    large = {"batch_size": 4096, "train_group_size": 8}
    expected = (
        r"^embedder: a process would need [\d.]+ of 0.65 GB memory, at batch_size 4096 x train_group_size 8. Set "
    )
    with pytest.raises(TrainingError, match=expected + r"sub_batch_size: 2048 \(gradient caching"):
        check(_embedder(tiny_bert_folder, sub_batch_size=None, **large))
    check(_embedder(tiny_bert_folder, **large))  # auto: in parts it fits
    assert "embedder: a process will come near its limit" in caplog.text  # torch alone takes most of it
    with pytest.raises(TrainingError, match=expected + r"gradient_checkpointing: true"):
        check(_embedder(tiny_bert_folder, loss="TripletLoss", **large))
    check(_embedder(tiny_bert_folder, loss="CachedMultipleNegativesRankingLoss", sub_batch_size=None, **large))
    with pytest.raises(TrainingError, match=r"^reranker: .*Set gradient_checkpointing: true"):
        check(_reranker(tiny_bert_folder, query_max_length=32, passage_max_length=64, **large))


def test_what_needs_a_gpu_or_a_longer_model_is_told_before_mining(problem: Problem, tiny_bert_folder: Path) -> None:
    def check(planned: Planned) -> None:
        check_before_mining(problem.cleaned_pairs, "pairs", [planned], "cpu")

    with pytest.raises(TrainingError, match=r"embedder\.find_batch_size: true tries batches on a CUDA GPU only"):
        check(_embedder(tiny_bert_folder, find_batch_size=True))
    half = Planned(_embedder(tiny_bert_folder).settings, tiny_bert_folder, "float16", 1)
    with pytest.raises(TrainingError, match=r"embedder\.precision: float16 trains on a CUDA GPU only"):
        check(half)
    with pytest.raises(ModelError, match=r"ask for 600 tokens a pair, but the model in .* can take 128"):
        check(_reranker(tiny_bert_folder, query_max_length=300, passage_max_length=300))
