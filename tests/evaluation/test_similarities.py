"""Correlations, their intervals and tests, and the gate over pairs of sentences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from embed_pipeline.evaluation.correlation import (
    Method,
    bootstrap_difference,
    pearson,
    permutation_p_value,
    spearman,
)
from embed_pipeline.evaluation.gate import judge
from embed_pipeline.evaluation.similarities import Similarities, compare_similarities
from embed_pipeline.settings import EvaluationSettings, GateSettings

SETTINGS = EvaluationSettings(bootstrap_samples=500)
GATE = GateSettings(metric="spearman", max_loss={}, min_queries=100)


@pytest.fixture(scope="module")
def noisy() -> Similarities:
    """300 pairs with tied scores; the fine-tuned embedder says them with less noise, on another scale."""
    draw = np.random.default_rng(5)
    expected = draw.integers(0, 6, size=300) / 5
    found = {
        "base_embedder": np.round(expected + draw.normal(0, 0.6, 300), 2),
        "embedder": np.round(0.2 * expected + draw.normal(0, 0.06, 300), 2),
        "same": np.round(expected + draw.normal(0, 0.6, 300), 2),
    }
    ids = tuple(f"e{i:03}" for i in range(300))
    return Similarities(ids, tuple((id, id) for id in ids), expected, found)


def test_correlations_are_scipys(noisy: Similarities) -> None:
    for found in noisy.by_system.values():
        assert spearman(found, noisy.expected) == pytest.approx(spearmanr(found, noisy.expected)[0])
        assert pearson(found, noisy.expected) == pytest.approx(pearsonr(found, noisy.expected)[0])
    assert np.isnan(pearson(np.ones(300), noisy.expected))


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_interval_and_p_value_against_the_plain_way(noisy: Similarities, method: Method) -> None:
    first, second, expected = noisy.by_system["base_embedder"], noisy.by_system["same"], noisy.expected
    correlate = spearmanr if method == "spearman" else pearsonr
    draw = np.random.default_rng(1)

    def difference(a: np.ndarray, b: np.ndarray, wanted: np.ndarray) -> float:
        return float(correlate(b, wanted)[0] - correlate(a, wanted)[0])

    rows = [draw.integers(0, 300, 300) for _ in range(600)]
    plain = np.quantile([difference(first[r], second[r], expected[r]) for r in rows], [0.025, 0.975])
    fast = bootstrap_difference(first, second, expected, samples=4_000, confidence=0.95, seed=2, method=method)
    assert fast == pytest.approx(tuple(plain), abs=0.02)

    if method == "spearman":
        ours = [rankdata(values) for values in (first, second)]
    else:
        ours = [(values - values.mean()) / values.std() for values in (first, second)]
    swaps = [draw.integers(0, 2, 300).astype(bool) for _ in range(600)]
    swapped = [difference(np.where(s, ours[1], ours[0]), np.where(s, ours[0], ours[1]), expected) for s in swaps]
    p_value = float(np.mean(np.abs(swapped) >= abs(difference(first, second, expected))))
    fast_p = permutation_p_value(first, second, expected, samples=4_000, seed=2, method=method)
    assert fast_p == pytest.approx(p_value, abs=0.07)


def test_rows_and_who_is_left_out(noisy: Similarities) -> None:
    rows = compare_similarities(noisy, ["base_embedder", "embedder"], "base_embedder", SETTINGS, 1)
    at = {(row.system, row.metric): row for row in rows}
    assert at["base_embedder", "spearman"].gain == 0
    better = at["embedder", "spearman"]
    assert better.verdict == "better"
    assert better.p_value < 0.01
    assert better.interval_low <= better.gain <= better.interval_high
    assert better.baseline_value == pytest.approx(at["base_embedder", "spearman"].value)
    fewer = compare_similarities(noisy, ["embedder"], "base_embedder", SETTINGS, 1, without=set(noisy.ids[:100]))
    assert {row.num_queries for row in fewer} == {200}
    assert fewer[0].value == pytest.approx(spearman(noisy.by_system["embedder"][100:], noisy.expected[100:]))
    assert compare_similarities(noisy, ["embedder"], "base_embedder", SETTINGS, 1, without=set(noisy.ids)) == []


def of(noisy: Similarities, **systems: str) -> Similarities:
    return Similarities(
        noisy.ids, noisy.pairs, noisy.expected, {name: noisy.by_system[of] for name, of in systems.items()}
    )


def test_the_gate_promotes_what_orders_pairs_better(noisy: Similarities) -> None:
    found = judge(of(noisy, base_embedder="base_embedder", embedder="embedder"), GATE, SETTINGS, 1)
    assert (found.outcome, len(found.judgements)) == ("promote", 1)
    assert "Spearman 0." in found.sentence
    assert "over the base embedder; to be promoted" in found.sentence
    assert found == judge(of(noisy, base_embedder="base_embedder", embedder="embedder"), GATE, SETTINGS, 1)


def test_the_gate_refuses_what_only_chance_speaks_for_and_too_few_pairs(noisy: Similarities) -> None:
    found = judge(of(noisy, base_embedder="base_embedder", embedder="same"), GATE, SETTINGS, 1)
    assert found.outcome == "refuse"
    against = {"base_embedder": "base_embedder", "champion_embedder": "embedder", "embedder": "embedder"}
    beaten = judge(of(noisy, **against), GATE, SETTINGS, 1)
    assert beaten.outcome == "refuse"
    assert "champion's embedder" in beaten.reasons[0]
    seen = judge(of(noisy, **against), GATE, SETTINGS, 1, seen_by_champion=noisy.ids[:250])
    assert seen.outcome == "too_few"
    assert "50 test pairs are too few" in seen.sentence
    assert judge(of(noisy, **against), GATE, SETTINGS, 1, seen_by_champion=noisy.ids).outcome == "too_few"
