"""What a training does because of the hardware that it finds; of GPUs, the arguments that it would be given."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from small_problem import Trained, launch
from test_one_process import same_weights
from test_processes import started_rank_1, wait_for_steps

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.rank import device_of
from embed_pipeline.models.precision import resolve_precision
from embed_pipeline.training.arguments import trainer_arguments
from embed_pipeline.training.engines.grouped_by_length import GroupedByLength, lengths_of
from embed_pipeline.training.hardware import Hardware, arguments_of, batch_sampler_of
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.process import Rank

WITH_PROCESSES = {"arguments": {"dataloader_num_workers": 2}}


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (Hardware("cpu", tf32=False, cores=64), {}),
        (Hardware("mps", tf32=False, cores=8), {}),
        (Hardware("cuda:1", tf32=True, cores=16), {"dataloader_num_workers": 4, "tf32": True}),
        (Hardware("cuda:0", tf32=True, cores=2), {"dataloader_num_workers": 1, "tf32": True}),
        # Before Ampere transformers refuses tf32; with one core a process more would only take turns.
        (Hardware("cuda:0", tf32=False, cores=1), {"dataloader_num_workers": 0}),
    ],
)
def test_a_gpu_is_fed_by_other_processes_and_multiplies_in_tf32(hardware: Hardware, expected: dict[str, Any]) -> None:
    assert arguments_of(hardware) == expected


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "expected"),
    [("cuda:0", True, "bfloat16"), ("cuda:0", False, "float16"), ("mps", False, "float32")],
)
def test_auto_is_half_a_float_on_every_gpu_of_nvidia(
    device: str, has_bfloat16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)
    assert resolve_precision("auto", device) == expected
    assert resolve_precision("float32", device) == "float32"


def test_a_process_without_a_gpu_of_its_own_is_refused() -> None:
    assert [device_of("cuda", rank, 2) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert device_of("cpu", 5, 0) == "cpu"
    with pytest.raises(TrainingError, match=r"process 3 of this machine has no GPU of its own: 2 are visible\. Lower"):
        device_of("cuda", 2, 2)


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_what_a_user_gives_wins(kind: str, job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    given = {"dataloader_num_workers": 7, "tf32": False, "optim": "adamw_torch", "dataloader_pin_memory": False}
    job = job_of(kind, tmp_path, arguments=given)
    rank = Rank(0, 1, "cuda:0", 16, "float16", Hardware("cuda:0", tf32=True, cores=16))
    arguments = trainer_arguments(job, rank, tmp_path)
    assert {name: arguments[name] for name in given} == given
    assert (arguments["fp16"], arguments["bf16"], arguments["use_cpu"]) == (True, False, False)


def test_what_is_in_force_stands_in_the_log_and_the_summary(
    train_here: Callable[..., Trained], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trained = train_here("embedder", max_steps=1, arguments={"optim": "adafactor"})
    assert "training in float32 on cpu, adafactor, attention: eager" in caplog.text
    speedup = trained.summary["bfloat16_speedup"]
    assert f"products here are {speedup:.1f} times as fast in bfloat16 as in float32" in caplog.text
    assert f"computing with {trained.summary['threads']} threads in each of 1 processes of this machine" in caplog.text
    in_force = {"optimizer": "adafactor", "attention": "eager", "tf32": False, "loader_processes": 0}
    assert in_force.items() <= trained.summary.items()


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
@pytest.mark.parametrize("persistent", [False, True])
def test_rows_are_the_same_however_many_processes_load_them(
    train_here: Callable[..., Trained], engine: str, persistent: bool
) -> None:
    # Two epochs: each draws other groups, and processes that live through both have to hear of the second. torch draws
    # a seed whenever it starts them, so what dropout draws is another matter.
    dropout = {"dropout": 0.0} if persistent else {}
    alone = train_here("embedder", engine=engine, **dropout)
    loading = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    loaded = train_here("embedder", engine=engine, arguments=loading, **dropout)
    assert loaded.summary["loader_processes"] == 2
    assert same_weights(alone, loaded)


def test_processes_that_load_rows_end_with_their_rank(job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    job = job_of(
        "embedder", tmp_path / "output", 2, epochs=10_000, early_stopping_patience=100, logging_steps=1,
        **WITH_PROCESSES,
    )  # fmt: skip
    loaders: list[psutil.Process] = []

    def kill_rank_1() -> None:
        wait_for_steps(job)
        rank_1 = started_rank_1()
        while len(loaders) < 2:
            loaders[:] = rank_1.children()
        os.kill(rank_1.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_rank_1)
    killer.start()
    with pytest.raises(TrainingError, match="rank 1 was ended by SIGKILL"):
        launch(job, tmp_path)
    killer.join()
    _, alive = psutil.wait_procs(loaders, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux limits a process to some cores")
def test_a_process_computes_on_the_cores_that_it_may_use(train: Callable[..., Trained]) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert train("embedder", max_steps=1).summary["threads"] == 1
    finally:
        os.sched_setaffinity(0, allowed)


CPU, GPU = Hardware("cpu", tf32=False, cores=2), Hardware("cuda:0", tf32=True, cores=16)


def test_a_reranker_on_a_gpu_groups_rows_by_length_and_in_batch_negatives_never_are() -> None:
    assert batch_sampler_of(GPU, None, "batch_sampler", "reranker") == "group_by_length"
    assert batch_sampler_of(GPU, "batch_sampler", "batch_sampler", "reranker") == "batch_sampler"
    assert batch_sampler_of(CPU, None, "batch_sampler", "reranker") == "batch_sampler"
    assert batch_sampler_of(GPU, None, "batch_sampler", "embedder") == "batch_sampler"
    assert batch_sampler_of(CPU, "group_by_length", "batch_sampler", "embedder") == "group_by_length"
    assert batch_sampler_of(GPU, "group_by_length", "no_duplicates", "embedder") == "no_duplicates"


def test_rows_of_like_length_share_a_batch_and_every_epoch_has_other_batches() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 1_003)
    sampler = GroupedByLength(lengths, batch_size=4, batches_a_step=2, seed=5)
    first = list(sampler)
    assert first == list(sampler)
    assert len(first) == len(sampler) == 250
    rows = [row for batch in first for row in batch]
    assert len(set(rows)) == len(rows) == 1_000
    assert max(lengths[rows]) in lengths[first[0]]  # what does not fit fails at once
    spread = [np.ptp(lengths[first[i] + first[i + 1]]) for i in range(0, 250, 2)]  # of both processes' batches
    assert np.mean(spread) < 15  # of 390
    sampler.set_epoch(1)
    assert sorted(map(sorted, first)) != sorted(map(sorted, sampler))


def test_lengths_are_those_of_what_is_padded() -> None:
    rows = Dataset.from_dict({"query": ["ab", "c"], "docs": [["d", "efg"], ["h"]], "labels": [[1.0, 0.0], [1.0]]})
    assert lengths_of(rows).tolist() == [5, 2]


def test_a_reranker_trains_on_rows_grouped_by_length(train_here: Callable[..., Trained]) -> None:
    grouped = train_here("reranker", batch_sampler="group_by_length")
    drawn = train_here("reranker")
    assert grouped.summary["steps"] == drawn.summary["steps"]
    assert not same_weights(grouped, drawn)
