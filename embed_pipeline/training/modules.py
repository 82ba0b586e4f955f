"""What is changed inside a model for the time of its training; none of it is saved."""

from __future__ import annotations

from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn

from embed_pipeline.settings import TrainingSettings


def set_up_for_training(model: SentenceTransformer | CrossEncoder, settings: TrainingSettings, device: str) -> None:
    """Float32 weights (a base may come in half precision), the dropout asked for, and attention that is fast here."""
    model.float()
    if settings.dropout is not None:
        _set_dropout(model, settings.dropout)
    if device == "cpu":
        # The fused kernel's backward takes ten times as long on a CPU (torch 2.13, bfloat16, 64 tokens).
        model[0].auto_model.set_attn_implementation("eager")  # type: ignore[union-attr, operator]


def _set_dropout(model: nn.Module, share: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        # Architectures that hand a number to the attention function instead of having a layer for it.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share  # type: ignore[assignment]
