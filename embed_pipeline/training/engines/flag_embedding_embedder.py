"""An embedder trained by FlagEmbedding's own runner, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from FlagEmbedding.finetune.embedder.encoder_only.base import (
    EncoderOnlyEmbedderDataArguments,
    EncoderOnlyEmbedderModelArguments,
    EncoderOnlyEmbedderRunner,
    EncoderOnlyEmbedderTrainingArguments,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import all_gather_with_grad
from torch import Tensor

from embed_pipeline.fitting import FittedSettings
from embed_pipeline.library_arguments import arguments_for
from embed_pipeline.models.embedder import encoding_of, load_sentence_transformer
from embed_pipeline.models.padding import set_padding
from embed_pipeline.training.arguments import check_steps, trainer_arguments
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.engines.seeded_rows import SeededRows
from embed_pipeline.training.job import EmbedderJob
from embed_pipeline.training.modules import set_up_for_training
from embed_pipeline.training.process import Rank
from embed_pipeline.training.rows import TrainingQuery
from embed_pipeline.training.sources import TrainingSource, with_teacher_scores

POOLING = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}  # ours -> FlagEmbedding's


def prepare(job: EmbedderJob, rank: Rank, sources: list[TrainingSource], work: Path) -> Prepared[SentenceTransformer]:
    """A row is a query with all its positives and negatives, of which the library draws a group each time.

    The runner trains the transformer inside a sentence-transformers model, which saves what FlagEmbedding does not:
    pooling, normalisation, prompts and lengths.
    """
    settings = job.settings
    check_steps(job, rank, sum(source.size for source in sources), "queries")
    if settings.arguments.get("same_dataset_within_batch"):
        for source in sources:  # else the library leaves it out without a word
            check_steps(job, rank, source.size, f"queries of {source.name}")
    model = load_sentence_transformer(
        job.base_model, settings.encoding, device=rank.device, trust_remote_code=job.trust_remote_code
    )
    set_up_for_training(model, settings, rank.device)
    encoding = encoding_of(model)
    assert encoding.pooling is not None
    runner = EncoderOnlyEmbedderRunner(
        model_args=EncoderOnlyEmbedderModelArguments(
            model_name_or_path=str(job.base_model),
            trust_remote_code=job.trust_remote_code,
            **arguments_for(settings, "model"),
        ),
        data_args=EncoderOnlyEmbedderDataArguments(
            train_data=[
                str(write_rows(source, lambda query: query.negatives, settings, work, rank)) for source in sources
            ],
            cache_path=str(work / f"cache-{rank.rank}"),
            train_group_size=settings.train_group_size,
            query_max_len=encoding.query_max_length,
            passage_max_len=encoding.passage_max_length,
            # Never None: with same_dataset_within_batch, "None" would stand before every query.
            query_instruction_for_retrieval=encoding.query_prompt or "",
            passage_instruction_for_retrieval=encoding.passage_prompt or "",
            knowledge_distillation=settings.knowledge_distillation,
            **arguments_for(settings, "data"),
        ),
        training_args=EncoderOnlyEmbedderTrainingArguments(
            **trainer_arguments(job, rank, work),
            remove_unused_columns=False,
            temperature=settings.temperature,
            # With one process there are no others, and the library insists on a process group.
            negatives_cross_device=settings.negatives_cross_device and rank.world_size > 1,
            sentence_pooling_method=POOLING[encoding.pooling],
            normalize_embeddings=True,
            sub_batch_size=settings.parts,
        ),
    )
    runner.model.model = model[0].model  # the same parameters in both, adapters included
    set_padding(runner.tokenizer, runner.model.model, job.base_model)  # it read its own
    runner.model._dist_gather_tensor = _gathered
    rows = {source.name: source.size for source in sources}
    if runner.data_args.same_dataset_within_batch:  # its rows are whole batches that it shuffles itself
        return Prepared(runner.trainer, model, rows, resumable=False)
    runner.trainer.train_dataset = SeededRows(runner.trainer.train_dataset, job.seed)
    return Prepared(runner.trainer, model, rows)


def _gathered(rows: Tensor | None) -> Tensor | None:
    """Every process's rows, joined in the order of their ranks, with their gradients: (n, d) -> (processes * n, d).

    The library gathers without them. Each process then knows what the common loss means for its own rows alone, and DDP
    takes the mean of these parts: 4 processes train on a quarter of the gradient (which max_grad_norm sees), and with
    knowledge_distillation, one of whose losses is not common, on another mixture of the two. With them, several
    processes take the step of one that has all their rows (tests/training/test_gradients.py).
    """
    return None if rows is None else all_gather_with_grad(rows.contiguous())


def write_rows(
    source: TrainingSource,
    negatives: Callable[[TrainingQuery], Sequence[str]],
    settings: FittedSettings,
    work: Path,
    rank: Rank,
) -> Path:
    """FlagEmbedding's training file of one source; `negatives` are those that a query's groups are drawn from.

    Each rank has its own, so that none has to wait for another.
    """
    path = work / f"train-{source.name}-{rank.rank}.jsonl"
    taught = settings.knowledge_distillation
    with path.open("w") as file:
        for row in with_teacher_scores(source) if taught else source.queries:
            fields: dict[str, Sequence[str] | Sequence[float] | str] = {
                "query": row.query,
                "pos": row.positives,
                "neg": negatives(row),
            }
            if taught:
                fields |= {"pos_scores": row.positive_scores, "neg_scores": row.negative_scores}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    return path
