"""Metrics against sentence-transformers' evaluator and against figures worked out by hand."""

from __future__ import annotations

import math
import random
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from embed_pipeline.evaluation.metrics import METRICS, ndcg_at_10, per_query
from embed_pipeline.settings import Metric

Graded = dict[str, dict[str, float]]


def random_case(seed: int, *, grades: list[float], queries: int = 25) -> tuple[Graded, Graded]:
    """Runs of up to 130 of 200 passages with few distinct scores; some queries are missing from the run."""
    draw = random.Random(seed)
    passages = [f"p{i}" for i in range(200)]
    qrels = {
        f"q{i}": {passage: draw.choice(grades) for passage in draw.sample(passages, draw.randint(1, 12))}
        for i in range(queries)
    }
    for judged in qrels.values():
        judged[draw.choice(passages)] = max(grades)
    run = {
        query: {passage: draw.randint(0, 20) / 4 for passage in draw.sample(passages, draw.randint(0, 130))}
        for query in qrels
        if draw.random() > 0.15
    }
    return qrels, run


def ranked(scores: dict[str, float], judged: dict[str, float]) -> list[str]:
    return sorted(scores, key=lambda passage: (-scores[passage], judged.get(passage, 0), passage))


def by_hand(qrels: dict[str, float], ranking: list[str]) -> dict[str, float]:
    relevant = {passage for passage, grade in qrels.items() if grade > 0}
    hits = [passage in relevant for passage in ranking]
    dcg = sum(qrels.get(passage, 0) / math.log2(rank + 2) for rank, passage in enumerate(ranking[:10]))
    ideal = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(qrels.values(), reverse=True)[:10]))
    values = {
        "ndcg_at_10": dcg / ideal,
        "mrr_at_10": next((1 / (rank + 1) for rank, hit in enumerate(hits[:10]) if hit), 0.0),
        "map_at_100": sum(sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits[:100]) if hit) / len(relevant),
    }
    for k in (1, 5, 10, 100):
        values[f"recall_at_{k}"] = sum(hits[:k]) / len(relevant)
    for k in (1, 5, 10):
        values[f"hit_rate_at_{k}"] = float(any(hits[:k]))
    return values


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), grades=st.sampled_from([[0, 1], [0, 1, 2, 3], [0, 0.5, 0.25, 1.0], [0, 50_000, 1e5]])
)
def test_worked_out_by_hand(seed: int, grades: list[float]) -> None:
    """Ties, graded and fractional relevance, missing queries."""
    qrels, run = random_case(seed, grades=grades)
    values = per_query(qrels, run)
    assert set(values) == set(METRICS)
    for query, judged in qrels.items():
        expected = by_hand(judged, ranked(run.get(query, {}), judged))
        for metric in METRICS:
            assert values[metric][query] == pytest.approx(expected[metric], abs=1e-4), (metric, query)
    assert ndcg_at_10(qrels, run) == values["ndcg_at_10"]


def test_agrees_with_sentence_transformers() -> None:
    """Binary relevance, which is all its evaluator knows."""
    qrels, run = random_case(3, grades=[1], queries=60)
    run = {query: run.get(query, {}) for query in qrels}
    at = [1, 5, 10, 100]
    evaluator = InformationRetrievalEvaluator(
        queries={query: query for query in qrels},
        corpus={f"p{i}": "" for i in range(200)},
        relevant_docs={query: set(judged) for query, judged in qrels.items()},
        mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=at, precision_recall_at_k=at, map_at_k=[100],
    )  # fmt: skip
    results = [
        [{"corpus_id": p, "score": -r} for r, p in enumerate(ranked(run[query], qrels[query]))] for query in qrels
    ]
    theirs = evaluator.compute_metrics(results)
    ours = {metric: float(np.mean(list(values.values()))) for metric, values in per_query(qrels, run).items()}
    assert ours["ndcg_at_10"] == pytest.approx(theirs["ndcg@k"][10])
    assert ours["mrr_at_10"] == pytest.approx(theirs["mrr@k"][10])
    # Theirs divides by min(k, relevant), trec_eval's by the relevant: the same with up to 100 relevant passages.
    assert ours["map_at_100"] == pytest.approx(theirs["map@k"][100])
    for k in at:
        assert ours[f"recall_at_{k}"] == pytest.approx(theirs["recall@k"][k])
    for k in (1, 5, 10):
        assert ours[f"hit_rate_at_{k}"] == pytest.approx(theirs["accuracy@k"][k])


