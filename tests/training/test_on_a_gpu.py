"""What only a GPU can show of a training; `make gpu-check` runs these tests."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from small_problem import Problem, Trained, write_problem
from transformers.utils.import_utils import enable_tf32

from embed_pipeline import tables
from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.torchrun import torchrun_command
from embed_pipeline.training.job import TrainingJob

pytestmark = pytest.mark.gpu

MEMORY = 768 * 2**20  # bytes: a batch of 48 of `wide_job`'s needs about two gigabytes, one of 12 about half of one
BATCH = 48


@pytest.fixture(autouse=True)
def arithmetic_as_found() -> Iterator[None]:
    """transformers sets TF32 for the whole process, once."""
    before = torch.backends.fp32_precision
    enable_tf32.cache_clear()
    yield
    torch.backends.fp32_precision = before
    free_the_gpu()


def free_the_gpu() -> None:
    """A training that failed is held by its traceback, in a cycle."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process may have MEMORY of the GPU, whatever that has."""
    free_the_gpu()
    torch.cuda.set_per_process_memory_fraction(MEMORY / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def wide(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainingJob], TrainingJob]:
    """Changes a job to one of passages of 256 tokens, and of a model of 11 million parameters."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("wide")
    (folder / "problem").mkdir()
    problem: Problem = write_problem(folder / "problem")
    passages = pq.read_table(problem.cleaned_pairs / tables.PASSAGES_FILE)
    texts = pa.array([f"{text} " * 50 for text in passages["text"].to_pylist()])
    passages = passages.set_column(passages.column_names.index("text"), "text", texts)
    tables.write(passages, tables.PASSAGES, problem.cleaned_pairs / tables.PASSAGES_FILE)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    BertModel(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    modules = [Transformer(str(folder / "plain"), max_seq_length=256), Pooling(256, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"), create_model_card=False)
    return lambda job: job.model_copy(
        update={
            "cleaned_pairs": problem.cleaned_pairs,
            "hard_negatives": problem.hard_negatives,
            "base_model": folder / "model",
        }
    )


def weights(trained: Trained) -> np.ndarray:
    found = load_file(trained.model / "model.safetensors")
    return np.concatenate([found[name].reshape(-1).astype(np.float64) for name in sorted(found)])


def losses(trained: Trained) -> list[float]:
    return [row["loss"] for row in trained.log if "loss" in row]


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_every_arithmetic_learns_the_same(train_here: Callable[..., Trained], kind: str, engine: str) -> None:
    """float16 loses small gradients unless its losses are scaled."""
    settings: dict[str, Any] = {"engine": engine, "dropout": 0.0, "max_steps": 12, "logging_steps": 1}
    expected = train_here(kind, precision="float32", arguments={"tf32": False}, **settings)
    assert expected.summary["device"] == "cuda"
    for precision in ("float16", "bfloat16"):
        trained = train_here(kind, precision=precision, **settings)
        assert trained.summary["precision"] == precision
        # Adam's first steps turn the smallest difference of a gradient near zero into a whole step.
        assert np.corrcoef(weights(trained), weights(expected))[0, 1] > 0.99
        # The first steps in float16 may only look for the scale.
        if precision == "bfloat16":
            np.testing.assert_allclose(losses(trained), losses(expected), rtol=0.05, atol=0.02)


def test_what_a_gpu_is_given(train_here: Callable[..., Trained]) -> None:
    summary = train_here("embedder", precision="auto", max_steps=2).summary
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert summary["precision"] == ("bfloat16" if has_bfloat16 else "float16")
    assert (summary["optimizer"], summary["attention"]) == ("adamw_torch_fused", "sdpa")
    assert summary["pinned_memory"]
    assert summary["loader_processes"] >= 1 or summary["threads"] == 1


def test_products_that_stay_float32_run_in_tf32(train_here: Callable[..., Trained]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU with TF32: Ampere or newer")
    assert train_here("embedder", precision="float32", max_steps=2).summary["tf32"]
    draw = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    product = (draw.cuda() @ draw.cuda()).cpu()
    error = (product.double() - draw.double() @ draw.double()).abs().max()
    assert 1e-4 < error < 1.0, "torch multiplied in whole float32 after a training that said TF32"


def test_memory_that_is_not_there_is_told_with_what_to_change(
    train_here: Callable[..., Trained], wide: Callable[[TrainingJob], TrainingJob], little_memory: None
) -> None:
    expected = (
        rf"(?s)memory.*at batch_size {BATCH} x train_group_size 3.*Set sub_batch_size: {BATCH // 2} .*lower batch_size"
    )
    for preflight in (True, False):
        with pytest.raises(TrainingError, match=expected):
            train_here(
                "embedder", wide, batch_size=BATCH, sub_batch_size=None, preflight=preflight, precision="float32"
            )
        free_the_gpu()


def test_the_largest_batch_that_fits_is_found(
    train_here: Callable[..., Trained], wide: Callable[[TrainingJob], TrainingJob], little_memory: None
) -> None:
    summary = train_here(
        "embedder", wide, batch_size=BATCH, sub_batch_size=None, find_batch_size=True, precision="float32", epochs=1
    ).summary
    assert summary["batch_size"] in (24, 12, 6, 3)
    assert summary["steps"] == 48 // summary["batch_size"]


def test_gradient_caching_takes_the_same_steps_in_little_memory(
    train_here: Callable[..., Trained], wide: Callable[[TrainingJob], TrainingJob]
) -> None:
    settings: dict[str, Any] = {
        **{"batch_size": BATCH, "precision": "float32", "dropout": 0.0, "epochs": 4, "logging_steps": 1},
        "arguments": {"tf32": False},
    }
    whole = train_here("embedder", wide, sub_batch_size=None, **settings)
    free_the_gpu()
    cached = train_here("embedder", wide, sub_batch_size=2, **settings)
    assert cached.summary["forecast_memory"] < 0.5 * whole.summary["forecast_memory"]
    np.testing.assert_allclose(losses(cached), losses(whole), rtol=0.01)


def test_a_cancelled_training_leaves_the_gpus_memory(
    job_of: Callable[..., TrainingJob], wide: Callable[[TrainingJob], TrainingJob], tmp_path: Path
) -> None:
    job = wide(job_of("embedder", tmp_path / "output", epochs=10_000, early_stopping_patience=100, logging_steps=1))
    job_file = job.write(tmp_path / "job.json")
    free_the_gpu()
    before, _ = torch.cuda.mem_get_info()
    during: list[int] = []

    def cancel() -> None:
        log = job.output / "training_log.jsonl"
        if log.is_file() and '"loss"' in log.read_text():
            during.append(torch.cuda.mem_get_info()[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_local(
            torchrun_command(job.entry_point, job_file, 1), env={}, error_file=tmp_path / "error.json", on_poll=cancel
        )
    assert during[0] < before - 100 * 2**20
    deadline = time.monotonic() + 10  # the driver takes its time
    while torch.cuda.mem_get_info()[0] < before - 32 * 2**20:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("lengths", ["like", "unlike"])
def test_attention_runs_in_one_kernel(minilm_folder: Path, lengths: str) -> None:
    """Flash attention takes no mask; with one, torch's other fused kernels run. None holds all scores of a text."""
    from embed_pipeline.models.embedder import Embedder

    texts = ["the old river is deep and slow"] * 8
    if lengths == "unlike":
        texts[0] = "the river"
    embedder = Embedder(minilm_folder, precision="auto")
    embedder.compute(texts, "document")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        embedder.compute(texts, "document")
    fused = {f"aten::_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn")}
    run = {event.key for event in profile.key_averages()}
    assert run & fused
    assert "aten::_scaled_dot_product_attention_math" not in run
