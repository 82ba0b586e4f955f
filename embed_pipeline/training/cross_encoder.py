"""A cross-encoder as it is trained and saved: one raw logit a pair, of a stated maximum length."""

from __future__ import annotations

import torch
from sentence_transformers import CrossEncoder

from embed_pipeline.training.job import RerankerJob
from embed_pipeline.training.modules import set_up_for_training


def load_cross_encoder(job: RerankerJob, device: str) -> CrossEncoder:
    """The job's base model, ready to train; an encoder without a head gets a fresh one, from the job's seed.

    The saved model gives logits, not probabilities: what FlagReranker gives, and what listwise losses train.
    """
    torch.manual_seed(job.seed)
    model = CrossEncoder(
        str(job.base_model),
        num_labels=1,
        device=device,
        activation_fn=torch.nn.Identity(),
        trust_remote_code=job.trust_remote_code,
        local_files_only=True,
    )
    set_up_for_training(model, job.settings, device)
    model.max_seq_length = pair_length(job, model)
    return model


def pair_length(job: RerankerJob, model: CrossEncoder) -> int:
    """Tokens of query, passage and special tokens together, as far as the model has positions for them."""
    wanted = job.settings.query_max_length + job.settings.passage_max_length
    limit = getattr(model.config, "max_position_embeddings", None)
    return min(wanted, limit) if limit else wanted
