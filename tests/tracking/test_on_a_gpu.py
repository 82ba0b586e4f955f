"""A model that a GPU evaluated and promoted is the same on a CPU; `make gpu-check` runs this test."""

from __future__ import annotations

from functools import partial

import pytest

from embed_pipeline.champions import pointer
from embed_pipeline.evaluation.parity import TOLERANCE, read_parity
from embed_pipeline.models.embedder import load_sentence_transformer
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.tracking.promotion import check_loads
from tests.tracking.candidates import Workshop

pytestmark = pytest.mark.gpu


def test_a_promoted_model_is_the_same_on_both(workshop: Workshop) -> None:
    candidate = workshop.candidate(1)
    promoted = workshop.promote(candidate)
    parity = read_parity(candidate.evaluation.path)
    assert check_loads(workshop.store, promoted.champion) < TOLERANCE
    for device in ("cpu", "cuda"):
        parity.check_embedder(load_sentence_transformer(pointer(workshop.store) / "embedder", device=device), device)
        reranker = Reranker(pointer(workshop.store) / "reranker", precision="float32", device=device, batch_size=1)
        parity.check_reranker(partial(reranker.score, progress=False), device)
