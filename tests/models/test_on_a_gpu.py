"""A GPU and a CPU give the same embeddings, scores and search results; `make gpu-check` runs these tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.models.search import search

pytestmark = pytest.mark.gpu

TEXTS = [f"the {word} river runs {'slowly ' * count}to the sea" for count, word in enumerate(("old", "new", "deep"))]


def test_embeddings_are_those_of_a_cpu(minilm_folder: Path) -> None:
    expected = Embedder(minilm_folder, precision="float32", device="cpu").compute(TEXTS, "document")
    found = Embedder(minilm_folder, precision="float32", device="cuda").compute(TEXTS, "document")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    halved = Embedder(minilm_folder, precision="auto", device="cuda")
    assert halved.precision != "float32"
    assert (halved.compute(TEXTS, "document") * expected).sum(axis=1).min() > 0.999


def test_scores_are_those_of_a_cpu(base_models: tuple[Path, Path]) -> None:
    pairs = [(TEXTS[0], text) for text in TEXTS]
    on_cpu, on_gpu = (Reranker(base_models[1], precision="float32", device=device) for device in ("cpu", "cuda"))
    expected, found = (reranker.score(pairs, progress=False) for reranker in (on_cpu, on_gpu))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_search_gives_the_same_beside_a_training_in_tf32() -> None:
    draw = np.random.default_rng(0)
    queries, passages = (draw.normal(size=(rows, 384)).astype(np.float32) for rows in (2_000, 100_000))
    for matrix in (queries, passages):
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    expected = search(queries, passages, 100, device="cpu")
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = search(queries, passages, 100, device="cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
