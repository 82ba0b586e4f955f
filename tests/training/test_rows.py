"""From the tables to training rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_problem import QUERY_WITH_TWO_POSITIVES, QUERY_WITHOUT_NEGATIVES, Problem

from embed_pipeline import tables
from embed_pipeline.errors import TrainingError
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.rows import TrainingQuery, groups, negatives_to_draw_from, read_training_queries

Jobs = Callable[..., TrainingJob]


def _queries(job: TrainingJob) -> list[TrainingQuery]:
    assert job.hard_negatives is not None
    return read_training_queries(
        job.settings, job.seed, job.cleaned_pairs, job.hard_negatives, job.settings.train_queries
    )


def test_each_positive_goes_on_in_the_negatives_and_begins_again_at_their_end() -> None:
    query = TrainingQuery("q", ("a", "b", "c"), ("1", "2", "3"))
    assert [group[:3] for group in groups([query], 3)] == [
        ("q", "a", ("1", "2")),
        ("q", "b", ("3", "1")),
        ("q", "c", ("2", "3")),
    ]
    assert [group[:3] for group in groups([query], 1)] == [("q", "a", ()), ("q", "b", ()), ("q", "c", ())]


def test_a_query_without_negatives_gets_random_passages_that_are_no_positives(
    job_of: Jobs, tmp_path: Path, problem: Problem
) -> None:
    queries = pq.read_table(problem.cleaned_pairs / tables.QUERIES_FILE).to_pylist()
    text = next(row["query"] for row in queries if row["query_id"] == QUERY_WITHOUT_NEGATIVES)
    job = job_of("embedder", tmp_path, train_group_size=5)
    found = next(query for query in _queries(job) if query.query == text)
    assert len(set(found.negatives)) == 4
    assert not set(found.negatives) & set(found.positives)
    assert found == next(query for query in _queries(job) if query.query == text)
    alone = _queries(job_of("embedder", tmp_path, train_group_size=1))
    assert next(query for query in alone if query.query == text).negatives == ()


def test_random_negatives_are_no_near_duplicates_of_a_positive(job_of: Jobs, tmp_path: Path, problem: Problem) -> None:
    for file in problem.cleaned_pairs.iterdir():
        (tmp_path / file.name).symlink_to(file)
    passages = pq.read_table(problem.cleaned_pairs / tables.PASSAGES_FILE).to_pylist()
    for row in passages:
        row["cluster_id"] = "p7" if row["passage_id"] == "p7" else "of the positive"
    (tmp_path / tables.PASSAGES_FILE).unlink()
    table = pa.Table.from_pylist(passages, schema=tables.PASSAGES)
    tables.write(table, tables.PASSAGES, tmp_path / tables.PASSAGES_FILE)
    job = job_of("embedder", tmp_path).model_copy(update={"cleaned_pairs": tmp_path})
    first = _queries(job)[0]  # q0, the one without negatives
    assert first.negatives == (next(row["text"] for row in passages if row["passage_id"] == "p7"),)


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_withheld_passages_are_no_random_negatives(
    job_of: Jobs, tmp_path: Path, problem: Problem, kind: Literal["embedder", "reranker"]
) -> None:
    for file in problem.cleaned_pairs.iterdir():
        (tmp_path / file.name).symlink_to(file)
    passages = pq.read_table(problem.cleaned_pairs / tables.PASSAGES_FILE).to_pylist()
    left = {"p7", "p8"}
    pairs = [{"query_id": "q0", "passage_id": row["passage_id"]} for row in passages if row["passage_id"] not in left]
    (tmp_path / tables.WITHHELD_FILE).unlink()
    tables.write(pa.Table.from_pylist(pairs, tables.WITHHELD), tables.WITHHELD, tmp_path / tables.WITHHELD_FILE)
    more = {"random_negatives": 1, "train_group_size": 2} if kind == "reranker" else {"train_group_size": 3}
    job = job_of(kind, tmp_path, **more).model_copy(update={"cleaned_pairs": tmp_path})
    first, second = _queries(job)[:2]  # q0 has no negatives of its own
    drawn = {*first.negatives, *first.random}
    assert drawn
    assert drawn <= {row["text"] for row in passages if row["passage_id"] in left}
    assert len(first.positives) == 1
    assert second.negatives


def test_random_negatives_stand_beside_mined_ones_in_every_group() -> None:
    query = TrainingQuery("q", ("a", "b"), ("1", "2", "3"), ("x", "y", "z", "w"))
    assert [group[:3] for group in groups([query], 4, 2)] == [("q", "a", ("1", "x", "y")), ("q", "b", ("2", "z", "w"))]
    assert negatives_to_draw_from(query, 4, 0) == ["1", "2", "3"]
    # Drawn from blindly, a group of 5 has one random negative on average: a quarter of these.
    assert negatives_to_draw_from(query, 5, 1) == ["1", "2", "3", "x", "1", "2", "3", "y"]


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
def test_random_negatives_are_seeded_and_neither_positive_nor_mined(job_of: Jobs, tmp_path: Path, engine: str) -> None:
    job = job_of("reranker", tmp_path, engine=engine, train_group_size=6, random_negatives=3)
    queries = _queries(job)
    for query in queries:
        assert len(query.random) == len(set(query.random)) >= 3 * len(query.positives)
        assert not set(query.random) & {*query.positives, *query.negatives}
    assert len({query.random for query in queries}) == len(queries)
    assert queries == _queries(job)
    other_seed = job_of("reranker", tmp_path, engine=engine, seed=4, train_group_size=6, random_negatives=3)
    assert queries != _queries(other_seed)


def test_a_group_may_hold_random_negatives_alone(job_of: Jobs, tmp_path: Path) -> None:
    queries = _queries(job_of("reranker", tmp_path, train_group_size=3, random_negatives=2))
    assert all(set(negatives) <= set(query.random) for query in queries for _, _, negatives, _ in groups([query], 3, 2))


def test_several_positives_are_several_rows(job_of: Jobs, tmp_path: Path) -> None:
    queries = _queries(job_of("embedder", tmp_path))
    assert sorted(len(query.positives) for query in queries)[-2:] == [1, 2], QUERY_WITH_TWO_POSITIVES
    assert len(list(groups(queries, 3))) == 49


def test_a_sample_of_the_queries_is_the_same_for_the_same_seed(job_of: Jobs, tmp_path: Path) -> None:
    sample = _queries(job_of("embedder", tmp_path, train_queries=10))
    assert len(sample) == 10
    assert sample == _queries(job_of("embedder", tmp_path, train_queries=10))
    assert sample != _queries(job_of("embedder", tmp_path, seed=4, train_queries=10))


def test_a_missing_table_is_named(job_of: Jobs, tmp_path: Path) -> None:
    job = job_of("embedder", tmp_path).model_copy(update={"hard_negatives": tmp_path})
    with pytest.raises(TrainingError, match=r"cannot read .*hard_negatives\.parquet.*Materialize"):
        _queries(job)


def test_tables_of_different_versions_are_refused(job_of: Jobs, tmp_path: Path, problem: Problem) -> None:
    table = pq.read_table(problem.cleaned_pairs / tables.PASSAGES_FILE).slice(60)
    tables.write(table, tables.PASSAGES, tmp_path / tables.PASSAGES_FILE)
    job = job_of("embedder", tmp_path, train_group_size=1).model_copy(update={"cleaned_pairs": tmp_path})
    with pytest.raises(TrainingError, match=r"passages are not in .* e\.g\. 'p0'.*different versions"):
        _queries(job)


def test_no_train_query_is_an_error(job_of: Jobs, tmp_path: Path) -> None:
    tables.write(tables.HARD_NEGATIVES.empty_table(), tables.HARD_NEGATIVES, tmp_path / tables.HARD_NEGATIVES_FILE)
    job = job_of("embedder", tmp_path).model_copy(update={"hard_negatives": tmp_path})
    with pytest.raises(TrainingError, match="no query with a positive"):
        _queries(job)


def test_a_teachers_scores_stay_with_their_texts(job_of: Jobs, tmp_path: Path) -> None:
    query = TrainingQuery("q", ("a", "b"), ("1", "2", "3"), (), (4.0, 5.0), (1.0, 2.0, 3.0))
    assert [group.scores for group in groups([query], 3)] == [(4.0, 1.0, 2.0), (5.0, 3.0, 1.0)]
    partly = TrainingQuery("q", ("a",), ("1",), (), (4.0,), ())
    assert not partly.has_scores
    assert [group.scores for group in groups([partly], 2)] == [()]
    without, *others = _queries(job_of("embedder", tmp_path))  # q0 has random negatives, which no teacher scored
    assert not without.has_scores
    assert all(query.has_scores for query in others)
