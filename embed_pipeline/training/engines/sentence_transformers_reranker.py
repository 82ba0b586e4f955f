"""A reranker trained by sentence-transformers' CrossEncoderTrainer."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from torch import nn

from embed_pipeline.training.cross_encoder import load_cross_encoder
from embed_pipeline.training.data_sets import RowSettings, data_set
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.engines.sentence_transformers_trainer import SeveralSources, prepare_trainer
from embed_pipeline.training.job import RerankerJob
from embed_pipeline.training.losses import reranker_loss
from embed_pipeline.training.process import Rank
from embed_pipeline.training.sources import TrainingSource


class RerankerTrainer(SeveralSources, CrossEncoderTrainer):
    """The library's own, over all sources."""


def prepare(job: RerankerJob, rank: Rank, sources: list[TrainingSource], work: Path) -> Prepared[CrossEncoder]:
    """Rows are what each source's loss takes. A batch of a loss over single pairs holds the pairs of whole groups."""
    settings = job.settings
    model = load_cross_encoder(job, rank.device)
    rows = RowSettings(settings.train_group_size, settings.random_negatives)

    def make(source: TrainingSource) -> tuple[Dataset, nn.Module]:
        return data_set(source, rows), reranker_loss(model, source)

    of_pairs = sources[0].facts.rows[sources[0].kind] in ("judged", "teacher_pair")
    return prepare_trainer(
        RerankerTrainer,
        CrossEncoderTrainingArguments,
        job,
        rank,
        model,
        sources,
        make,
        work,
        rows_each=settings.train_group_size if of_pairs else 1,
        # Every parameter is used, and the search for unused ones breaks on a loss that runs the model itself.
        ddp_find_unused_parameters=False,
    )
