"""The gate's verdict from per-query values: what passes, what does not, and that it says why."""

from __future__ import annotations

import math

import numpy as np
import pytest

from embed_pipeline.evaluation.comparison import Values
from embed_pipeline.evaluation.gate import GateReport, judge
from embed_pipeline.evaluation.guard_sets import GuardResult
from embed_pipeline.evaluation.metrics import METRICS
from embed_pipeline.settings import EvaluationSettings, GateSettings

EVALUATION = EvaluationSettings(bootstrap_samples=1_000)
QUERIES = 200


def values_of(**means: float | np.ndarray) -> dict[str, dict[str, dict[str, float]]]:
    """system -> the same value in every metric, with noise that all systems share and a little of their own."""
    shared = np.random.default_rng(0).normal(0, 0.2, QUERIES)
    values = {}
    for number, (system, mean) in enumerate(means.items()):
        own = np.random.default_rng(number + 1).normal(0, 0.02, QUERIES)
        of_queries = mean + shared + own - own.mean()
        values[system] = {metric: {f"q{i}": float(v) for i, v in enumerate(of_queries)} for metric in METRICS}
    return values


def verdict(values: Values, gate: GateSettings | None = None, **more: object) -> GateReport:
    return judge(values, gate or GateSettings(), EVALUATION, 7, **more)  # type: ignore[arg-type]


def test_a_better_pair_passes_and_the_sentence_has_the_figures() -> None:
    report = verdict(values_of(base_embedder=0.4, embedder=0.5, reranker=0.6))
    assert report.passed
    assert report.reasons == []
    assert report.sentence.startswith("nDCG@10 0.4")
    assert "→ 0.6" in report.sentence
    assert "+0.200 [+0." in report.sentence
    assert report.sentence.endswith("over the base embedder; to be promoted")
    assert all(judged.found.p_value < 0.01 for judged in report.judgements if judged.demand == "better")


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ({"base_embedder": 0.5, "embedder": 0.5, "reranker": 0.5}, "not shown to be better than the base embedder"),
        ({"base_embedder": 0.5, "embedder": 0.4, "reranker": 0.6}, "embedder loses more than the 0.000 allowed"),
        ({"base_embedder": 0.5, "embedder": 0.7, "reranker": 0.6}, "reranker loses more than the 0.000 allowed"),
        ({"base_embedder": 0.6, "embedder": 0.5, "reranker": 0.5}, "not shown to be better than the base embedder"),
        (
            {"base_embedder": 0.4, "embedder": 0.5, "reranker": 0.6, "champion_embedder": 0.5, "champion_pair": 0.6},
            "not shown to be better than the champion",
        ),
        (
            {"base_embedder": 0.4, "embedder": 0.5, "reranker": 0.6, "champion_embedder": 0.55, "champion_pair": 0.56},
            "fine-tuned embedder loses more than the 0.000 allowed against the champion's embedder",
        ),
        (
            {"base_embedder": 0.4, "base_pair": 0.7, "embedder": 0.5, "reranker": 0.6},
            "not shown to be better than the base embedder and base reranker",
        ),
    ],
)  # fmt: skip
def test_a_candidate_that_is_not_better_is_refused(means: dict[str, float], said: str) -> None:
    report = verdict(values_of(**means))
    assert report.outcome == "refuse"
    assert any(said in reason for reason in report.reasons), report.reasons
    assert "refused: " in report.sentence


def test_a_gain_that_may_be_chance_is_refused_and_a_small_real_one_passes_unless_more_is_asked() -> None:
    noisy = values_of(base_embedder=0.5, embedder=0.5)
    draw = np.random.default_rng(3).normal(0.01, 0.3, QUERIES)
    for metric in METRICS:
        of_base = noisy["base_embedder"][metric]
        noisy["embedder"][metric] = {q: v + d for (q, v), d in zip(of_base.items(), draw, strict=True)}
    assert "more than chance" in verdict(noisy).reasons[0]

    small = values_of(base_embedder=0.5, embedder=0.51)
    assert verdict(small).passed
    asked = verdict(small, GateSettings(min_gain=0.02))
    assert asked.outcome == "refuse"
    assert "a gain of at least 0.020 is needed" in asked.reasons[0]


def gaining(gains: list[float]) -> Values:
    """A base embedder at 0.5 on every question, and a candidate that gains so much on each."""
    by_system = {"base_embedder": [0.5] * len(gains), "embedder": [0.5 + gain for gain in gains]}
    return {
        system: {metric: {f"q{i}": v for i, v in enumerate(of_queries)} for metric in METRICS}
        for system, of_queries in by_system.items()
    }


