"""How much memory a training will take, from the sizes of its model and of its batches alone; imports no torch.

The preflight measures a real step, but only when the rows are there. This tells what cannot work before hard negatives
are mined. The constants are those of the activations that autograd keeps of BERT's layers (torch 2.13, transformers
5.23), and `tests/training/test_forecast.py` holds them against a real step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from embed_pipeline.fitting import FittedSettings
from embed_pipeline.losses import EMBEDDER_LOSSES, RERANKER_LOSSES, SourceKind
from embed_pipeline.models.shape import ModelShape
from embed_pipeline.settings import EmbedderSettings, RerankerSettings

NEAR = 0.9  # of the memory: what is told to come near its limit
IMPOSSIBLE = 1.3  # a forecast so far above what there is cannot be wrong enough to be right
# Architectures whose layers are BERT's. Of others a forecast is a guess, which refuses nothing.
_LIKE_BERT = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
_OF_ADAPTERS = 0.5  # of the activations: layers that are not trained themselves need not keep what they read
_PROCESS = 600e6  # bytes of a process that has loaded torch and the libraries, on a CPU


@dataclass(frozen=True)
class Arithmetic:
    """What of a training's arithmetic decides its memory."""

    half: bool  # bfloat16 or float16 beside float32 weights
    eager: bool  # attention that keeps its (tokens x tokens) weights, as on a CPU; else a fused kernel
    dropout: bool


def activation_bytes(shape: ModelShape | None, tokens: int, arithmetic: Arithmetic) -> float:
    """Bytes that the forward pass of one text keeps for its backward pass, a layer's temporary ones included.

    Without a shape it is the number of tokens: good for comparing texts only.
    """
    return float(tokens) if shape is None else (shape.layers + 0.5) * layer_bytes(shape, tokens, arithmetic)


def layer_bytes(shape: ModelShape, tokens: int, arithmetic: Arithmetic) -> float:
    """The same of one layer."""
    of_hidden, of_feed_forward = (6.2, 1.0) if arithmetic.half else (8.4, 2.0)
    of_hidden += (1.2 if arithmetic.half else 2.2) if arithmetic.dropout else 0.0
    a_token = 4 * (of_hidden * shape.hidden + of_feed_forward * shape.intermediate)
    # The softmax stays float32; dropout keeps its mask and its result.
    weights = (6 if arithmetic.half else 4) + ((4 if arithmetic.half else 8) if arithmetic.dropout else 0)
    return tokens * a_token + (shape.heads * tokens**2 * weights if arithmetic.eager else 0)


@dataclass(frozen=True)
class Texts:
    """Some texts of a batch that are encoded together, padded to the same length."""

    count: int
    tokens: int


def batch_of(settings: FittedSettings, kind: SourceKind, query_tokens: int, passage_tokens: int) -> list[Texts]:
    """The batch of a process for the own source of retrieval kind `kind`, whose longest texts have so many tokens.

    A cross-encoder reads a query and a passage as one text.
    """
    rows, group = settings.batch_size, settings.train_group_size
    if isinstance(settings, RerankerSettings):
        grouped = settings.engine == "flag-embedding" or RERANKER_LOSSES[settings.loss].rows[kind] != "pair"
        return [Texts(rows * (group if grouped else 1), query_tokens + passage_tokens)]
    passages = group
    if settings.engine == "sentence-transformers":
        of_rows = {"hardest": min(group, 2), "triplet": 2, "group": group, "teacher_group": group}
        passages = of_rows.get(EMBEDDER_LOSSES[settings.loss_for(kind)].rows[kind], 1)
    return [Texts(rows, query_tokens), *(Texts(rows, passage_tokens) for _ in range(passages))]


def forecast_memory(
    settings: FittedSettings,
    shape: ModelShape,
    batch: Sequence[Texts],
    arithmetic: Arithmetic,
    *,
    on_gpu: bool,
    parts: int | None = None,
) -> int:
    """Bytes that a process will hold at most: weights, gradients, AdamW's moments and the activations of a batch.

    `parts`: texts encoded at a time by gradient caching; None: all of them.
    """
    trains_all = settings.lora is None and not settings.freeze.layers and not settings.freeze.embeddings
    copies = 1 + (3 if trains_all and str(settings.arguments.get("optim", "adamw")).startswith("adamw") else 0)
    weights = 4 * shape.parameters * copies + (2 * shape.layer_parameters if arithmetic.half else 0)

    learning = replace(shape, layers=max(0, shape.layers - settings.freeze.layers))  # others keep nothing

    def of_text(tokens: int) -> float:
        if settings.gradient_checkpointing:  # the input of every layer, and one layer that is computed again
            return learning.layers * 4 * tokens * shape.hidden + layer_bytes(shape, tokens, arithmetic)
        return activation_bytes(learning, tokens, arithmetic) * (1.0 if settings.lora is None else _OF_ADAPTERS)

    if parts is None:
        activations = sum(texts.count * of_text(texts.tokens) for texts in batch)
    else:
        activations = max(min(parts, texts.count) * of_text(texts.tokens) for texts in batch)
    return int((0 if on_gpu else _PROCESS) + weights + activations)


# ---------------------------------------------------------------------------------------------- in words


def no_room(settings: FittedSettings, kind: SourceKind, memory: float, there: float) -> str:
    """The sentences for a training that would need `memory` bytes where `there` are."""
    return (
        f"a process would need {gigabytes(memory)} of {gigabytes(there)} GB memory, at batch_size "
        f"{settings.batch_size} x train_group_size {settings.train_group_size}. {less_memory(settings, kind)}"
    )


def little_room(settings: FittedSettings, kind: SourceKind, memory: float, there: float) -> str:
    """The same for a training that needs nearly all of them."""
    near = "will come near its limit: it needs about"
    return no_room(settings, kind, memory, there).replace("would need", near)


def less_memory(settings: FittedSettings, kind: SourceKind) -> str:
    """Advice on what takes less memory, what costs least first, as sentences. `kind`: of the pipeline's own source."""
    lengths = "encoding.passage_max_length" if isinstance(settings, EmbedderSettings) else "passage_max_length"
    fewer = f"lower batch_size (gradient_accumulation_steps makes up for it), train_group_size or {lengths}"
    if isinstance(settings, EmbedderSettings) and settings.engine == "sentence-transformers":
        loss = EMBEDDER_LOSSES[settings.loss_for(kind)]
        part = (settings.parts or settings.batch_size) // 2
        # The batch stays as it is, and so do its negatives. `auto` would have chosen what fits.
        if (loss.caches or loss.cached) and part and settings.sub_batch_size != "auto":
            return f"Set sub_batch_size: {part} (gradient caching: the same step in parts), or {fewer}"
    if not settings.gradient_checkpointing:
        return f"Set gradient_checkpointing: true, or {fewer}"
    return fewer[0].upper() + fewer[1:]


def gigabytes(size: float) -> str:
    value = size / 1e9
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


Verdict = Literal["fits", "near", "impossible"]


def verdict(shape: ModelShape, memory: float, limit: float, free: float) -> Verdict:
    """`limit`: bytes that there are in all; `free`: those that nobody holds now. Others may give theirs back."""
    if memory > IMPOSSIBLE * limit and shape.architecture in _LIKE_BERT:
        return "impossible"
    return "near" if memory > NEAR * free else "fits"
