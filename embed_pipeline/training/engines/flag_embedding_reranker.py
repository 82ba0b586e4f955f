"""A reranker trained by FlagEmbedding's own runner, in this process."""

from __future__ import annotations

from pathlib import Path

from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerTrainingArguments,
)
from FlagEmbedding.finetune.reranker.encoder_only.base import EncoderOnlyRerankerRunner
from sentence_transformers import CrossEncoder

from embed_pipeline.errors import TrainingError
from embed_pipeline.library_arguments import arguments_for
from embed_pipeline.models.folder import pair_length
from embed_pipeline.models.padding import set_padding
from embed_pipeline.training.arguments import check_steps, trainer_arguments
from embed_pipeline.training.cross_encoder import load_cross_encoder
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.engines.flag_embedding_embedder import write_rows
from embed_pipeline.training.engines.seeded_rows import SeededRows
from embed_pipeline.training.job import RerankerJob
from embed_pipeline.training.process import Rank
from embed_pipeline.training.rows import TrainingQuery, negatives_to_draw_from
from embed_pipeline.training.sources import TrainingSource


def prepare(job: RerankerJob, rank: Rank, sources: list[TrainingSource], work: Path) -> Prepared[CrossEncoder]:
    """A row is a query with all its positives and negatives; the loss is a softmax over a group drawn from it.

    The library draws from mined and random negatives alike, so a group holds `random_negatives` of them on average.
    """
    settings = job.settings
    check_steps(job, rank, sum(source.size for source in sources), "queries")
    model = load_cross_encoder(job, rank.device)
    if getattr(model[0], "transformer_task", None) != "sequence-classification":
        raise TrainingError(
            f"reranker.engine: flag-embedding trains models with a head of one score, but {job.base_model} scores by "
            "the logits of words, as its modules.json says. Set engine: sentence-transformers, or take another base"
        )
    # Its maximum is the sum of the two: cut it to what the model has positions for.
    passage_max_len = pair_length(job.base_model, settings) - settings.query_max_length

    def negatives(query: TrainingQuery) -> list[str]:
        return negatives_to_draw_from(query, settings.train_group_size, settings.random_negatives)

    runner = EncoderOnlyRerankerRunner(
        model_args=AbsRerankerModelArguments(
            model_name_or_path=str(job.base_model),
            trust_remote_code=job.trust_remote_code,
            **arguments_for(settings, "model"),
        ),
        data_args=AbsRerankerDataArguments(
            train_data=[str(write_rows(source, negatives, settings, work, rank)) for source in sources],
            cache_path=str(work / f"cache-{rank.rank}"),
            train_group_size=settings.train_group_size,
            query_max_len=settings.query_max_length,
            passage_max_len=passage_max_len,
            knowledge_distillation=settings.knowledge_distillation,
            **arguments_for(settings, "data"),
        ),
        training_args=AbsRerankerTrainingArguments(**trainer_arguments(job, rank, work), remove_unused_columns=False),
    )
    # The same parameters in both, and the same fresh head as the other engine starts from.
    runner.model.model = model[0].model
    set_padding(runner.tokenizer, runner.model.model, job.base_model)  # it read its own
    runner.trainer.train_dataset = SeededRows(runner.trainer.train_dataset, job.seed)
    return Prepared(runner.trainer, model, {source.name: source.size for source in sources})
