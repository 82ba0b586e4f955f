"""What both trainers of sentence-transformers share: several sources at once, each with the sampler of its loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import (
    BatchSamplers,
    MultiDatasetBatchSamplers,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)
from torch import nn
from torch.utils.data import BatchSampler, ConcatDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embed_pipeline.losses import BatchSampler as OurBatchSampler
from embed_pipeline.settings import RerankerSettings
from embed_pipeline.training.arguments import check_steps, trainer_arguments
from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.engines.grouped_by_length import GroupedByLength, lengths_of
from embed_pipeline.training.hardware import batch_sampler_of
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.modules import learnt_by_losses
from embed_pipeline.training.process import Rank
from embed_pipeline.training.sources import TrainingSource

logger = logging.getLogger(__name__)


class SeveralSources:
    """Mixed into a library's trainer. Its model card asks the Hub about the base model; `publishing` writes ours."""

    args: Any
    samplers: dict[str, OurBatchSampler]  # by source name
    batches_a_step: int  # one for each process

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass

    def get_batch_sampler(self, dataset: Dataset, *given: Any, **named: Any) -> BatchSampler | None:
        if isinstance(self.train_dataset, DatasetDict):  # type: ignore[attr-defined]
            names = [name for name, one in self.train_dataset.items() if one is dataset]  # type: ignore[attr-defined]
        else:
            names = list(self.samplers)
        if self.samplers[names[0]] == "group_by_length":
            return GroupedByLength(lengths_of(dataset), named["batch_size"], self.batches_a_step, named["seed"])
        self.args.batch_sampler = BatchSamplers(self.samplers[names[0]])
        sampler: BatchSampler | None = super().get_batch_sampler(dataset, *given, **named)  # type: ignore[misc]
        return sampler

    def get_multi_dataset_batch_sampler(
        self,
        dataset: ConcatDataset[Any],
        batch_samplers: list[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> BatchSampler:
        in_turn = self.args.multi_dataset_batch_sampler == MultiDatasetBatchSamplers.ROUND_ROBIN
        kind = RoundRobinBatchSampler if in_turn else ProportionalBatchSampler
        whole: list[BatchSampler] = [_WholeSteps(sampler, self.batches_a_step) for sampler in batch_samplers]
        return _BatchesOfSteps(
            kind(dataset, batch_samplers=whole, generator=generator, seed=seed or 0), self.batches_a_step
        )


class _WholeSteps(BatchSampler):
    """The batches of all processes in a step, joined: the processes of a step must learn from the same source.

    Losses that gather the other processes' passages would otherwise wait for a process that is in another loss.
    """

    def __init__(self, sampler: BatchSampler, batches: int) -> None:
        self.inner, self.batches = sampler, batches
        self.batch_size, self.drop_last = sampler.batch_size, sampler.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        waiting: list[list[int]] = []
        for batch in self.inner:
            waiting.append(batch)
            if len(waiting) == self.batches:
                yield [row for one in waiting for row in one]
                waiting = []

    def __len__(self) -> int:
        return len(self.inner) // self.batches

    def set_epoch(self, epoch: int) -> None:
        _set_epoch(self.inner, epoch)


class _BatchesOfSteps(BatchSampler):
    """Steps cut into the batches of the processes again; accelerate deals them out in this order."""

    def __init__(self, sampler: BatchSampler, batches: int) -> None:
        self.inner, self.batches = sampler, batches
        self.batch_size, self.drop_last = sampler.batch_size, sampler.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.inner:
            size = len(step) // self.batches
            for i in range(self.batches):
                yield step[i * size : (i + 1) * size]

    def __len__(self) -> int:
        return len(self.inner) * self.batches

    def set_epoch(self, epoch: int) -> None:
        _set_epoch(self.inner, epoch)


def _set_epoch(sampler: BatchSampler, epoch: int) -> None:
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


class SharedHeads(TrainerCallback):
    """Averages the gradients of what a loss itself learns (a classifier, a projection): DDP knows the model alone."""

    def __init__(self, losses: dict[str, nn.Module], model: nn.Module) -> None:
        self.parameters = [parameter for _, parameter in learnt_by_losses(losses, model)]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:  # another source's step
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def prepare_trainer(
    trainer: Callable[..., Trainer],
    arguments: Callable[..., TrainingArguments],
    job: TrainingJob,
    rank: Rank,
    model: Any,
    sources: list[TrainingSource],
    make: Callable[[TrainingSource], tuple[Dataset, nn.Module]],
    work: Path,
    *,
    rows_each: int = 1,
    **more: Any,
) -> Prepared[Any]:
    """A trainer over all sources. `make` gives a source's rows and its loss.

    A batch has `batch_size` times `rows_each` rows; `more` are further training arguments.
    """
    settings = job.settings
    given = {**trainer_arguments(job, rank, work), **more}
    given["per_device_train_batch_size"] *= rows_each
    # The arguments first: with them a process joins the others, and what follows may wait for them.
    told = arguments(
        **given, multi_dataset_batch_sampler=MultiDatasetBatchSamplers(settings.multi_dataset_batch_sampler)
    )
    made = {source.name: make(source) for source in sources}
    for source in sources:
        what = "(query, positive) pairs" if source.facts.rows[source.kind] in ("group", "pair", "list") else "rows"
        of_source = "" if len(sources) == 1 else f" of {source.name}"
        check_steps(job, rank, len(made[source.name][0]), what + of_source, rows_each)
    single = next(iter(made.values()))
    several = len(made) > 1
    prepared = trainer(
        model=model,
        args=told,
        train_dataset=DatasetDict({name: rows for name, (rows, _) in made.items()}) if several else single[0],
        loss={name: loss for name, (_, loss) in made.items()} if several else single[1],
    )
    kind: Literal["embedder", "reranker"] = "reranker" if isinstance(settings, RerankerSettings) else "embedder"
    prepared.samplers = {  # type: ignore[attr-defined]
        source.name: batch_sampler_of(rank.hardware, settings.batch_sampler, source.facts.sampler, kind)
        for source in sources
    }
    for name, sampler in prepared.samplers.items():  # type: ignore[attr-defined]
        logger.info("batches of %s: %s", name, sampler)
    prepared.batches_a_step = rank.world_size  # type: ignore[attr-defined]
    heads = SharedHeads({name: loss for name, (_, loss) in made.items()}, model)
    if heads.parameters and rank.world_size > 1:
        prepared.add_callback(heads)
    return Prepared(prepared, model, {name: len(rows) for name, (rows, _) in made.items()})
