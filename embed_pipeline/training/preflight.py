"""Before a long training: one real step at the longest batch, the time, memory and disk that it will take.

Afterwards the training is bit by bit what it would have been without: random numbers, gradients, buffers and modes are
put back, and no data loader, sampler or optimizer is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from sentence_transformers import CrossEncoder
from torch import nn

from embed_pipeline.errors import TrainingError
from embed_pipeline.model_files import CHECKPOINTS_FOLDER
from embed_pipeline.training.batches import SourceBatches, batches_of
from embed_pipeline.training.callbacks import arithmetic_of
from embed_pipeline.training.checkpoints import KEPT
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.forecast import NEAR, gigabytes, little_room, no_room
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.memory import forget_peak, free_memory, held_memory, peak_memory
from embed_pipeline.training.modules import learnt_by_losses, losses_of
from embed_pipeline.training.process import Rank, from_all, from_main
from embed_pipeline.training.sources import TrainingSource

logger = logging.getLogger(__name__)

SHARE = 0.02  # of the forecast training, for usual batches; the longest step comes on top
SECONDS = 20.0  # more precise than this it need not be
CLEARLY = 1.2  # a forecast so far above what there is cannot be wrong enough to be right
_SCALE = 1024.0  # of a float16 loss, whose gradients would vanish unscaled


@dataclass(frozen=True)
class Forecast:
    """What a training will take; see `sentence`."""

    steps: int
    step_seconds: float
    batch: tuple[int, int]  # texts x tokens of the longest batch
    memory: int  # bytes at most, of the rank that needs most: weights, gradients, optimizer, activations
    memory_there: int  # bytes that a rank can have
    checkpoints: int  # bytes on disk

    def seconds(self, evaluation: float, evaluations: int) -> float:
        """Of the whole training, of which an evaluation takes so long."""
        return self.steps * self.step_seconds + evaluations * evaluation

    def sentence(self, seconds: float) -> str:
        disk = f"; {gigabytes(self.checkpoints)} GB on disk for checkpoints" if self.checkpoints else ""
        return (
            f"preflight: {self.steps:,} steps, about {told_time(seconds)}; longest batch {self.batch[0]:,} x "
            f"{self.batch[1]:,} tokens; peak memory {gigabytes(self.memory)} of "
            f"{gigabytes(self.memory_there)} GB{disk}"
        )


def told_time(seconds: float) -> str:
    """7 s, 12 min, 3 h 10 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def preflight(
    job: TrainingJob, rank: Rank, prepared: Prepared[Any], sources: Sequence[TrainingSource], *, resumed: bool
) -> Forecast | None:
    """Run it, in every rank at the same time. A resumed training has shown already that it can do its steps: None.

    Raises TrainingError for a job that cannot end well, naming the setting to change.
    """
    check_same_start(job, prepared, sources)
    checkpoints = checkpoint_bytes(job, prepared)
    if rank.is_main:
        check_disk(job, checkpoints, weight_bytes(prepared.model))
    if resumed:
        return None
    with left_as_found(prepared), as_in_training(job, prepared):
        return _try(job, rank, prepared, batches_of(job, prepared, sources), checkpoints)


# ------------------------------------------------------------------------------------------------- the steps


@dataclass
class _Tried:
    """One source: its longest step, and what its steps usually take."""

    batches: SourceBatches
    longest_seconds: float = 0.0
    seconds: float = 0.0
    count: int = 0

    @property
    def usual_seconds(self) -> float:
        return self.seconds / self.count if self.count else self.longest_seconds


