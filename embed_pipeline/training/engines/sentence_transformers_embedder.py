"""An embedder trained by sentence-transformers' SentenceTransformerTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import nn

from embed_pipeline.models.embedder import Embedder, encoding_of, load_sentence_transformer
from embed_pipeline.settings import EncodingSettings
from embed_pipeline.training.arguments import check_steps
from embed_pipeline.training.data_sets import PASSAGES, QUERY, RowSettings, data_set, texts_to_embed
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.engines.sentence_transformers_trainer import SeveralSources, prepare_trainer
from embed_pipeline.training.job import EmbedderJob
from embed_pipeline.training.losses import embedder_loss
from embed_pipeline.training.modules import set_up_for_training
from embed_pipeline.training.process import Rank, wait
from embed_pipeline.training.sources import TrainingSource


class EmbedderTrainer(SeveralSources, SentenceTransformerTrainer):
    """The library's own, over all sources."""


def prepare(job: EmbedderJob, rank: Rank, sources: list[TrainingSource], work: Path) -> Prepared[SentenceTransformer]:
    """Rows are what each source's loss takes; the collator truncates and prompts them as encoding does."""
    settings = job.settings
    model = load_sentence_transformer(
        job.base_model, settings.encoding, device=rank.device, trust_remote_code=job.trust_remote_code
    )
    set_up_for_training(model, settings, rank.device)
    rows = RowSettings(settings.train_group_size)
    # The library warns of a process that is to gather and is alone.
    gathers = settings.negatives_cross_device and rank.world_size > 1
    of_losses = settings.model_copy(update={"negatives_cross_device": gathers})

    def make(source: TrainingSource) -> tuple[Dataset, nn.Module]:
        taught = _taught(job, rank, source, rows, work)
        loss = embedder_loss(
            model, source, of_losses, guide=job.guides.get(source.name), trust_remote_code=job.trust_remote_code
        )
        return data_set(source, rows, taught), loss

    prompts, tasks = _prompts_and_tasks(encoding_of(model), sources, settings.train_group_size)
    return prepare_trainer(
        EmbedderTrainer,
        SentenceTransformerTrainingArguments,
        job,
        rank,
        model,
        sources,
        make,
        work,
        prompts=prompts,
        router_mapping=tasks,
    )


def _prompts_and_tasks(
    encoding: EncodingSettings, sources: list[TrainingSource], group_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of queries and passages, by column, and by source where there are several; sentences have neither.

    The task of a column decides its maximum length (Transformer.query_length, document_length).
    """
    passages = [*PASSAGES, *(f"negative_{i + 1}" for i in range(group_size - 1))]
    prompts = {QUERY: encoding.query_prompt, **dict.fromkeys(passages, encoding.passage_prompt)}
    prompts = {column: prompt for column, prompt in prompts.items() if prompt}
    tasks = {QUERY: "query", **dict.fromkeys(passages, "document")}
    retrieval = [source.name for source in sources if source.queries]
    if len(sources) == 1:
        return (prompts, tasks) if retrieval else ({}, {})
    return (dict.fromkeys(retrieval, prompts) if prompts else {}), dict.fromkeys(retrieval, tasks)


def _taught(job: EmbedderJob, rank: Rank, source: TrainingSource, rows: RowSettings, work: Path) -> np.ndarray | None:
    """A teacher's embeddings of the source's texts: each rank computes its share, once, and reads the others'.

    (rows, dimension) of a text for its translation (arXiv 2004.09813), else (rows, 2, dimension) of query and passage.
    """
    if "teacher" not in source.facts.needs:
        return None
    texts = texts_to_embed(source, rows)
    check_steps(job, rank, len(texts), f"rows of {source.name}")  # so every rank has a share
    shares = [work / f"taught-{source.name}-{other}.npy" for other in range(rank.world_size)]
    first, second = zip(*texts[rank.rank :: rank.world_size], strict=True)
    teacher = Embedder(job.teachers[source.name], device=rank.device, trust_remote_code=job.trust_remote_code)
    if source.kind == "parallel":
        share = teacher.encode_sentences(first, progress=rank.is_main)
    else:
        encoded = teacher.encode_queries(first, progress=rank.is_main)
        share = np.stack([encoded, teacher.encode_passages(second, progress=rank.is_main)], axis=1)
    np.save(shares[rank.rank], share)
    wait()
    taught = np.empty((len(texts), *share.shape[1:]), dtype=np.float32)
    for other, path in enumerate(shares):
        taught[other :: rank.world_size] = np.load(path, allow_pickle=False)
    return taught
