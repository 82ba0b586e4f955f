"""Settings that no figure of a summary shows: what they do to a step, in both engines."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import gradients
from test_sources import source, with_sources
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.bert.modeling_bert import BertIntermediate

from embed_pipeline.training.engines import Prepared, module_of
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob
from embed_pipeline.training.process import start_rank
from embed_pipeline.training.run import work_folder
from embed_pipeline.training.sources import read_embedder_sources, read_reranker_sources

JobOf = Callable[..., TrainingJob]
ENGINES = ["sentence-transformers", "flag-embedding"]


def prepare(job: TrainingJob) -> Prepared[Any]:
    rank = start_rank(job)
    if isinstance(job, EmbedderJob):
        engine = importlib.import_module(module_of(job.settings.engine, "embedder"))
        return engine.prepare(job, rank, read_embedder_sources(job), work_folder(job))  # type: ignore[no-any-return]
    assert isinstance(job, RerankerJob)
    engine = importlib.import_module(module_of(job.settings.engine, "reranker"))
    return engine.prepare(job, rank, read_reranker_sources(job), work_folder(job))  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_is_a_softmax_of_cosines_over_the_temperature(
    job_of: JobOf, tmp_path: Path, engine: str, temperature: float
) -> None:
    job = job_of("embedder", tmp_path, engine=engine, temperature=temperature, dropout=0.0)
    prepared = prepare(job)
    trainer, model = prepared.trainer, prepared.trainer.model
    model.train()  # FlagEmbedding has a loss then only; without dropout nothing else changes
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        found = float(trainer.compute_loss(model, dict(batch)))
        if engine == "sentence-transformers":
            features, _ = trainer.collect_features(dict(batch))  # type: ignore[attr-defined]
            query, *columns = [model(part)["sentence_embedding"] for part in features]  # type: ignore[misc, operator]
            passages, right = torch.cat(columns), torch.arange(len(query))
        else:
            query, passages = model.encode(batch["queries"]), model.encode(batch["passages"])  # type: ignore[union-attr, operator]
            right = torch.arange(len(query)) * (len(passages) // len(query))
    cosines = torch.nn.functional.cosine_similarity(query[:, None], passages[None], dim=-1)
    assert cosines.shape == (4, 12)
    assert found == pytest.approx(float(cross_entropy(cosines / temperature, right)), rel=1e-4)


# --------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_checkpointing_computes_layers_twice_and_gives_the_same_gradients(
    job_of: JobOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, engine: str
) -> None:
    calls: Counter[str] = Counter()
    # A part of a layer: transformers checkpoints a layer only while its own `forward` is in place.
    forward, now = BertIntermediate.forward, ""

    def counted(self: BertIntermediate, *given: Any, **named: Any) -> Any:
        calls[now] += 1
        return forward(self, *given, **named)

    monkeypatch.setattr(BertIntermediate, "forward", counted)
    found: dict[str, dict[str, Tensor]] = {}
    for now in ("plain", "checkpointed"):
        job = job_of(
            kind, tmp_path / now, engine=engine, gradient_checkpointing=now == "checkpointed", max_steps=1,
            dropout=0.0, max_grad_norm=1e9,
        )  # fmt: skip
        found[now] = gradients(job)
    assert calls["plain"] > 0
    assert calls["checkpointed"] == 2 * calls["plain"]
    assert found["plain"].keys() == found["checkpointed"].keys()
    assert len(found["plain"]) > 10
    length = math.sqrt(sum(float(gradient.square().sum()) for gradient in found["plain"].values()))
    apart = sum(float((found["plain"][name] - found["checkpointed"][name]).square().sum()) for name in found["plain"])
    assert length > 0
    assert math.sqrt(apart) < 1e-5 * length


# ------------------------------------------------------------------------------ sources taking their turns


def order_of_sources(job: TrainingJob) -> list[str]:
    return [batch["dataset_name"] for batch in prepare(job).trainer.get_train_dataloader()]


def test_an_embedders_sources_take_turns_or_come_by_their_size(
    job_of: JobOf, tiny_bert_folder: Path, tmp_path: Path
) -> None:
    change = with_sources(source("faq", tiny_bert_folder, train_rows=16))
    orders = {}
    for sampler in ("round_robin", "proportional"):
        job = change(job_of("embedder", tmp_path / sampler, multi_dataset_batch_sampler=sampler))
        orders[sampler] = order_of_sources(job)
    # Both have four batches in turns, until the small source has no more.
    assert orders["round_robin"] == ["shop", "faq"] * 4
    assert Counter(orders["proportional"]) == {"shop": 12, "faq": 4}
    assert orders["proportional"] != sorted(orders["proportional"])  # mixed, not one after the other


def test_a_rerankers_sources_do_as_well(job_of: JobOf, tiny_bert_folder: Path, tmp_path: Path) -> None:
    change = with_sources(source("sts", tiny_bert_folder, reranker_loss="BinaryCrossEntropyLoss", train_rows=24))
    orders = {}
    for sampler in ("round_robin", "proportional"):
        job = change(job_of("reranker", tmp_path / sampler, multi_dataset_batch_sampler=sampler))
        orders[sampler] = Counter(order_of_sources(job))
    assert orders["round_robin"]["shop"] == orders["round_robin"]["sts"]
    assert orders["proportional"]["shop"] > orders["proportional"]["sts"] == orders["round_robin"]["sts"]
