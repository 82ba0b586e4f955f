"""A cross-encoder as it is trained and saved: one raw logit a pair, of a stated maximum length."""

from __future__ import annotations

import logging

import torch
from sentence_transformers import CrossEncoder

from embed_pipeline.models.folder import has_trained_head, pair_length
from embed_pipeline.models.reranker import load_cross_encoder_folder
from embed_pipeline.training.job import RerankerJob
from embed_pipeline.training.modules import set_up_for_training

logger = logging.getLogger(__name__)


def load_cross_encoder(job: RerankerJob, device: str) -> CrossEncoder:
    """The job's base model, ready to train; an encoder without a head gets a fresh one, from the job's seed.

    The saved model gives logits, not probabilities: what FlagReranker gives, and what listwise losses train.
    """
    if not has_trained_head(job.base_model) and not job.settings.random_negatives:
        logger.warning(
            "%s has no trained head and every negative is a hard one: a fresh head learns little from them. Consider "
            "reranker.random_negatives: %d",
            job.base_model,
            max(1, (job.settings.train_group_size - 1) // 2),
        )
    max_length = pair_length(job.base_model, job.settings)
    torch.manual_seed(job.seed)
    model = load_cross_encoder_folder(job.base_model, device=device, trust_remote_code=job.trust_remote_code)
    model.activation_fn = torch.nn.Identity()
    set_up_for_training(model, job.settings, device)
    model.max_seq_length = max_length
    return model