def test_equal_scores_do_not_depend_on_the_order_of_the_run() -> None:
    """A model that gives every passage one score must not profit from positives being listed first."""
    qrels = {"q": {"p5": 1.0}}
    first = {"q": dict.fromkeys(["p5", "p1", "p2"], 0.5)}
    last = {"q": dict.fromkeys(["p1", "p2", "p5"], 0.5)}
    assert per_query(qrels, first) == per_query(qrels, last)
    assert per_query(qrels, first)["mrr_at_10"] == {"q": pytest.approx(1 / 3)}


@pytest.mark.parametrize("relevant", ["p0", "p5", "p9"])
def test_a_constant_scorer_has_the_worst_figure_whatever_the_ids(relevant: str) -> None:
    run = {"q": {f"p{i}": -7.25 for i in range(10)}}
    assert per_query({"q": {relevant: 1.0}}, run, ["mrr_at_10"])["mrr_at_10"] == {"q": pytest.approx(1 / 10)}
    graded = per_query({"q": {"p0": 3.0, "p1": 1.0}}, run, ["ndcg_at_10"])["ndcg_at_10"]["q"]
    by_grade = (1 / math.log2(10) + 3 / math.log2(11)) / (3 + 1 / math.log2(3))
    assert graded == pytest.approx(by_grade)


def test_what_counts() -> None:
    qrels = {
        **{"missing": {"a": 1.0}, "empty": {"a": 1.0}, "only_zero": {"a": 0.0}, "found": {"a": 1.0, "b": 0.0}},
        **{"unjudged_by_all": {}, "negative": {"a": -0.5}, "negative_and_zero": {"a": -0.5, "b": 0.0}},
    }
    run = {"empty": {}, "found": {"b": 2.0, "a": 1.0}, "unjudged": {"a": 1.0}}
    assert per_query(qrels, run)["mrr_at_10"] == {"missing": 0.0, "empty": 0.0, "found": 0.5}


def test_reciprocal_rank_ends_at_ten() -> None:
    passages = [f"p{i:02}" for i in range(12)]
    run = {"q": {passage: -float(i) for i, passage in enumerate(passages)}}
    assert per_query({"q": {"p09": 1.0}}, run)["mrr_at_10"]["q"] == pytest.approx(0.1)
    assert per_query({"q": {"p10": 1.0}}, run)["mrr_at_10"]["q"] == 0.0


def test_nothing_uncomputable_becomes_zero() -> None:
    with pytest.raises(ValueError, match="score of passage 'a' for query 'q' is NaN"):
        per_query({"q": {"a": 1.0}}, {"q": {"a": float("nan")}})
    with pytest.raises(ValueError, match="relevance of passage 'a' to query 'q' is nan"):
        per_query({"q": {"a": float("nan")}}, {})
    with pytest.raises(ValueError, match="none of the 1 judged queries has a relevant passage"):
        per_query({"q": {"a": 0.0}}, {})
    with pytest.raises(ValueError, match="unknown metric 'ndcg@10'; known are ndcg_at_10, mrr_at_10, "):
        per_query({"q": {"a": 1.0}}, {}, ["ndcg@10"])


def test_the_gate_can_be_told_every_metric() -> None:
    assert get_args(Metric) == (*METRICS, "spearman")