def _try(
    job: TrainingJob, rank: Rank, prepared: Prepared[Any], batches: Sequence[SourceBatches], checkpoints: int
) -> Forecast:
    trainer = prepared.trainer
    steps = steps_of(trainer)
    for one in batches:
        _check_reading(prepared, one)
    there = memory_there(rank)
    to_come = optimizer_bytes(prepared, rank)
    norms: dict[str, list[float]] = {}
    peak, shapes, tried = 0, [], []
    for one in batches:
        _check_a_part(job, rank, prepared, one, there)
        forget_peak(rank.device)
        with seen_shapes(prepared) as seen:
            result = step(prepared, one, one.longest())
        shapes += seen
        norms[one.name] = [result.norm]
        peak = max(peak, peak_memory(rank.device))
        tried.append(_Tried(one, result.seconds))
    weights = [one.rows // one.size for one in batches]
    if job.settings.multi_dataset_batch_sampler == "round_robin":
        weights = [1] * len(batches)

    def mean_seconds() -> float:
        of_all = sum(weight * one.usual_seconds for weight, one in zip(weights, tried, strict=True))
        return job.settings.gradient_accumulation_steps * of_all / max(1, sum(weights))

    for number in range(3):
        for timed in tried:
            spent, forecast = sum(other.seconds for other in tried), steps * mean_seconds()
            # In a step of gathered negatives no rank may be missing: rank 0 decides.
            enough = timed.count > 0 and spent > SECONDS
            if not from_main(not enough and spent + timed.usual_seconds < SHARE * forecast):
                continue
            result = step(prepared, timed.batches, timed.batches.usual(number))
            timed.seconds, timed.count = timed.seconds + result.seconds, timed.count + 1
            norms[timed.batches.name].append(result.norm)
    for one in batches:
        # The longest rows alone may be of one kind, from which a loss over differences learns nothing.
        for number in range(3, 6):
            if from_main(not any(norms[one.name])):
                norms[one.name].append(step(prepared, one, one.usual(number)).norm)
    if rank.is_main:
        for one in batches:
            if not any(norms[one.name]):
                _tell_no_gradient(one)
    memory = max(from_all(peak + to_come))
    there_for_all = min(from_all(int(there)))
    _check_memory(job, rank, memory, there_for_all)
    largest = max(shapes, key=math.prod, default=(0, 0))
    return Forecast(steps, max(from_all(mean_seconds())), largest, memory, there_for_all, checkpoints)


@dataclass(frozen=True)
class _Result:
    seconds: float
    norm: float


def step(prepared: Prepared[Any], batches: SourceBatches, inputs: Any) -> _Result:
    """Forward and backward of one batch, without the optimizer. Raises TrainingError for what is no number."""
    trainer: Any = prepared.trainer
    trainer.model.train()
    started = time.monotonic()
    loss = loss_of(trainer, inputs)
    scale = _SCALE if trainer.args.fp16 else 1.0
    (loss * scale).backward()
    value = float(loss.detach())
    gradients = [parameter.grad for parameter in learnt(prepared) if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) / scale if gradients else 0.0
    seconds = time.monotonic() - started
    forget_gradients(prepared)
    for name, found in (("loss", value), ("gradient", norm)):
        # In float16 the training's loss scaler finds a scale at which gradients are finite.
        if not math.isfinite(found) and not (name == "gradient" and trainer.args.fp16):
            raise TrainingError(
                f"the {name} of {batches.name} is {found} before the first step, in {arithmetic_of(trainer.args)}. Set "
                "precision: float32, look at loss_arguments, and check that the base model gives numbers at all"
            )
    return _Result(seconds, norm)


def loss_of(trainer: Any, inputs: Any) -> torch.Tensor:
    """The trainer's own loss of a collated batch, in the trainer's own arithmetic."""
    inputs = trainer._prepare_inputs(inputs)
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss


def _tell_no_gradient(batches: SourceBatches) -> None:
    found = f"{batches.name}: every gradient is zero in several batches, so nothing would be learnt"
    if not batches.has_margin:
        raise TrainingError(
            f"{found}. Look at its rows: are all texts, or all scores and labels, alike? Else take another loss"
        )
    logger.warning("%s: every margin is kept already. Raise loss_arguments.margin, or take another loss", found)


def _check_reading(prepared: Prepared[Any], batches: SourceBatches) -> None:
    """Raises TrainingError unless the training reads a text as it is encoded or scored afterwards.

    A query instruction that only one of the two knows costs a model most of its worth, and no loss tells.
    """
    texts, inputs = batches.shortest()
    with torch.no_grad(), seen_tokens(prepared) as in_training:
        loss_of(prepared.trainer, inputs)
    for told, read in _readings(prepared.model, texts):
        with torch.no_grad(), seen_tokens(prepared) as later:
            read()
        found = later[0]
        if found not in in_training and len(found) < prepared.model.max_seq_length:
            tokenizer = prepared.model.tokenizer
            nearest = min(in_training, key=lambda tokens: len(set(tokens) ^ set(found)))
            raise TrainingError(
                f"{batches.name}: the training reads another text than evaluation and search, which read {told} as "
                f"{tokenizer.decode(found)!r}; the training has {tokenizer.decode(nearest)!r}. State the instruction "
                "under embedder.encoding, and none in the base model's default_prompt_name or under arguments"
            )


def _readings(model: Any, texts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is read, and how it is read outside of training (see models.embedder and models.reranker)."""
    first = texts.get("query", texts.get("sentence1", texts.get("sentence")))
    second = texts.get("positive", texts.get("passage", texts.get("sentence2")))
    if "docs" in texts:
        second = texts["docs"][0]
    if isinstance(model, CrossEncoder):
        yield "a pair", lambda: model.predict([(first, second)], show_progress_bar=False)
        return
    if "query" not in texts:
        yield "a sentence", lambda: model.encode([first], prompt="", show_progress_bar=False)
        return
    yield "a query", lambda: model.encode_query([first], show_progress_bar=False)
    yield "a passage", lambda: model.encode_document([second], show_progress_bar=False)


# -------------------------------------------------------------------------------- memory, disk and steps


def steps_of(trainer: Any) -> int:
    """Optimizer steps of the whole training, by the trainer's own count."""
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def optimizer_bytes(prepared: Prepared[Any], rank: Rank) -> int:
    """What is there from the first optimizer step on, and not before: AdamW's two moments, DDP's gradient buckets."""
    trainer, model = prepared.trainer, prepared.model
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    moments = 2 if name.startswith("adamw_torch") else 0  # others hold less, by how much they do not say
    return trained * (moments + (1 if rank.world_size > 1 else 0))


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def checkpoint_bytes(job: TrainingJob, prepared: Prepared[Any]) -> int:
    """Of all checkpoints that lie on disk at a time: weights, AdamW's two moments, best weights; one being written."""
    if job.settings.checkpoint_minutes is None or not prepared.resumable:
        return 0
    moments = 2 * sum(p.numel() * p.element_size() for p in learnt(prepared))
    return (KEPT + 1) * (2 * weight_bytes(prepared.model) + moments)


def check_disk(job: TrainingJob, checkpoints: int, weights: int) -> None:
    """Raises TrainingError where checkpoints, best weights and the final model do not fit on their disks."""
    output, kept = job.output, job.output / CHECKPOINTS_FOLDER
    folder = _existing(kept)
    lie_there = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()) if kept.is_dir() else 0
    needed = {folder: max(0, checkpoints - lie_there)}
    same = folder.stat().st_dev == _existing(output).stat().st_dev
    needed[folder if same else _existing(output)] = (needed[folder] if same else 0) + 2 * weights
    for where, size in needed.items():
        free = shutil.disk_usage(where).free
        if free < size:
            raise TrainingError(
                f"{where} has {gigabytes(free)} GB free, and the training would need {gigabytes(size)} GB there for "
                f"its model and {KEPT + 1} checkpoints of {gigabytes(checkpoints // (KEPT + 1))} GB. Free some, put "
                "the store on another disk, or set checkpoint_minutes: null"
            )


@dataclass(frozen=True)
class Needs:
    """Memory of a step, in bytes, as a part of its rows showed it."""

    fixed: int  # the process itself, weights, gradients and the optimizer
    row: float  # activations of one row

    def of(self, rows: int) -> int:
        return int(self.fixed + self.row * rows)


def needs_of(rank: Rank, prepared: Prepared[Any], batches: SourceBatches, part: int) -> Needs:
    """What the longest batch of a source needs on a CPU, where asking for all of it would end the process.

    `part`: rows, at least one, with which a step is done.
    """
    forget_peak(rank.device)
    before = peak_memory(rank.device)
    with of_size(prepared, part):
        step(prepared, batches, batches.longest(part))
    gradients = sum(p.numel() * p.element_size() for p in learnt(prepared))
    activations = max(0, peak_memory(rank.device) - before - gradients)
    return Needs(before + gradients + optimizer_bytes(prepared, rank), activations / part)


def memory_there(rank: Rank) -> float:
    """Bytes that this process can have: what it holds, and its share of what is free."""
    return free_memory(rank.device) / _ranks_here(rank) + held_memory(rank.device)


def _check_a_part(job: TrainingJob, rank: Rank, prepared: Prepared[Any], batches: SourceBatches, there: float) -> None:
    """On a CPU a step that takes too much memory ends the process: ask an eighth of its rows first."""
    part = batches.size // 8
    if rank.device != "cpu" or part < 1 or batches.caches or batches.classes is not None:
        return
    worst = max(from_all(needs_of(rank, prepared, batches, part).of(batches.size) / there))
    if worst > CLEARLY:
        raise TrainingError(no_room(job.settings, job.source_kind, int(worst * there), int(there)))


def _check_memory(job: TrainingJob, rank: Rank, memory: int, there: int) -> None:
    if memory > (CLEARLY if rank.device == "cpu" else 1.0) * there:
        raise TrainingError(no_room(job.settings, job.source_kind, memory, there))
    if memory > NEAR * there and rank.is_main:
        logger.warning("%s", little_room(job.settings, job.source_kind, memory, there))


# ------------------------------------------------------------------------------- the same in every rank


def check_same_start(job: TrainingJob, prepared: Prepared[Any], sources: Sequence[TrainingSource]) -> None:
    """Raises TrainingError unless every rank starts from the same settings, rows and weights."""
    paths = {name for name, value in job if isinstance(value, Path)} | {"guides", "teachers"}
    settings = job.model_dump_json(exclude=paths)
    weights = [parameter.detach().double().sum().item() for parameter in learnt(prepared)]
    found = {
        "job files": hashlib.sha256(settings.encode()).hexdigest(),
        "training rows": digest_of(sources),
        "weights": hashlib.sha256(repr(weights).encode()).hexdigest(),
    }
    of_all = from_all(found)
    for what in found:
        different = [rank for rank, theirs in enumerate(of_all) if theirs[what] != of_all[0][what]]
        if different:
            raise TrainingError(
                f"ranks {different} have other {what} than rank 0. All nodes must see the same files: put the store "
                "and the base model on a disk that they share, and use the same versions of everything"
            )


def digest_of(sources: Sequence[TrainingSource]) -> str:
    """SHA-256 of every text, score and label, in order."""
    digest = hashlib.sha256()
    for source in sources:
        for row in (*source.queries, *source.examples):
            digest.update(repr(row).encode())
    return digest.hexdigest()


# --------------------------------------------------------------------------------- nothing left behind


def learnt(prepared: Prepared[Any]) -> list[nn.Parameter]:
    """All that is trained: of the model, and what losses learn themselves."""
    model = prepared.model
    heads = [parameter for _, parameter in learnt_by_losses(losses_of(prepared.trainer), model)]
    return [*(parameter for parameter in model.parameters() if parameter.requires_grad), *heads]


def forget_gradients(prepared: Prepared[Any]) -> None:
    for module in (prepared.model, *losses_of(prepared.trainer).values()):
        module.zero_grad(set_to_none=True)


@contextlib.contextmanager
def left_as_found(prepared: Prepared[Any]) -> Iterator[None]:
    """Put back what steps change: random numbers, gradients, buffers, modes, the figures that the trainer collects."""
    trainer: Any = prepared.trainer
    modules = [trainer.model, *losses_of(trainer).values()]
    training = [(part, part.training) for module in modules for part in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    collected = {name: dict(found) for name, found in getattr(trainer, "accum_loss_components", {}).items()}
    randoms = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        forget_gradients(prepared)
        for part, mode in training:
            part.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for name, found in collected.items():
            trainer.accum_loss_components[name] = found
        random.setstate(randoms[0])
        np.random.set_state(randoms[1])
        torch.set_rng_state(randoms[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
            torch.cuda.empty_cache()


@contextlib.contextmanager
def as_in_training(job: TrainingJob, prepared: Prepared[Any]) -> Iterator[None]:
    """The model's arithmetic, and its gradient checkpointing, as accelerate and the Trainer set them up later."""
    trainer: Any = prepared.trainer
    if job.settings.gradient_checkpointing:
        prepared.model[0].model.activation_checkpointing_enable({"use_reentrant": False})
    model, accelerator = trainer.model, trainer.accelerator
    forward = model.forward

    def in_its_precision(*given: Any, **named: Any) -> Any:
        with accelerator.autocast():
            return forward(*given, **named)

    if accelerator.native_amp:
        model.forward = convert_outputs_to_fp32(in_its_precision)
    try:
        yield
    finally:
        if accelerator.native_amp:
            del model.forward


@contextlib.contextmanager
def of_size(prepared: Prepared[Any], size: int) -> Iterator[None]:
    """For a batch of another size: FlagEmbedding's rerankers count their rows."""
    model: Any = prepared.trainer.model
    rows = getattr(model, "train_batch_size", None)
    if rows is not None:
        model.train_batch_size = size
    try:
        yield
    finally:
        if rows is not None:
            model.train_batch_size = rows


@contextlib.contextmanager
def seen_shapes(prepared: Prepared[Any]) -> Iterator[list[tuple[int, int]]]:
    """(texts, tokens) of every batch that reaches the transformer."""
    seen: list[tuple[int, int]] = []
    with _watched(prepared, lambda tokens: seen.append((tokens.shape[0], tokens.shape[1]))):
        yield seen


@contextlib.contextmanager
def seen_tokens(prepared: Prepared[Any]) -> Iterator[list[list[int]]]:
    """The tokens of every text that reaches the transformer, without padding at their ends."""
    seen: list[list[int]] = []

    # A loss that joins several columns fills them up with zeros, whatever the tokenizer pads with.
    padding = (prepared.model.tokenizer.pad_token_id, 0)

    def note(tokens: torch.Tensor) -> None:
        for row in tokens.tolist():
            shown = [i for i, token in enumerate(row) if token not in padding]
            seen.append(row[shown[0] : shown[-1] + 1] if shown else [])

    with _watched(prepared, note):
        yield seen


@contextlib.contextmanager
def _watched(prepared: Prepared[Any], note: Callable[[torch.Tensor], None]) -> Iterator[None]:
    # The layer that every way into the transformer leads to.
    words = prepared.model[0].model.get_input_embeddings()
    hook = words.register_forward_pre_hook(lambda module, given: note(given[0]))
    try:
        yield
    finally:
        hook.remove()


def _ranks_here(rank: Rank) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if rank.device == "cpu" else 1


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
