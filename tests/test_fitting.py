"""What `auto` stands for, by model, data and device."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from embed_pipeline.fitting import Circumstances, FittedRerankerSettings, fit_embedder, fit_reranker, size_of
from embed_pipeline.models.shape import ModelShape
from embed_pipeline.settings import EmbedderSettings, RerankerSettings

MODEL = {"base_model": {"path": "x"}}
MINILM = ModelShape(layers=6, hidden=384, heads=12, intermediate=1536, words=30522, positions=512)
MULTILINGUAL_E5_SMALL = ModelShape(layers=12, hidden=384, heads=12, intermediate=1536, words=250037, positions=512)
BERT_BASE = ModelShape(layers=12, hidden=768, heads=12, intermediate=3072, words=30522, positions=512)
BERT_LARGE = ModelShape(layers=24, hidden=1024, heads=16, intermediate=4096, words=30522, positions=512)


def circumstances(
    shape: ModelShape | None = MINILM, device: Literal["cpu", "gpu"] = "cpu", rows: int = 5_587, processes: int = 1
) -> Circumstances:
    return Circumstances(shape, device, rows, processes)


def embedder(to: Circumstances, num_negatives: int = 8, **told: Any) -> tuple[float, int, int]:
    fitted = fit_embedder(EmbedderSettings.model_validate({**MODEL, **told}), to, "pairs", num_negatives)
    return fitted.learning_rate, fitted.batch_size, fitted.train_group_size


def reranker(to: Circumstances, fresh_head: bool, **told: Any) -> FittedRerankerSettings:
    return fit_reranker(RerankerSettings.model_validate({**MODEL, **told}), to, fresh_head=fresh_head)


@pytest.mark.parametrize(
    ("shape", "millions", "size", "rate"),
    [
        (MINILM, 22.7, "small", 1e-4),
        (MULTILINGUAL_E5_SMALL, 117.7, "small", 1e-4),  # most of it is vocabulary
        (BERT_BASE, 108.9, "base", 2e-5),
        (BERT_LARGE, 334.1, "large", 1e-5),
        (None, None, "base", 2e-5),
    ],
)
def test_the_learning_rate_falls_with_the_size_of_the_layers(
    shape: ModelShape | None, millions: float | None, size: str, rate: float
) -> None:
    if shape is not None:
        assert shape.parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert size_of(shape) == size
    assert embedder(circumstances(shape))[0] == rate
    assert embedder(circumstances(shape), lora={})[0] == pytest.approx(10 * rate)


def test_the_demo_gets_what_was_measured_to_be_best() -> None:
    assert embedder(circumstances()) == (1e-4, 64, 2)
    fitted = reranker(circumstances(), fresh_head=True, train_queries=3_200)
    assert (fitted.learning_rate, fitted.batch_size, fitted.random_negatives) == (3e-4, 16, 2)


def test_a_group_is_larger_where_passages_cost_little_or_a_teacher_scores_them() -> None:
    assert embedder(circumstances(device="gpu"))[2] == 5
    assert embedder(circumstances(device="gpu"), num_negatives=3)[2] == 4  # as many as there are
    assert embedder(circumstances(), loss="DistillKLDivLoss")[2] == 5
    assert embedder(circumstances(), engine="flag-embedding", knowledge_distillation=True)[2] == 5


@pytest.mark.parametrize(
    ("rows", "processes", "told", "size"),
    [
        (3_200, 1, {}, 64),  # 50 steps
        (3_199, 1, {}, 32),
        (1_599, 1, {}, 16),
        (10, 1, {}, 16),
        (1_600, 1, {"epochs": 2}, 64),
        (3_200, 2, {}, 32),
        (3_200, 1, {"gradient_accumulation_steps": 2}, 32),
        (100_000, 1, {"train_queries": 1_000}, 16),
    ],
)
def test_little_data_is_trained_in_smaller_batches(rows: int, processes: int, told: dict[str, Any], size: int) -> None:
    assert embedder(circumstances(rows=rows, processes=processes), **told)[1] == size


def test_a_trained_head_needs_no_easy_negatives() -> None:
    fitted = reranker(circumstances(), fresh_head=False)
    assert (fitted.learning_rate, fitted.random_negatives) == (2e-5, 0)
    assert reranker(circumstances(BERT_LARGE), fresh_head=True).learning_rate == 1e-5
    assert reranker(circumstances(), fresh_head=True, train_group_size=9).random_negatives == 4


def test_what_is_given_stays() -> None:
    told = {"learning_rate": 3e-6, "batch_size": 7, "train_group_size": 3}
    assert embedder(circumstances(rows=10), num_negatives=8, **told) == (3e-6, 7, 3)
    fitted = reranker(circumstances(), fresh_head=True, learning_rate=1e-6, batch_size=3, random_negatives=1)
    assert (fitted.learning_rate, fitted.batch_size, fitted.random_negatives) == (1e-6, 3, 1)