@pytest.mark.parametrize(
    ("gains", "interval_agrees", "permutation_agrees"),
    [
        # All five gain, so every resample does; but 2 of 32 sign patterns are as extreme: p = 0.0625.
        ([0.1] * 5, True, False),
        # One heavy loss: 8 % of the resamples draw it three times and lose; few sign patterns come near the sum.
        ([0.04] * 24 + [-0.3], False, True),
        ([0.1] * 10, True, True),
        ([0.1, -0.1] * 5 + [0.01], False, False),
    ],
)
def test_interval_and_permutation_test_each_can_refuse(
    gains: list[float], interval_agrees: bool, permutation_agrees: bool
) -> None:
    report = verdict(gaining(gains), GateSettings(max_loss={}, min_queries=1))
    found = report.judgements[0].found
    assert found.gain > 0
    assert (found.interval_low > 0, found.p_value <= 0.05) == (interval_agrees, permutation_agrees)
    assert report.passed == (interval_agrees and permutation_agrees)
    if not report.passed:
        assert "(more than chance is needed)" in report.reasons[0]


def test_the_confidence_asked_for_is_that_of_both_tests() -> None:
    values = gaining([0.1] * 5)
    gate = GateSettings(max_loss={}, min_queries=1)
    assert judge(values, gate, EvaluationSettings(bootstrap_samples=1_000, confidence=0.9), 7).passed
    assert not judge(values, gate, EvaluationSettings(bootstrap_samples=1_000, confidence=0.95), 7).passed


def test_exactly_what_is_asked_is_enough_and_exactly_what_is_allowed_is_not_too_much() -> None:
    """0.6 - 0.5 and 0.7 - 0.8 in binary fractions lie on the wrong side of 0.1 and -0.1 by rounding."""
    assert 0.6 - 0.5 < 0.1 and 0.7 - 0.8 < -0.1  # noqa: PT018
    values = {
        system: {metric: dict.fromkeys([f"q{i}" for i in range(QUERIES)], value) for metric in METRICS}
        for system, value in {"base_embedder": 0.5, "embedder": 0.6}.items()
    }
    for system, value in {"base_embedder": 0.8, "embedder": 0.7}.items():
        values[system]["recall_at_100"] = dict.fromkeys(values[system]["recall_at_100"], value)
    assert verdict(values, GateSettings(min_gain=0.1, max_loss={"recall_at_100": 0.1})).passed
    assert not verdict(values, GateSettings(min_gain=0.1001, max_loss={"recall_at_100": 0.1})).passed
    assert not verdict(values, GateSettings(min_gain=0.1, max_loss={"recall_at_100": 0.0999})).passed


def test_a_verdict_is_the_same_each_time() -> None:
    values = values_of(base_embedder=0.5, embedder=0.52, reranker=0.53, champion_embedder=0.5, champion_pair=0.51)
    assert verdict(values) == verdict(values)


def test_what_is_demanded_and_against_whom() -> None:
    """All demands in their order: system, opponent, metric, demand."""

    def demands(values: Values) -> list[tuple[str, str, str, str]]:
        judgements = verdict(values, GateSettings(max_loss={"recall_at_100": 0.01})).judgements
        return [(j.found.system, j.against, j.found.metric, j.demand) for j in judgements]

    main, guard, better, kept = "ndcg_at_10", "recall_at_100", "better", "not worse"
    assert demands(values_of(base_embedder=0.4, embedder=0.5)) == [
        ("embedder", "base_embedder", main, better),
        ("embedder", "base_embedder", guard, kept),
    ]
    everyone = ["base_embedder", "base_pair", "embedder", "reranker", "champion_embedder", "champion_pair"]
    assert demands(values_of(**dict.fromkeys(everyone, 0.5))) == [
        ("reranker", "champion_pair", main, better),
        ("embedder", "champion_embedder", main, kept),
        ("reranker", "champion_pair", guard, kept),
        ("embedder", "champion_embedder", guard, kept),
        ("reranker", "base_pair", main, better),
        ("embedder", "base_embedder", main, kept),
        ("reranker", "base_pair", guard, kept),
        ("embedder", "base_embedder", guard, kept),
        ("reranker", "embedder", main, kept),
    ]


def test_a_reranker_does_not_hide_what_its_embedder_loses() -> None:
    values = values_of(base_embedder=0.4, embedder=0.5, reranker=0.6)
    values["embedder"]["recall_at_100"] = {q: v - 0.03 for q, v in values["base_embedder"]["recall_at_100"].items()}
    report = verdict(values)
    assert report.outcome == "refuse"
    assert "the fine-tuned embedder loses more than the 0.010 allowed against the base embedder" in report.reasons[0]


def test_a_loss_of_the_primary_metric_may_be_allowed_to_each_model_alone() -> None:
    values = values_of(base_embedder=0.5, embedder=0.45, reranker=0.6)
    assert "fine-tuned embedder loses more than the 0.000 allowed" in verdict(values).reasons[0]
    assert verdict(values, GateSettings(max_loss={"ndcg_at_10": 0.06})).passed
    # What serves has to be better all the same.
    worse = values_of(base_embedder=0.5, embedder=0.49, reranker=0.48)
    assert "not shown to be better" in verdict(worse, GateSettings(max_loss={"ndcg_at_10": 0.06})).reasons[0]


