"""What `auto` stands for in a training's settings: decided here alone, by model, data and device.

The README's table "Why these defaults" gives the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from embed_pipeline.losses import EMBEDDER_LOSSES, SourceKind
from embed_pipeline.models.shape import ModelShape
from embed_pipeline.settings import EmbedderSettings, RerankerSettings, TrainingSettings

# Parameters of a transformer's layers, without the embeddings of its vocabulary: MiniLM-L6 has 11 million and
# bge-small 21, BERT-base 85, BERT-large 302.
SMALL, BASE = 40e6, 150e6
FEWEST_STEPS = 50  # a training of fewer has hardly warmed up
_OF_ADAPTERS = 10.0

Size = Literal["small", "base", "large"]
_LEARNING_RATES: dict[Size, float] = {"small": 1e-4, "base": 2e-5, "large": 1e-5}
_OF_RERANKERS: dict[Size, float] = {"small": 2e-5, "base": 2e-5, "large": 1e-5}


@dataclass(frozen=True)
class Circumstances:
    """What the settings of a training are fitted to."""

    shape: ModelShape | None  # of the base model; None where its folder does not say
    device: Literal["cpu", "gpu"]
    rows: int  # queries of the own source in train, or pairs
    processes: int


class FittedEmbedderSettings(EmbedderSettings):
    """The embedder's training with a number wherever a YAML may say auto, but for what memory decides."""

    train_group_size: int
    batch_size: int
    learning_rate: float


class FittedRerankerSettings(RerankerSettings):
    """The reranker's training, likewise."""

    random_negatives: int
    batch_size: int
    learning_rate: float


FittedSettings = FittedEmbedderSettings | FittedRerankerSettings


def fit_embedder(
    settings: EmbedderSettings, to: Circumstances, kind: SourceKind, num_negatives: int
) -> FittedEmbedderSettings:
    """Replace every `auto`. `kind`: of the own source; `num_negatives`: mined for each of its queries."""
    return FittedEmbedderSettings.model_validate(
        {
            **settings.model_dump(),
            "learning_rate": _learning_rate(settings, _LEARNING_RATES[size_of(to.shape)]),
            "batch_size": _batch_size(settings, to, most=64),
            "train_group_size": _group_size(settings, to, kind, num_negatives),
        }
    )


def fit_reranker(settings: RerankerSettings, to: Circumstances, *, fresh_head: bool) -> FittedRerankerSettings:
    """Replace every `auto`. `fresh_head`: the base model is no cross-encoder yet."""
    size = size_of(to.shape)
    rate = 3e-4 if fresh_head and size == "small" else _OF_RERANKERS[size]
    random: Any = settings.random_negatives
    if random == "auto":
        random = (settings.train_group_size - 1) // 2 if fresh_head else 0
    return FittedRerankerSettings.model_validate(
        {
            **settings.model_dump(),
            "learning_rate": _learning_rate(settings, rate),
            "batch_size": _batch_size(settings, to, most=16),
            "random_negatives": random,
        }
    )


def size_of(shape: ModelShape | None) -> Size:
    """Which models are trained alike; an unknown one as the most usual size."""
    if shape is None:
        return "base"
    return "small" if shape.layer_parameters < SMALL else "base" if shape.layer_parameters < BASE else "large"


def _learning_rate(settings: TrainingSettings, fitting: float) -> float:
    if settings.learning_rate != "auto":
        return settings.learning_rate
    return fitting * (_OF_ADAPTERS if settings.lora is not None else 1.0)


def _batch_size(settings: TrainingSettings, to: Circumstances, most: int) -> int:
    """`most`, or its half or quarter where the training would have too few steps."""
    if settings.batch_size != "auto":
        return settings.batch_size
    rows = to.rows if settings.train_queries is None else min(to.rows, settings.train_queries)
    seen = rows * settings.epochs / (to.processes * settings.gradient_accumulation_steps)
    return next((size for size in (most, most // 2) if seen / size >= FEWEST_STEPS), most // 4)


def _group_size(settings: EmbedderSettings, to: Circumstances, kind: SourceKind, num_negatives: int) -> int:
    if settings.train_group_size != "auto":
        return settings.train_group_size
    # A teacher's scores of one positive and one negative say little more than which is which.
    loss = EMBEDDER_LOSSES[settings.loss_for(kind)]
    many = to.device == "gpu" or settings.knowledge_distillation or "teacher_scores" in loss.needs
    return min(5 if many else 2, num_negatives + 1)
