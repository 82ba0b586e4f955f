"""Before a training: what cannot end well fails, what it will take is told, and nothing of it is left behind."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from small_problem import Problem, Trained
from test_checkpoints import LORA, with_sources
from test_one_process import same_weights

from embed_pipeline import tables
from embed_pipeline.errors import TrainingError
from embed_pipeline.training import batch_size, memory, preflight
from embed_pipeline.training.batch_size import largest_that_fits
from embed_pipeline.training.job import EmbedderJob, TrainingJob
from embed_pipeline.training.process import Rank
from embed_pipeline.training.run import plain_memory_errors

SEVERAL = {"dropout": 0.1, "gradient_accumulation_steps": 2, "sources": True, "max_steps": 8}
CACHED = {"sub_batch_size": 2, "precision": "bfloat16", "gradient_checkpointing": True, "max_steps": 6}
SAME_DATA_SET = {"engine": "flag-embedding", "arguments": {"same_dataset_within_batch": True}, "max_steps": 6}


@pytest.mark.parametrize(
    "settings",
    [
        SEVERAL,
        CACHED,
        SAME_DATA_SET,
        pytest.param({**LORA, "gradient_checkpointing": True, "max_steps": 6}, marks=pytest.mark.slow),
        pytest.param({"batch_sampler": "no_duplicates_hashed", "max_steps": 6}, marks=pytest.mark.slow),
    ],
)
def test_the_weights_are_the_same_without(train_here: Callable[..., Trained], settings: dict[str, Any]) -> None:
    settings = dict(settings)
    change = with_sources if settings.pop("sources", False) else lambda job: job
    flown = train_here("embedder", change, **settings)
    assert "preflight: " in flown.summary["preflight"]
    assert same_weights(flown, train_here("embedder", change, preflight=False, **settings))


def test_the_forecast_is_told(train_here: Callable[..., Trained], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        summary = train_here("embedder", encoding={"query_max_length": 20, "passage_max_length": 6}).summary
    forecast = (
        r"preflight: 24 steps, about \d+ (s|min); longest batch 12 x 6 tokens; "
        r"peak memory [\d.]+ of [\d.]+ GB; 0.0\d+ GB on disk for checkpoints"
    )
    assert re.fullmatch(forecast, summary["preflight"])
    assert summary["preflight"] in caplog.text
    # All of it in all, but for what a shared machine does meanwhile.
    assert 0.01 * summary["train_seconds"] < summary["forecast_seconds"] < 10 * summary["train_seconds"]
    assert 1e8 < summary["forecast_memory"] < 4e9
    assert summary["truncated"] == {"queries": 0.0, "passages": 1.0}
    cut, random = summary["warnings"][1], summary["warnings"][0]
    assert cut.startswith("100 % of the passages are cut to the maximum length")
    assert "encoding.passage_max_length" in cut
    assert random.startswith("shop: 2.08 % of the queries have random passages for negatives")
    assert cut in caplog.text


def test_no_room_on_the_disk(train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda where: SimpleNamespace(free=20_000_000))
    with pytest.raises(
        TrainingError, match=r"(?s)has 0.02 GB free, .* would need 0.0\d+ GB .*checkpoint_minutes: null"
    ):
        train_here("embedder")
    assert train_here("embedder", checkpoint_minutes=None, max_steps=1).summary["steps"] == 1


@pytest.mark.parametrize("part", [True, False])
def test_no_room_in_memory(train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, part: bool) -> None:
    """Told after an eighth of the longest batch, or where that cannot be asked, after all of it."""
    steps = []
    step = preflight.step
    monkeypatch.setattr(preflight, "held_memory", lambda device: 0)
    monkeypatch.setattr(preflight, "free_memory", lambda device: 50_000_000)
    monkeypatch.setattr(preflight, "step", lambda prepared, *given: (steps.append(given), step(prepared, *given))[1])
    expected = (
        r"(?s)would need [\d.]+ of 0.05 GB memory, at batch_size 8 x .*Set sub_batch_size: \d \(.*lower batch_size"
    )
    with pytest.raises(TrainingError, match=expected):
        train_here("embedder", batch_size=8, sub_batch_size=None if part else 4)
    assert len(steps) == 1


def test_near_the_end_of_memory(
    train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda device: 10_000_000)
    assert train_here("embedder", max_steps=1).summary["steps"] == 1
    assert "a process will come near its limit: it needs about" in caplog.text


def test_ranks_that_see_other_rows(train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another_rank(found: Any) -> list[Any]:
        return [found, {**found, "training rows": "0"}]

    monkeypatch.setattr(preflight, "from_all", with_another_rank)
    with pytest.raises(
        TrainingError, match=r"ranks \[1\] have other training rows than rank 0.*a disk that they share"
    ):
        train_here("embedder")


def test_a_base_model_that_gives_no_numbers(
    train_here: Callable[..., Trained], tiny_bert_folder: Path, tmp_path: Path
) -> None:
    model = SentenceTransformer(str(tiny_bert_folder), device="cpu")
    next(model.parameters()).data[:] = float("nan")
    model.save_pretrained(str(tmp_path / "broken"))
    with pytest.raises(TrainingError, match="the loss of shop is nan before the first step, in float32"):
        train_here("embedder", lambda job: job.model_copy(update={"base_model": tmp_path / "broken"}))


def test_scores_that_teach_nothing(train_here: Callable[..., Trained], problem: Problem, tmp_path: Path) -> None:
    shutil.copytree(problem.cleaned_pairs, tmp_path / "tables", symlinks=True)
    examples = tables.extra_folder(tmp_path / "tables", "sts") / tables.EXAMPLES_FILE
    found = pq.read_table(examples)
    found = found.set_column(found.schema.get_field_index("score"), "score", pa.array([0.5] * len(found)))
    tables.write(found, tables.EXAMPLES, examples)

    def change(job: TrainingJob) -> TrainingJob:
        return with_sources(job).model_copy(update={"cleaned_pairs": tmp_path / "tables"})

    with pytest.raises(
        TrainingError, match="sts: every gradient is zero in several batches, so nothing would be learnt"
    ):
        train_here("embedder", change)


def test_an_instruction_that_only_evaluation_knows(
    train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompted = {"encoding": {"query_prompt": "find: "}, "max_steps": 1}
    for engine in ("sentence-transformers", "flag-embedding"):
        assert train_here("embedder", engine=engine, **prompted).summary["steps"] == 1
    module = "embed_pipeline.training.engines.sentence_transformers_embedder._prompts_and_tasks"
    monkeypatch.setattr(module, lambda *given: ({}, {}))
    with pytest.raises(
        TrainingError, match=r"read a query as '\[CLS\] find : where is .*the training has '\[CLS\] where"
    ):
        train_here("embedder", **prompted)


def test_an_instruction_in_a_rerankers_base_model(
    train_here: Callable[..., Trained], base_models: tuple[Path, Path], tmp_path: Path
) -> None:
    model = CrossEncoder(str(base_models[1]), device="cpu", prompts={"ask": "find: "}, default_prompt_name="ask")
    model.save_pretrained(str(tmp_path / "prompted"))
    with pytest.raises(TrainingError, match=r"read a pair as .*find : where.*default_prompt_name"):
        train_here("reranker", lambda job: job.model_copy(update={"base_model": tmp_path / "prompted"}))


def test_a_teachers_embeddings_are_learnt_with_the_instruction(
    train_here: Callable[..., Trained], tiny_bert_folder: Path
) -> None:
    from embed_pipeline.training.data_sets import RowSettings, data_set
    from embed_pipeline.training.sources import read_embedder_sources

    def taught(job: TrainingJob) -> TrainingJob:
        return job.model_copy(update={"teachers": {"shop": tiny_bert_folder}})

    told = {"loss": "MSELoss", "teacher": {"path": str(tiny_bert_folder)}, "encoding": {"query_prompt": "find: "}}
    trained = train_here("embedder", taught, max_steps=1, **told)
    assert isinstance(trained.job, EmbedderJob)
    source = read_embedder_sources(trained.job)[0]
    rows = data_set(source, RowSettings(1), np.zeros((49, 2, 32), dtype=np.float32))
    assert rows.column_names == ["query", "positive", "label"]  # the columns that have prompts


@pytest.mark.parametrize(("bound", "most"), [(64, 64), (64, 63), (64, 8), (48, 7), (64, 1), (1, 1)])
def test_the_largest_batch_is_found(bound: int, most: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    found = largest_that_fits(bound, fits)
    halves = [bound // 2**i for i in range(bound.bit_length())]
    assert found == max(size for size in halves if size <= most)
    assert len(tried) <= 1 + math.ceil(math.log2(len(halves) + 1))


def test_no_batch_fits() -> None:
    assert largest_that_fits(64, lambda size: False) is None


@pytest.mark.parametrize(
    ("kind", "settings"), [("embedder", {}), ("reranker", {"engine": "flag-embedding", "random_negatives": 1})]
)
def test_a_training_with_the_batch_that_was_found(
    train_here: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    """On a CPU that says it is a GPU: memory runs out with more than four queries of three passages."""
    entry = importlib.import_module(f"embed_pipeline.training.{kind}")

    name = "prepare_within_memory" if kind == "embedder" else "prepare_with_batch_size"
    prepare = getattr(entry, name)

    def on_gpu(job: Any, rank: Rank, *given: Any) -> Any:
        return prepare(job, dataclasses.replace(rank, device="cuda:0"), *given)

    def step(prepared: Any, batches: Any, inputs: Any) -> None:
        with preflight.seen_shapes(prepared) as seen, torch.no_grad():
            preflight.loss_of(prepared.trainer, inputs)
        if max(shape[0] for shape in seen) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(entry, name, on_gpu)
        patch.setattr(batch_size, "step", step)
        for name, found in (("free_memory", 10**12), ("held_memory", 0), ("peak_memory", 0), ("forget_peak", 0)):
            patch.setattr(batch_size, name, lambda device, found=found: found)
        searched = train_here(kind, find_batch_size=True, batch_size=16, max_steps=4, **settings)
    assert searched.summary["batch_size"] == 4
    assert same_weights(searched, train_here(kind, batch_size=4, max_steps=4, **settings))


def test_a_cpu_searches_no_batch(train_here: Callable[..., Trained]) -> None:
    with pytest.raises(
        TrainingError, match=r"find_batch_size: true tries batches on a CUDA GPU only.*choose batch_size"
    ):
        train_here("embedder", find_batch_size=True)


def test_out_of_memory_is_told_with_what_helps(job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    job = job_of("embedder", tmp_path, sub_batch_size=8)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[..] can't allocate memory: 9 bytes")):
        with (
            pytest.raises(
                TrainingError,
                match=r"memory at batch_size 4 x .*Set sub_batch_size: 4 \(.*lower batch_size .*passage_max_length$",
            ),
            plain_memory_errors(job),
        ):
            raise error
    with pytest.raises(RuntimeError, match=r"^other$"), plain_memory_errors(job):
        raise RuntimeError("other")


def test_the_limits_of_every_control_group_count(tmp_path: Path) -> None:
    inner = tmp_path / "sys" / "pod" / "container"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (inner.parent, "5000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 1000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("3:cpu:/x\n0::/pod/container\n")
    assert memory._groups(tmp_path / "sys", membership) == [(5000, 2000)]


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (11_400, "3 h 10 min"), (4e6, "1,111 h 7 min")]
)
def test_times_in_words(seconds: float, told: str) -> None:
    assert preflight.told_time(seconds) == told
