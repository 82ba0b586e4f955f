"""An embedder trained by sentence-transformers' SentenceTransformerTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer import losses
from torch import nn

from embed_pipeline.models.embedder import encoding_of, load_sentence_transformer
from embed_pipeline.settings import EmbedderSettings
from embed_pipeline.training.arguments import check_steps, trainer_arguments
from embed_pipeline.training.engines import Prepared, loss_arguments
from embed_pipeline.training.job import EmbedderJob
from embed_pipeline.training.modules import set_up_for_training
from embed_pipeline.training.process import Rank
from embed_pipeline.training.rows import TrainingQuery, groups


class PlainTrainer(SentenceTransformerTrainer):
    """Without the library's model card, which asks the Hub about the base model; `output` writes ours."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass


def prepare(job: EmbedderJob, rank: Rank, queries: list[TrainingQuery], work: Path) -> Prepared[SentenceTransformer]:
    """Rows are (query, positive, negative_1, ...); the collator truncates and prompts them as encoding does."""
    settings = job.settings
    model = load_sentence_transformer(
        job.base_model, settings.encoding, device=rank.device, trust_remote_code=job.trust_remote_code
    )
    set_up_for_training(model, settings, rank.device)
    rows = list(groups(queries, settings.train_group_size))
    check_steps(job, rank, len(rows), "(query, positive) pairs")
    columns = {"query": [row[0] for row in rows], "positive": [row[1] for row in rows]}
    for i in range(settings.train_group_size - 1):
        columns[f"negative_{i + 1}"] = [row[2][i] for row in rows]
    encoding = encoding_of(model)
    prompts = {name: encoding.query_prompt if name == "query" else encoding.passage_prompt for name in columns}
    arguments = SentenceTransformerTrainingArguments(
        **trainer_arguments(job, rank, work),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        prompts={name: prompt for name, prompt in prompts.items() if prompt},
        # The task of a column decides its maximum length (Transformer.query_length, document_length).
        router_mapping={name: "query" if name == "query" else "document" for name in columns},
    )
    trainer = PlainTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=_loss(model, settings)
    )
    return Prepared(trainer, model, len(rows))


def _loss(model: SentenceTransformer, settings: EmbedderSettings) -> nn.Module:
    """InfoNCE over hard and in-batch negatives (arXiv 1807.03748), with GradCache (arXiv 2101.06983) if asked for."""
    name: str = settings.loss
    if settings.sub_batch_size is not None and not name.startswith("Cached"):
        name = f"Cached{name}"
    loss = getattr(losses, name)
    ours = {"scale": 1.0 / settings.temperature, "gather_across_devices": settings.negatives_cross_device}
    if settings.sub_batch_size is not None:
        ours["mini_batch_size"] = settings.sub_batch_size
    return loss(model, **{**loss_arguments(settings.loss_arguments), **ours})
