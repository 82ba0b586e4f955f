"""What a training would fail for after its negatives were mined, and what can be told before: memory above all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embed_pipeline.errors import TrainingError
from embed_pipeline.fitting import FittedSettings
from embed_pipeline.losses import EMBEDDER_LOSSES, SourceKind
from embed_pipeline.models.folder import own_lengths, pair_length
from embed_pipeline.models.lengths import longest_texts
from embed_pipeline.models.precision import ResolvedPrecision
from embed_pipeline.models.shape import shape_of
from embed_pipeline.settings import EmbedderSettings, RerankerSettings
from embed_pipeline.training.forecast import (
    Arithmetic,
    batch_of,
    forecast_memory,
    gigabytes,
    little_room,
    no_room,
    verdict,
)
from embed_pipeline.training.memory import free_memory, memory_limit

logger = logging.getLogger(__name__)

_LENGTH = 512  # of models that say none


@dataclass(frozen=True)
class Planned:
    """A training to come."""

    settings: FittedSettings
    base_model: Path
    precision: ResolvedPrecision
    processes: int  # on this machine, which share its memory on a CPU

    @property
    def asset(self) -> str:
        return "embedder" if isinstance(self.settings, EmbedderSettings) else "reranker"


def check_before_mining(cleaned: Path, kind: SourceKind, trainings: Sequence[Planned], device: str) -> None:
    """Tell what the trainings on the own source (`cleaned`, of retrieval kind `kind`) will need of `device`'s memory.

    Raises TrainingError for what cannot work: a batch that needs 1.3 times the memory that there is, `find_batch_size`
    or float16 on a CPU; ModelError for pairs that are longer than the reranker can take. What needs nearly all the
    memory that is free is told. A model whose sizes or tokenizer cannot be read is left to the preflight.
    """
    for planned in trainings:
        _check_device(planned, device)
        _check_memory(cleaned, kind, planned, device)


def _check_device(planned: Planned, device: str) -> None:
    if device.startswith("cuda"):
        return
    if planned.settings.find_batch_size:
        raise TrainingError(
            f"{planned.asset}.find_batch_size: true tries batches on a CUDA GPU only, and this machine has none; set "
            "find_batch_size: false and choose batch_size"
        )
    if planned.precision == "float16":
        raise TrainingError(
            f"{planned.asset}.precision: float16 trains on a CUDA GPU only, and this machine has none. Use auto, "
            "bfloat16 or float32"
        )


def _check_memory(cleaned: Path, kind: SourceKind, planned: Planned, device: str) -> None:
    settings, on_gpu = planned.settings, device.startswith("cuda")
    query_limit, passage_limit = _limits(planned)
    shape = shape_of(planned.base_model)
    longest = longest_texts(cleaned, planned.base_model, query_limit, passage_limit)
    if shape is None or longest is None:
        return
    passage = longest.passage
    if isinstance(settings, RerankerSettings):  # whose limit is one for both together
        passage = min(passage, passage_limit - longest.query)
    if settings.find_batch_size:  # which finds one that fits, if there is any
        settings = settings.model_copy(update={"batch_size": 1})
    dropout = shape.dropout if settings.dropout is None else settings.dropout > 0
    memory = forecast_memory(
        settings,
        shape,
        batch_of(settings, kind, longest.query, passage),
        Arithmetic(planned.precision != "float32", eager=not on_gpu, dropout=dropout),
        on_gpu=on_gpu,
        parts=_parts(settings, kind),
    )
    sharing = 1 if on_gpu else planned.processes
    limit, free = memory_limit(device) / sharing, free_memory(device) / sharing
    found = verdict(shape, memory, limit, free)
    if found == "impossible":
        raise TrainingError(f"{planned.asset}: {no_room(settings, kind, memory, limit)}")
    logger.info("%s: about %s of %s GB memory", planned.asset, gigabytes(memory), gigabytes(limit))
    if found == "near":
        logger.warning("%s: %s", planned.asset, little_room(settings, kind, memory, free))


def _limits(planned: Planned) -> tuple[int, int]:
    """Tokens of a query and of a passage at most."""
    settings = planned.settings
    if isinstance(settings, EmbedderSettings):
        encoding, (query, passage) = settings.encoding, own_lengths(planned.base_model)
        return encoding.query_max_length or query or _LENGTH, encoding.passage_max_length or passage or _LENGTH
    pair = pair_length(planned.base_model, settings)
    return pair, pair


def _parts(settings: FittedSettings, kind: SourceKind) -> int | None:
    """Texts that are encoded at a time at least; None: a whole batch."""
    if not isinstance(settings, EmbedderSettings) or settings.engine != "sentence-transformers":
        return None
    loss = EMBEDDER_LOSSES[settings.loss_for(kind)]
    if not loss.caches and (loss.cached is None or settings.sub_batch_size is None):
        return None
    return settings.parts or 1
