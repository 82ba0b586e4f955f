"""What one rank shows as well as many: determinism, the best weights, early stopping, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file
from small_problem import Problem, Trained, launch
from transformers import Trainer

from embed_pipeline import tables
from embed_pipeline.errors import ModelError, TrainingError
from embed_pipeline.training.job import EmbedderJob, TrainingJob

KINDS = [
    ("embedder", {"engine": "sentence-transformers"}),
    ("embedder", {"engine": "flag-embedding"}),
    ("reranker", {"engine": "sentence-transformers", "random_negatives": 1}),
    ("reranker", {"engine": "flag-embedding", "train_group_size": 4, "random_negatives": 1}),
]


def same_weights(one: Trained, other: Trained) -> bool:
    first, second = load_file(one.model / "model.safetensors"), load_file(other.model / "model.safetensors")
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_the_same_seed_gives_the_same_weights_bit_by_bit_with_and_without_a_preflight(
    train_here: Callable[..., Trained], kind: str, settings: dict[str, Any]
) -> None:
    first = train_here(kind, **settings)
    assert same_weights(first, train_here(kind, preflight=False, **settings))
    assert not same_weights(first, train_here(kind, seed=4, **settings))


def dev_of(trained: Trained) -> dict[int, float]:
    return {row["step"]: row["dev_ndcg_at_10"] for row in trained.log if "dev_ndcg_at_10" in row}


def measured_again(trained: Trained) -> float:
    from embed_pipeline.models.embedder import Embedder
    from embed_pipeline.training.dev_set import EmbedderDevSet

    assert isinstance(trained.job, EmbedderJob)
    questions = EmbedderDevSet.read(trained.job)
    assert questions is not None
    return questions.ndcg_at_10(Embedder(trained.model, precision="float32")).value


def test_a_noisy_dev_curve_keeps_the_last_weights(
    train_here: Callable[..., Trained], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trained = train_here("embedder", learning_rate=1e-2, epochs=4, evaluations=6, early_stopping_patience=6)
    dev = dev_of(trained)
    assert max(dev.values()) > dev[48], "choose settings whose last weights are not best on dev"
    assert trained.summary["kept_step"] == trained.summary["steps"] == 48
    assert trained.summary["dev_kept"] == dev[48]
    assert measured_again(trained) == pytest.approx(dev[48], abs=1e-9)
    assert trained.summary["kept_because"] in caplog.text
    assert "the last weights are kept, because the difference is no more than chance" in caplog.text
    assert trained.summary["dev_verdict"] == "better"
    assert "16 dev questions distinguish differences of about" in trained.summary["dev_gain"]


OVERFITS = {"learning_rate": 0.03, "scheduler": "constant_with_warmup", "warmup_ratio": 0.9, "epochs": 4}


def test_a_training_that_gets_worse_stops_and_keeps_its_best_weights(train_here: Callable[..., Trained]) -> None:
    trained = train_here("embedder", evaluations=6, early_stopping_patience=2, **OVERFITS)
    dev = dev_of(trained)
    best = max(dev, key=lambda step: dev[step])
    assert 0 < best == trained.summary["kept_step"]
    assert trained.summary["steps"] == max(dev) < 48
    assert dev[best] == trained.summary["dev_kept"] == pytest.approx(measured_again(trained), abs=1e-9)
    assert "better by more than chance" in trained.summary["kept_because"]


def test_a_training_that_gets_no_better_goes_on(train_here: Callable[..., Trained]) -> None:
    trained = train_here("embedder", learning_rate=1e-12, epochs=4, evaluations=4, early_stopping_patience=1)
    assert trained.summary["kept_step"] == trained.summary["steps"] == 48
    assert trained.summary["dev_verdict"] == "undecided"


@pytest.mark.parametrize("loss", ["ListNetLoss", "ListMLELoss", "PListMLELoss", "RankNetLoss", "ADRMSELoss"])
def test_every_listwise_loss_that_is_offered_trains(train_here: Callable[..., Trained], loss: str) -> None:
    assert train_here("reranker", loss=loss, max_steps=2).summary["steps"] == 2


def test_dropout_is_for_the_training_only(train_here: Callable[..., Trained]) -> None:
    with_dropout, without = train_here("embedder", max_steps=4), train_here("embedder", max_steps=4, dropout=0.0)
    assert not same_weights(with_dropout, without)
    assert (with_dropout.model / "config.json").read_text() == (without.model / "config.json").read_text()


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
def test_all_the_optimizer_settings_are_taken(train_here: Callable[..., Trained], engine: str) -> None:
    trained = train_here(
        "embedder", engine=engine, train_group_size=1, gradient_accumulation_steps=2, gradient_checkpointing=True,
        precision="bfloat16", scheduler="cosine", warmup_ratio=0.34, logging_steps=1, train_queries=32, max_steps=6,
        learning_rate=4e-4, negatives_cross_device=False, evaluations=1,
    )  # fmt: skip
    assert trained.summary["queries"] == 32
    assert (trained.summary["steps"], trained.summary["precision"]) == (6, "bfloat16")
    # Three steps of warm-up from 0, then half a cosine from the full rate towards 0.
    shares = [0.0, 1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 3)) / 2 for i in (0, 1, 2))]
    rates = {row["step"]: row["learning_rate"] for row in trained.log if "learning_rate" in row}
    assert list(rates) == [1, 2, 3, 4, 5, 6]
    assert list(rates.values()) == pytest.approx([4e-4 * share for share in shares], abs=1e-9)


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_a_step_changes_the_weights_by_what_the_settings_say(
    train_here: Callable[..., Trained], base_models: tuple[Path, Path], kind: str, engine: str
) -> None:
    """By SGD, where a step is learning_rate times (the clipped gradient, and weight_decay times the weights)."""
    base = base_models[kind == "reranker"]
    rate, norm, decay = 0.5, 0.01, 0.125

    def weights(**settings: Any) -> dict[str, torch.Tensor]:
        trained = train_here(
            kind, lambda job: job.model_copy(update={"base_model": base}), engine=engine, preflight=False,
            learning_rate=rate, max_grad_norm=norm, warmup_ratio=0.5, max_steps=2, evaluations=1, logging_steps=1,
            arguments={"optim": "sgd"}, **settings,
        )  # fmt: skip
        assert min(row["grad_norm"] for row in trained.log if "grad_norm" in row) > norm
        return load_file(trained.model / "model.safetensors")

    before = load_file(base / "model.safetensors")
    plain, decayed = weights(weight_decay=0.0), weights(weight_decay=decay)
    # The first of two steps is the warm-up's, at rate 0.
    length = math.sqrt(sum(float((plain[name] - before[name]).square().sum()) for name in before))
    assert length == pytest.approx(rate * norm, rel=0.02)
    changed = {name for name in before if not decayed[name].equal(plain[name])}
    for name in changed:
        torch.testing.assert_close(decayed[name] - plain[name], -rate * decay * before[name], rtol=0, atol=2e-7)
    dense = {name for name in before if name.endswith(("query.weight", "dense.weight")) and "pooler" not in name}
    assert dense <= changed
    assert not [name for name in changed if name.endswith("bias") or "LayerNorm" in name]


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_without_dev_queries_the_last_weights_are_kept(
    train_here: Callable[..., Trained], problem: Problem, tmp_path: Path, kind: str
) -> None:
    import pyarrow.parquet as pq

    for file in problem.cleaned_pairs.iterdir():
        (tmp_path / file.name).symlink_to(file)
    queries = pq.read_table(problem.cleaned_pairs / tables.QUERIES_FILE)
    (tmp_path / tables.QUERIES_FILE).unlink()
    train_only = queries.filter(pc.equal(queries["split"], "train"))
    tables.write(train_only, tables.QUERIES, tmp_path / tables.QUERIES_FILE)

    changed = {"cleaned_pairs": tmp_path}
    if kind == "reranker":
        changed["dev_candidates"] = tmp_path / "empty.parquet"
        tables.write(tables.CANDIDATES.empty_table(), tables.CANDIDATES, changed["dev_candidates"])
    trained = train_here(kind, lambda job: job.model_copy(update=changed), max_steps=2)

    assert trained.summary["dev_kept"] is None
    assert trained.summary["dev_verdict"] is None
    if kind == "reranker":
        serving = json.loads((trained.output / "serving.json").read_text())
        assert serving == {"embedder_weight": 0.0, "dev_ndcg_at_10_by_weight": {}}
    assert trained.summary["dev_queries"] == 0
    assert trained.model.is_dir()


DIVERGES = {"learning_rate": 100.0, "weight_decay": 10.0}  # the largest that the settings take


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "embedder",
            DIVERGES,
            r"became (nan|inf).* by step \d+.*Lower learning_rate",
        ),
        (
            "reranker",
            {**DIVERGES, "engine": "flag-embedding"},
            r"became (nan|inf).*Lower learning_rate",
        ),
        ("embedder", {"batch_size": 50}, r"49 \(query, positive\) pairs do not fill one step.*Lower batch_size to 49"),
        ("embedder", {"batch_size": 50, "engine": "flag-embedding"}, "48 queries do not fill one step"),
        ("embedder", {"batch_size": 49}, "no step can be made: the 49 rows have 48 different texts as query.*to 48 or"),
        ("embedder", {"batch_size": 48, "train_group_size": 5}, "no step was made.*equal texts never share a batch"),
        ("embedder", {"precision": "float16"}, "float16 trains on a CUDA GPU only"),
    ],
)
def test_refusals(train_here: Callable[..., Trained], kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=f"(?s){message}"):
        train_here(kind, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("embedder", {"encoding": {"passage_max_length": 200}}, "passage_max_length asks for 200 .* can take 128"),
        ("reranker", {"passage_max_length": 300}, r"query_max_length \(128\) .* ask for 428 tokens .* can take 128"),
    ],
)
def test_texts_longer_than_the_model_can_take_are_refused(
    train_here: Callable[..., Trained], kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}"):
        train_here(kind, **settings)


def test_a_model_worse_than_its_base_is_told(
    train_here: Callable[..., Trained], caplog: pytest.LogCaptureFixture
) -> None:
    harmed = train_here("embedder", learning_rate=0.5, scheduler="constant", warmup_ratio=0.0, max_steps=8).summary
    assert harmed["dev_verdict"] == "worse"
    assert f"dev ndcg_at_10 went from {harmed['dev_before']:.4f} to {harmed['dev_kept']:.4f}" in caplog.text
    assert "worse than the base model by more than chance" in caplog.text


def test_a_job_for_more_processes_than_there_are_is_refused(train_here: Callable[..., Trained]) -> None:
    with pytest.raises(TrainingError, match="for 2 processes, but 1 were started"):
        train_here("embedder", lambda job: job.model_copy(update={"world_size": 2}))


def test_the_failing_ranks_cause_is_the_error(job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    job = job_of("embedder", tmp_path / "output", batch_size=50)
    with pytest.raises(TrainingError, match=r"^49 .* pairs do not fill one step"):
        launch(job, tmp_path)


def test_a_bug_of_ours_shows_its_traceback(job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    job = job_of("embedder", tmp_path / "output").model_copy(update={"base_model": tmp_path / "tokenizer"})
    with pytest.raises(TrainingError, match=r"(?s)the job failed with .*Traceback.*load_sentence_transformer"):
        launch(job, tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "advice"),
    [
        ("embedder", {}, "Set sub_batch_size: 2"),
        ("embedder", {"sub_batch_size": 2}, "Set sub_batch_size: 1"),
        ("embedder", {"engine": "flag-embedding"}, "Set gradient_checkpointing: true"),
        (
            "reranker",
            {"gradient_checkpointing": True},
            r"Lower batch_size \(gradient_accumulation_steps makes up for it",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_told_with_what_makes_it_fit(
    train_here: Callable[..., Trained],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, Any],
    advice: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "training_step", full)
    with pytest.raises(TrainingError, match=f"out of GPU memory at batch_size 4 x train_group_size 3: .*{advice}"):
        train_here(kind, **settings)