def test_a_guard_metric_may_lose_what_is_allowed_and_no_more() -> None:
    values = values_of(base_embedder=0.5, embedder=0.6)
    values["embedder"]["recall_at_100"] = {q: v - 0.03 for q, v in values["base_embedder"]["recall_at_100"].items()}
    assert "loses more than the 0.010 allowed" in verdict(values).reasons[0]
    assert "Recall@100" in verdict(values).reasons[0]
    assert verdict(values, GateSettings(max_loss={"recall_at_100": 0.031})).passed
    assert verdict(values, GateSettings(max_loss={})).passed


def test_another_primary_metric_decides() -> None:
    values = values_of(base_embedder=0.5, embedder=0.6)
    values["embedder"]["mrr_at_10"] = dict(values["base_embedder"]["mrr_at_10"])
    assert verdict(values).passed
    report = verdict(values, GateSettings(metric="mrr_at_10"))
    assert report.outcome == "refuse"
    assert report.sentence.startswith("MRR@10")


def test_too_few_questions_are_no_verdict() -> None:
    values = values_of(base_embedder=0.4, embedder=0.6)
    report = verdict(values, GateSettings(min_queries=QUERIES + 1))
    assert report.outcome == "too_few"
    assert not report.passed
    assert "200 test questions are too few to tell: gate.min_queries asks for 201" in report.sentence
    assert verdict(values, GateSettings(min_queries=QUERIES)).passed


def test_what_the_champion_was_trained_on_does_not_count_for_it() -> None:
    values = values_of(base_embedder=0.4, embedder=0.5, champion_embedder=0.45)
    seen = [f"q{i}" for i in range(150)]
    for metric in METRICS:  # it knows by heart what it was trained on
        values["champion_embedder"][metric] |= dict.fromkeys(seen, 1.0)
    assert verdict(values).outcome == "refuse"
    report = verdict(values, GateSettings(min_queries=50), seen_by_champion=seen)
    assert report.passed
    assert {j.found.num_queries for j in report.judgements if j.against == "champion_embedder"} == {50}
    assert {j.found.num_queries for j in report.judgements if j.against == "base_embedder"} == {QUERIES}
    assert verdict(values, seen_by_champion=seen).outcome == "too_few"
    everything = [f"q{i}" for i in range(QUERIES)]
    assert verdict(values, seen_by_champion=everything).outcome == "too_few"
    unseen = verdict(values, GateSettings(min_queries=1), seen_by_champion=everything)
    assert unseen.reasons[0] == "0 test questions are too few to tell: gate.min_queries asks for 1"


def test_nan_is_refused_whatever_the_rest_says() -> None:
    values = values_of(base_embedder=0.4, embedder=0.6)
    values["embedder"]["ndcg_at_10"]["q7"] = math.nan
    report = verdict(values)
    assert report.outcome == "refuse"
    assert report.sentence == (
        "refused: nDCG@10 of the fine-tuned embedder is not a number for 1 of 200 questions (first: q7)"
    )


def test_a_lost_guard_set_refuses() -> None:
    values = values_of(base_embedder=0.4, embedder=0.6)
    guard = GuardResult(
        name="scifact",
        kind="beir",
        metric="nDCG@10",
        items=300,
        base=0.65,
        candidate=0.60,
        champion=None,
        change=-0.05,
        interval_low=-0.07,
        interval_high=-0.03,
        max_loss=0.02,
        passed=False,
        sentence="scifact: nDCG@10 0.650 to 0.600, more than the 0.020 it may lose",
    )
    report = verdict(values, guards=[guard])
    assert report.outcome == "refuse"
    assert report.reasons == [guard.sentence]
    assert verdict(values, guards=[guard.model_copy(update={"passed": True})]).passed


def test_an_embedder_alone_has_to_beat_the_pair_that_serves() -> None:
    means = {"base_embedder": 0.4, "embedder": 0.55, "champion_embedder": 0.45, "champion_pair": 0.6}
    report = verdict(values_of(**means))
    assert report.outcome == "refuse"
    assert "not shown to be better than the champion (embedder and reranker)" in report.reasons[0]
    assert report.reasons[-1] == (
        "what serves has a reranker and the candidate has none. Where that is meant, take the champion out of service "
        "with `embed-pipeline retire`, and evaluate again"
    )
    assert verdict(values_of(**{**means, "embedder": 0.7})).passed
    # The other way round: a pair has to beat the embedder that serves alone.
    alone = {"base_embedder": 0.4, "embedder": 0.5, "reranker": 0.6, "champion_embedder": 0.5}
    assert verdict(values_of(**alone)).passed
    refused = verdict(values_of(**{**alone, "champion_embedder": 0.65}))
    assert "the fine-tuned reranker is not shown to be better than the champion's embedder" in refused.reasons[0]
