"""A reranker trained by sentence-transformers' CrossEncoderTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses
from torch import nn

from embed_pipeline.settings import RerankerSettings
from embed_pipeline.training.arguments import check_steps, trainer_arguments
from embed_pipeline.training.cross_encoder import load_cross_encoder
from embed_pipeline.training.engines import Prepared, loss_arguments
from embed_pipeline.training.job import RerankerJob
from embed_pipeline.training.process import Rank
from embed_pipeline.training.rows import TrainingQuery, groups


class PlainTrainer(CrossEncoderTrainer):
    """Without the library's model card, which asks the Hub about the base model; `output` writes ours."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass


def prepare(job: RerankerJob, rank: Rank, queries: list[TrainingQuery], work: Path) -> Prepared[CrossEncoder]:
    """Rows are (query, passage, label) for the pointwise loss, else (query, docs, labels)."""
    settings = job.settings
    model = load_cross_encoder(job, rank.device)
    rows = list(groups(queries, settings.train_group_size, settings.random_negatives))
    check_steps(job, rank, len(rows), "(query, positive) pairs")
    arguments = trainer_arguments(job, rank, work)
    # Every parameter is used, and the search for unused ones breaks on a loss that runs the model itself.
    arguments["ddp_find_unused_parameters"] = False
    if settings.loss == "BinaryCrossEntropyLoss":
        arguments["per_device_train_batch_size"] *= settings.train_group_size
        dataset = Dataset.from_dict(
            {
                "query": [query for query, _, negatives in rows for _ in range(1 + len(negatives))],
                "passage": [text for _, positive, negatives in rows for text in (positive, *negatives)],
                "label": [label for _, _, negatives in rows for label in (1.0, *[0.0] * len(negatives))],
            }
        )
    else:
        dataset = Dataset.from_dict(
            {
                "query": [query for query, _, _ in rows],
                "docs": [[positive, *negatives] for _, positive, negatives in rows],
                "labels": [[1.0, *[0.0] * len(negatives)] for _, _, negatives in rows],
            }
        )
    trainer = PlainTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(**arguments),
        train_dataset=dataset,
        loss=_loss(model, settings),
    )
    return Prepared(trainer, model, len(rows))


def _loss(model: CrossEncoder, settings: RerankerSettings) -> nn.Module:
    loss = getattr(losses, settings.loss)
    given = loss_arguments(settings.loss_arguments)
    if "pos_weight" in given:
        given["pos_weight"] = torch.tensor(float(given["pos_weight"]))
    return loss(model, **given)
