"""The questions that a training is judged by, and the blend of two scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from embed_pipeline import tables
from embed_pipeline.models.blend import blend
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.training.dev_set import EmbedderDevSet, RerankerDevSet
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob

Jobs = Callable[..., TrainingJob]


class Oracle:
    """Scores a passage by the words it shares with the query."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def score(self, pairs: list[tuple[str, str]], *, progress: bool = True) -> np.ndarray:
        shared = [len(set(query.split()) & set(passage.split()) - {"is", "the"}) for query, passage in pairs]
        return self.sign * np.asarray(shared, dtype=np.float32)


def embedder_set(job: TrainingJob) -> EmbedderDevSet:
    found = EmbedderDevSet.read(cast(EmbedderJob, job))
    assert found is not None
    return found


def reranker_set(job: TrainingJob) -> RerankerDevSet:
    found = RerankerDevSet.read(cast(RerankerJob, job))
    assert found is not None
    return found


def test_the_corpus_holds_every_positive_and_random_passages_up_to_its_size(job_of: Jobs, tmp_path: Path) -> None:
    dev = embedder_set(job_of("embedder", tmp_path, dev_queries=10, dev_passages=50))
    assert (len(dev.queries), len(dev.passages)) == (10, 50)
    assert {id for judged in dev.qrels.values() for id in judged} <= dev.passages.keys()
    assert dev == embedder_set(job_of("embedder", tmp_path, dev_queries=10, dev_passages=50))
    assert dev != embedder_set(job_of("embedder", tmp_path, seed=4, dev_queries=10, dev_passages=50))
    assert len(embedder_set(job_of("embedder", tmp_path, dev_passages=1)).passages) == 16  # the positives alone


def test_an_answer_that_was_not_retrieved_counts_against_the_reranker(job_of: Jobs, tmp_path: Path) -> None:
    dev = reranker_set(job_of("reranker", tmp_path))
    assert len(dev.queries) == 16
    assert dev.ndcg_at_10(cast(Reranker, Oracle())).value == pytest.approx(15 / 16)


def test_all_candidates_that_were_delivered_are_reranked(job_of: Jobs, tmp_path: Path) -> None:
    dev = reranker_set(job_of("reranker", tmp_path))
    assert {len(ids) for ids in dev.candidates.values()} == {11, 12}


def test_without_candidates_there_is_no_dev_set(job_of: Jobs, tmp_path: Path) -> None:
    file = tmp_path / tables.CANDIDATES_FILE
    tables.write(tables.CANDIDATES.empty_table(), tables.CANDIDATES, file)
    job = job_of("reranker", tmp_path).model_copy(update={"dev_candidates": file})
    assert RerankerDevSet.read(cast(RerankerJob, job)) is None


def test_the_weights_run_from_the_reranker_alone_to_the_embedder_alone(job_of: Jobs, tmp_path: Path) -> None:
    dev = reranker_set(job_of("reranker", tmp_path))
    good, bad = (dev.ndcg_at_10_by_weight(cast(Reranker, Oracle(sign))) for sign in (1.0, -1.0))
    assert good[0.0] == pytest.approx(15 / 16)
    assert bad[0.0] < bad[1.0]
    assert good[1.0] == pytest.approx(bad[1.0])  # the reranker has no say


def test_a_broken_reranker_is_no_number_rather_than_a_bad_score(job_of: Jobs, tmp_path: Path) -> None:
    assert np.isnan(reranker_set(job_of("reranker", tmp_path)).ndcg_at_10(cast(Reranker, Oracle(float("nan")))).value)


def test_blend_does_not_depend_on_either_scale() -> None:
    embedder, reranker = np.array([0.9, 0.8, 0.1], dtype=np.float32), np.array([-3.0, 5.0, 1.0], dtype=np.float32)
    blended = blend(embedder, reranker, 0.3)
    assert np.allclose(blended, blend(embedder * 100 - 7, reranker / 50 + 2, 0.3), atol=1e-5)
    assert list(np.argsort(blend(embedder, reranker, 0.0))) == list(np.argsort(reranker))
    assert list(np.argsort(blend(embedder, reranker, 1.0))) == list(np.argsort(embedder))
    assert list(blend(np.ones(2), np.array([1.0, 3.0]), 0.5)) == [-0.5, 0.5]  # equal scores have no say
