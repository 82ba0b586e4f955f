"""Bootstrap and permutation test against scipy's, and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from embed_pipeline.evaluation import significance
from embed_pipeline.evaluation.significance import paired_bootstrap, paired_permutation


def test_agrees_with_scipy() -> None:
    draw = np.random.default_rng(0)
    differences = np.stack([draw.normal(0.03, 0.2, 300), draw.exponential(0.1, 300) - 0.08], axis=1)
    ours = paired_bootstrap(differences, samples=20_000, confidence=0.95, seed=1)
    np.testing.assert_allclose(ours.mean, differences.mean(axis=0))
    for column in range(2):
        theirs = stats.bootstrap(
            (differences[:, column],), np.mean, n_resamples=20_000, method="percentile", rng=2
        ).confidence_interval
        assert ours.low[column] == pytest.approx(theirs.low, abs=6e-4)
        assert ours.high[column] == pytest.approx(theirs.high, abs=6e-4)


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    # 400 experiments of 80 queries whose true mean gain is 0.05, as 400 metrics of one call.
    found = paired_bootstrap(draw.normal(0.05, 0.3, (80, 400)), samples=2_000, confidence=0.9, seed=0)
    covered = np.mean((found.low <= 0.05) & (found.high >= 0.05))
    assert covered == pytest.approx(0.9, abs=0.045)


def test_every_query_is_drawn_in_every_sample() -> None:
    """Of three queries each is drawn three times in 1 of 27 samples, so it alone is an end of a 95 % interval."""
    for query in range(3):
        differences = np.zeros((3, 2))
        differences[query] = (1.0, -1.0)
        found = paired_bootstrap(differences, samples=4_000, confidence=0.95, seed=0)
        assert (found.low[0], found.high[0], found.low[1], found.high[1]) == (0.0, 1.0, -1.0, 0.0)
    for samples in (1, 2, 5):
        found = paired_bootstrap(np.full((4, 1), 0.25), samples=samples, confidence=0.95, seed=0)
        assert found.low == found.high == found.mean == 0.25


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_a_metric_is_tested_as_if_it_were_alone_and_whatever_its_unit(scale: float) -> None:
    differences = np.random.default_rng(2).normal(0.05, 0.3, (60, 2))
    both = paired_permutation(differences * [scale, 1.0], samples=500, seed=4)
    assert both[0] == paired_permutation(differences[:, :1], samples=500, seed=4)[0]
    assert both[1] == paired_permutation(differences[:, 1:], samples=500, seed=4)[0]
    assert both[0] < 1


def test_seeded_and_independent_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).normal(size=(50, 3))
    once = paired_bootstrap(differences, samples=1_000, confidence=0.95, seed=3)
    again = paired_bootstrap(differences, samples=1_000, confidence=0.95, seed=3)
    np.testing.assert_array_equal(once.low, again.low)
    other = paired_bootstrap(differences, samples=1_000, confidence=0.95, seed=4)
    assert not np.array_equal(once.low, other.low)
    monkeypatch.setattr(significance, "_DRAWS_PER_STEP", 700)
    np.testing.assert_allclose(
        once.low, paired_bootstrap(differences, samples=1_000, confidence=0.95, seed=3).low, atol=1e-12
    )


def test_permutation_agrees_with_scipy() -> None:
    draw = np.random.default_rng(0)
    differences = np.stack(
        [draw.normal(0.02, 0.2, 150), draw.normal(0.0, 0.2, 150), draw.normal(0.06, 0.2, 150)], axis=1
    )
    ours = paired_permutation(differences, samples=20_000, seed=1)
    for column in range(3):
        theirs = stats.permutation_test(
            (differences[:, column],), np.mean, permutation_type="samples", n_resamples=20_000, rng=2
        )
        assert ours[column] == pytest.approx(theirs.pvalue, abs=0.012)


def test_permutation_of_few_queries_is_the_exact_test() -> None:
    """Four queries that all got better by the same: 2 of 16 sign patterns are as extreme."""
    p = paired_permutation(np.full((4, 1), 0.1), samples=40_000, seed=0)
    assert p[0] == pytest.approx(2 / 16, abs=0.005)
    assert paired_permutation(np.zeros((4, 1)), samples=100, seed=0)[0] == 1.0


def test_permutation_is_right_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    p = paired_permutation(draw.normal(0.0, 0.3, (80, 400)), samples=2_000, seed=0)
    assert np.mean(p <= 0.1) == pytest.approx(0.1, abs=0.045)


def test_permutation_does_not_depend_on_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(0).normal(0.05, 1, size=(50, 3))
    once = paired_permutation(differences, samples=1_000, seed=3)
    monkeypatch.setattr(significance, "_DRAWS_PER_STEP", 700)  # 71 steps of 14 draws, and one of 6
    np.testing.assert_array_equal(once, paired_permutation(differences, samples=1_000, seed=3))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"found \(0, 3\)"):
        paired_bootstrap(np.empty((0, 3)), samples=100, confidence=0.95, seed=0)
    with pytest.raises(ValueError, match=r"^a difference between two systems is not a finite number$"):
        paired_bootstrap(np.array([[np.nan]]), samples=100, confidence=0.95, seed=0)
