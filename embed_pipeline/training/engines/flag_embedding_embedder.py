"""An embedder trained by FlagEmbedding's own runner, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from FlagEmbedding.finetune.embedder.encoder_only.base import (
    EncoderOnlyEmbedderDataArguments,
    EncoderOnlyEmbedderModelArguments,
    EncoderOnlyEmbedderRunner,
    EncoderOnlyEmbedderTrainingArguments,
)
from sentence_transformers import SentenceTransformer

from embed_pipeline.models.embedder import encoding_of, load_sentence_transformer
from embed_pipeline.training.arguments import check_steps, trainer_arguments
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.job import EmbedderJob
from embed_pipeline.training.modules import set_up_for_training
from embed_pipeline.training.process import Rank
from embed_pipeline.training.rows import TrainingQuery

POOLING = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}  # ours -> FlagEmbedding's


def prepare(job: EmbedderJob, rank: Rank, queries: list[TrainingQuery], work: Path) -> Prepared[SentenceTransformer]:
    """A row is a query with all its positives and negatives, of which the library draws a group each time.

    The runner trains the transformer inside a sentence-transformers model, which saves what FlagEmbedding does not:
    pooling, normalisation, prompts and lengths.
    """
    settings = job.settings
    check_steps(job, rank, len(queries), "queries")
    model = load_sentence_transformer(
        job.base_model, settings.encoding, device=rank.device, trust_remote_code=job.trust_remote_code
    )
    set_up_for_training(model, settings, rank.device)
    encoding = encoding_of(model)
    assert encoding.pooling is not None
    runner = EncoderOnlyEmbedderRunner(
        model_args=EncoderOnlyEmbedderModelArguments(
            model_name_or_path=str(job.base_model), trust_remote_code=job.trust_remote_code
        ),
        data_args=EncoderOnlyEmbedderDataArguments(
            train_data=[str(write_rows(((row, row.negatives) for row in queries), work, rank))],
            cache_path=str(work / f"cache-{rank.rank}"),
            train_group_size=settings.train_group_size,
            query_max_len=encoding.query_max_length,
            passage_max_len=encoding.passage_max_length,
            query_instruction_for_retrieval=encoding.query_prompt or None,
            passage_instruction_for_retrieval=encoding.passage_prompt or None,
        ),
        training_args=EncoderOnlyEmbedderTrainingArguments(
            **trainer_arguments(job, rank, work),
            remove_unused_columns=False,
            temperature=settings.temperature,
            # With one process there are no others, and the library insists on a process group.
            negatives_cross_device=settings.negatives_cross_device and rank.world_size > 1,
            sentence_pooling_method=POOLING[encoding.pooling],
            normalize_embeddings=True,
            sub_batch_size=settings.sub_batch_size,
        ),
    )
    runner.model.model = model[0].model  # the same parameters in both
    return Prepared(runner.trainer, model, len(queries))


def write_rows(rows: Iterable[tuple[TrainingQuery, Sequence[str]]], work: Path, rank: Rank) -> Path:
    """FlagEmbedding's training file, from queries and the negatives that each group's are drawn from.

    Each rank has its own, so that none has to wait for another.
    """
    path = work / f"train-{rank.rank}.jsonl"
    with path.open("w") as file:
        for row, negatives in rows:
            fields = {"query": row.query, "pos": row.positives, "neg": negatives}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    return path
