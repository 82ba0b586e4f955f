"""The largest parts of a batch that the memory holds, found before the training: `sub_batch_size: auto`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from embed_pipeline.losses import EMBEDDER_LOSSES
from embed_pipeline.models.shape import shape_of
from embed_pipeline.settings import LossSettings
from embed_pipeline.training.batch_size import fits, largest_that_fits, prepare_with_batch_size, record, recorded
from embed_pipeline.training.batches import SourceBatches, batches_of
from embed_pipeline.training.checkpoints import SUB_BATCH_SIZE_FILE
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.forecast import NEAR, Arithmetic, activation_bytes, gigabytes
from embed_pipeline.training.job import EmbedderJob
from embed_pipeline.training.modules import losses_of
from embed_pipeline.training.preflight import (
    Needs,
    as_in_training,
    left_as_found,
    memory_there,
    needs_of,
    seen_shapes,
)
from embed_pipeline.training.process import Rank, from_all
from embed_pipeline.training.sources import TrainingSource

logger = logging.getLogger(__name__)

Prepare = Callable[[EmbedderJob, list[TrainingSource]], Prepared[SentenceTransformer]]
_PART = 8  # rows at most that a CPU is asked before it is known how many it can take


def prepare_within_memory(
    job: EmbedderJob, rank: Rank, sources: list[TrainingSource], prepare: Prepare
) -> tuple[EmbedderJob, list[TrainingSource], Prepared[SentenceTransformer]]:
    """The prepared training, its job with the sub-batch that was found, and its sources with the losses they take.

    A batch that fits is trained as it is. One that does not is encoded in the largest parts that fit, of batch_size
    texts divided by 2, 4, 8, ...; the gradient is the same. `find_batch_size` lowers the batch instead.
    """
    whole = _with_parts(job, None) if job.settings.sub_batch_size == "auto" else job
    in_parts = [_in_cached_form(job, source) for source in sources]
    can_choose = job.settings.sub_batch_size == "auto" and in_parts != sources and not rank.device.startswith("mps")
    if not can_choose or job.settings.find_batch_size:
        found_job, prepared = prepare_with_batch_size(whole, rank, sources, lambda job: prepare(job, sources))
        return found_job, sources, prepared
    known = recorded(job, SUB_BATCH_SIZE_FILE, rank)
    if known is None:
        prepared = prepare(whole, sources)
        needs = _needs_on_cpu(whole, rank, prepared, sources) if rank.device == "cpu" else []
        if all(from_all(_whole_fits(whole, rank, prepared, sources, needs))):
            record(job, SUB_BATCH_SIZE_FILE, rank, None)
            return whole, sources, prepared
        del prepared
        if rank.device == "cpu":
            parts = min(from_all(_parts_on_cpu(job, rank, needs)))
        else:
            torch.cuda.empty_cache()
            parts = _parts_on_gpu(job, rank, in_parts, prepare)
        record(job, SUB_BATCH_SIZE_FILE, rank, parts)
        if rank.is_main:
            logger.info("%s", _told(job, rank, needs, parts))
    elif known.found is None:
        return whole, sources, prepare(whole, sources)
    else:
        parts = known.found
    set_seed(job.seed)  # as if it had been the sub-batch from the beginning
    job = _with_parts(job, parts)
    return job, in_parts, prepare(job, in_parts)


def _with_parts(job: EmbedderJob, parts: int | None) -> EmbedderJob:
    return job.model_copy(update={"settings": job.settings.model_copy(update={"sub_batch_size": parts})})


def _in_cached_form(job: EmbedderJob, source: TrainingSource) -> TrainingSource:
    """The source with the gradient-caching form of its loss, where that learns the same from the same rows."""
    extra = next((one for one in job.extra_sources if one.name == source.name), None)
    learn: LossSettings = job.settings if extra is None else extra
    name = source.facts.cached
    if job.settings.engine != "sentence-transformers" or name is None or learn.problem_with(source.kind, cached=True):
        return source
    facts = EMBEDDER_LOSSES[name]
    return replace(source, loss=name, facts=facts) if facts.rows == source.facts.rows else source


def _told(job: EmbedderJob, rank: Rank, needs: Sequence[_SourceNeeds], parts: int) -> str:
    batch = f"a batch of {job.settings.batch_size} x {job.settings.train_group_size}"
    memory = f" {gigabytes(memory_there(rank))} GB of memory"
    need = f"needs about {gigabytes(max(one.whole for one in needs))} of" if needs else "does not fit"
    return f"sub_batch_size: auto: {batch} {need}{memory}, so it is encoded in parts of {parts} (gradient caching)"


# ------------------------------------------------------------------------------------------------ on a GPU


def _parts_on_gpu(job: EmbedderJob, rank: Rank, sources: list[TrainingSource], prepare: Prepare) -> int:
    bound = max(1, job.settings.batch_size // 2)
    tried = prepare(_with_parts(job, bound), sources)

    def fits_in(parts: int) -> bool:
        for loss in losses_of(tried.trainer).values():
            for module in loss.modules():
                if hasattr(module, "mini_batch_size"):
                    module.mini_batch_size = parts  # type: ignore[assignment]
        return all(from_all(fits(job, rank, tried, sources, job.settings.batch_size)))

    return largest_that_fits(bound, fits_in) or 1  # one that is too large still: the preflight says what helps


# ------------------------------------------------------------------------------------------------ on a CPU


@dataclass(frozen=True)
class _SourceNeeds:
    """Of one source."""

    needs: Needs
    rows: int  # of a batch
    text: float | None  # bytes of activations of its longest text; None where its loss cannot be learnt in parts

    @property
    def whole(self) -> int:
        return self.needs.of(self.rows)

    def in_parts(self, parts: int) -> float:
        return self.whole if self.text is None else self.needs.fixed + self.text * parts


def _whole_fits(
    job: EmbedderJob,
    rank: Rank,
    prepared: Prepared[Any],
    sources: Sequence[TrainingSource],
    needs: Sequence[_SourceNeeds],
) -> bool:
    if rank.device == "cpu":
        return all(one.whole <= NEAR * memory_there(rank) for one in needs)
    return fits(job, rank, prepared, sources, job.settings.batch_size)


def _needs_on_cpu(
    job: EmbedderJob, rank: Rank, prepared: Prepared[Any], sources: Sequence[TrainingSource]
) -> list[_SourceNeeds]:
    """Of every source whose loss is not in its caching form anyway."""
    found = []
    with left_as_found(prepared), as_in_training(job, prepared):
        for source, one in zip(sources, batches_of(job, prepared, sources), strict=True):
            if one.caches or one.classes is not None:
                continue
            needs, text = _need_on_cpu(job, rank, prepared, one)
            can_cache = _in_cached_form(job, source) is not source
            found.append(_SourceNeeds(needs, one.size, text if can_cache else None))
    return found


def _need_on_cpu(job: EmbedderJob, rank: Rank, prepared: Prepared[Any], batches: SourceBatches) -> tuple[Needs, float]:
    part, shape = max(1, min(_PART, batches.size // 8)), shape_of(job.base_model)
    with seen_shapes(prepared) as seen:
        needs = needs_of(rank, prepared, batches, part)
    arithmetic = Arithmetic(half=rank.precision != "float32", eager=True, dropout=True)
    share = {tokens: activation_bytes(shape, tokens, arithmetic) for _, tokens in seen}
    of_row = sum(texts * share[tokens] for texts, tokens in seen) / part
    return needs, needs.row * max(share.values()) / of_row


def _parts_on_cpu(job: EmbedderJob, rank: Rank, needs: Sequence[_SourceNeeds]) -> int:
    there = NEAR * memory_there(rank)
    found = largest_that_fits(
        max(1, job.settings.batch_size // 2), lambda parts: all(one.in_parts(parts) <= there for one in needs)
    )
    return found or 1
