"""How many texts a model is given at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from embed_pipeline.models.blocks import BATCH_SIZE, batch_size_of
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker


@pytest.mark.parametrize(
    ("device", "max_length", "expected"),
    [
        ("cpu", 64, 64),
        ("mps", 64, 64),
        ("cuda", 64, 256),
        ("cuda:1", 512, 256),
        ("cuda", 1_024, 128),
        ("cuda", 8_192, 16),
        ("cuda", 1_048_576, 1),
        ("cuda", None, 64),
    ],
)
def test_a_gpu_is_given_more_unless_texts_are_long(device: str, max_length: int | None, expected: int) -> None:
    assert batch_size_of(device, max_length) == expected


def test_models_take_it_unless_told_otherwise(base_models: tuple[Path, Path]) -> None:
    embedder, reranker = base_models
    assert Embedder(embedder, device="cpu").batch_size == Reranker(reranker, device="cpu").batch_size == BATCH_SIZE
    assert Embedder(embedder, device="cpu", batch_size=3).batch_size == 3
    assert Reranker(reranker, device="cpu", batch_size=3).batch_size == 3
