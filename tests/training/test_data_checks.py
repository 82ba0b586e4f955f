"""Rows that nothing can be learnt from are refused; those that cost something are told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_problem import Problem, Trained

from embed_pipeline import tables
from embed_pipeline.errors import TrainingError
from embed_pipeline.settings import ExtraSourceSettings
from embed_pipeline.training.data_checks import check_repeats, fillable_batches
from embed_pipeline.training.job import TrainingJob

Changed = Callable[[Callable[[dict[str, Any]], None]], Callable[[TrainingJob], TrainingJob]]


@pytest.fixture
def with_rows(problem: Problem, tmp_path: Path) -> Changed:
    """Jobs on the problem's hard negatives, each row changed."""

    def make(change: Callable[[dict[str, Any]], None]) -> Callable[[TrainingJob], TrainingJob]:
        folder = tmp_path / "tables"
        shutil.copytree(problem.cleaned_pairs, folder, symlinks=True)
        rows = pq.read_table(folder / tables.HARD_NEGATIVES_FILE).to_pylist()
        for row in rows:
            change(row)
        table = pa.Table.from_pylist(rows, schema=tables.HARD_NEGATIVES)
        tables.write(table, tables.HARD_NEGATIVES, folder / tables.HARD_NEGATIVES_FILE)
        return lambda job: job.model_copy(update={"hard_negatives": folder})

    return make


def without_negatives(row: dict[str, Any]) -> None:
    if int(row["query_id"][1:]) % 3:
        for key in ("negative_ids", "negative_scores", "negative_origins", "negative_teacher_scores"):
            row[key] = []


def same_answer(row: dict[str, Any]) -> None:
    row["positive_ids"] = ["p0"] if int(row["query_id"][1:]) % 12 else ["p1"]
    row["negative_ids"] = [id for id in row["negative_ids"] if id not in ("p0", "p1")] or ["p5"]


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_queries_without_negatives(train_here: Callable[..., Trained], with_rows: Changed, kind: str) -> None:
    change = with_rows(without_negatives)
    expected = r"shop: mining found no negative for 33 of 48 queries.*raise mining.max_score_ratio.*train_group_size: 1"
    with pytest.raises(TrainingError, match=expected):
        train_here(kind, change)
    if kind == "embedder":  # in-batch negatives need none
        assert train_here(kind, change, train_group_size=1, max_steps=1).summary["warnings"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"no step can be made: the 48 rows have 2 different texts as positive, a batch needs 4.*batch_size to 2"),
        ({"engine": "flag-embedding"}, r"84\.\d % of a batch's negatives would be the query's own positive.*no_dupl"),
        ({"batch_sampler": "batch_sampler"}, r"84\.\d % of a batch's negatives would be the query's own positive"),
    ],
)
def test_one_answer_to_everything(
    train_here: Callable[..., Trained], with_rows: Changed, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        train_here("embedder", with_rows(same_answer), **settings)


def test_a_source_that_fills_no_batch_of_its_own(train_here: Callable[..., Trained]) -> None:
    few = ExtraSourceSettings.model_validate({"name": "faq", "kind": "pairs", "path": "x", "train_rows": 3})

    def with_few(job: TrainingJob) -> TrainingJob:
        return job.model_copy(update={"extra_sources": (few,)})

    with pytest.raises(TrainingError, match="3 queries of faq do not fill one step"):
        train_here("embedder", with_few, engine="flag-embedding", arguments={"same_dataset_within_batch": True})


def test_some_answers_repeat() -> None:
    several = {"positive": [f"p{i % 40}" for i in range(400)]}
    told = check_repeats(several, "shop", 64, apart=False)
    assert told is not None
    assert "in a batch of 64 a query meets its own positive 1.4 times as a negative" in told
    told = check_repeats({"positive": ["p"] * 200 + [f"p{i}" for i in range(200)]}, "shop", 10, apart=True)
    assert told is not None
    assert "at least 45 % of the batches of an epoch cannot be filled" in told
    for apart in (True, False):
        assert check_repeats({"positive": [f"p{i}" for i in range(400)]}, "shop", 64, apart=apart) is None


@pytest.mark.parametrize("seed", range(5))
def test_so_many_batches_can_be_filled(seed: int) -> None:
    """Against the greedy way, which is the best one: the commonest texts first."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 12, 20)
    size, left, made = 6, counts.copy(), 0
    while (left > 0).sum() >= size:
        left[np.argsort(-left, kind="stable")[:size]] -= 1
        made += 1
    assert fillable_batches(counts, size) == made
