"""Which coefficient goes on: by dev among those that lose nothing, and never by what nobody measured."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed_pipeline.merging.plot import trade_off_curve
from embed_pipeline.merging.trade_off import (
    GuardFigure,
    GuardInfo,
    MergingReport,
    Tried,
    decide,
    trade_off_table,
)
from embed_pipeline.settings import ForgettingSettings

GUARDS = [
    GuardInfo(name="general", metric="nDCG@10", items=150, max_loss=0.02),
    GuardInfo(name="alike", metric="Spearman", items=2000, max_loss=0.05),
]
OFFER, AUTO = ForgettingSettings(merging="offer"), ForgettingSettings(merging="auto")


def tried(coefficient: float, dev: float | None, general: float, alike: float = 0.0) -> Tried:
    """The guards' changes against a base of 0.6."""
    figures = {
        guard.name: GuardFigure(value=0.6 + change, change=change, lost=not change >= -guard.max_loss)
        for guard, change in zip(GUARDS, (general, alike), strict=True)
    }
    return Tried(coefficient=coefficient, dev=dev, guards=figures)


BASE = tried(0.0, 0.40, 0.0)
SWEEP = [BASE, tried(0.2, 0.43, 0.01), tried(0.4, 0.46, -0.01), tried(0.6, 0.47, -0.03), tried(1.0, 0.48, -0.1)]


def test_what_loses_nothing_goes_on_as_it_is() -> None:
    report = decide([tried(1.0, 0.48, -0.02, -0.05), BASE], GUARDS, AUTO, 300)
    assert (report.outcome, report.coefficient, report.remedy) == ("kept", 1.0, None)
    assert report.sentence == (
        "Nothing was lost beyond what may be, and the fine-tuned embedder goes on as it is "
        "(general nDCG@10 0.600 → 0.580; alike Spearman 0.600 → 0.550)."
    )


def test_offer_names_the_remedy_and_what_it_would_cost_but_takes_it_not() -> None:
    report = decide(SWEEP, GUARDS, OFFER, 300)
    assert (report.outcome, report.coefficient, report.remedy) == ("offered", 1.0, 0.4)
    assert report.taken.dev == 0.48
    assert "general nDCG@10 0.600 → 0.500, but may lose 0.020" in report.sentence
    assert "alike" not in report.sentence  # it lost nothing
    assert "40\N{NO-BREAK SPACE}% of the fine-tuned weights and 60\N{NO-BREAK SPACE}% of the base's" in report.sentence
    assert "(dev nDCG@10 0.460, fine-tuned 0.480, base 0.400)" in report.sentence
    assert "with `forgetting.merging: auto` the merged one would" in report.sentence


def test_auto_takes_the_best_on_dev_of_those_that_lose_nothing() -> None:
    report = decide(SWEEP, GUARDS, AUTO, 300)
    assert (report.outcome, report.coefficient, report.remedy) == ("merged", 0.4, 0.4)
    peaked = [BASE, tried(0.2, 0.47, 0.0), tried(0.4, 0.46, 0.0), *SWEEP[3:]]
    assert decide(peaked, GUARDS, AUTO, 300).coefficient == 0.2
    equal = [BASE, tried(0.2, 0.46, 0.0), tried(0.4, 0.46, 0.0), *SWEEP[3:]]
    assert decide(equal, GUARDS, AUTO, 300).coefficient == 0.4


def test_every_guard_has_to_be_kept() -> None:
    second_loses = [BASE, tried(0.2, 0.43, 0.0, -0.04), tried(0.4, 0.46, 0.0, -0.06), *SWEEP[3:]]
    assert decide(second_loses, GUARDS, AUTO, 300).coefficient == 0.2


def test_without_a_remedy_auto_takes_the_nearest_and_says_so() -> None:
    hopeless = [BASE, tried(0.2, 0.43, -0.03), tried(0.4, 0.46, -0.04, -0.06), tried(1.0, 0.48, -0.3)]
    report = decide(hopeless, GUARDS, AUTO, 300)
    assert (report.outcome, report.coefficient, report.remedy) == ("merged", 0.2, None)
    assert "none keeps within bounds; 20\N{NO-BREAK SPACE}% comes nearest and goes on" in report.sentence
    offered = decide(hopeless, GUARDS, OFFER, 300)
    assert (offered.outcome, offered.coefficient) == ("offered", 1.0)
    assert offered.sentence.endswith(
        "A lower learning_rate, fewer epochs or smaller coefficients may help. The fine-tuned embedder goes on as it "
        "is, and the gate judges it."
    )


def test_without_dev_questions_more_of_what_was_learned_is_better() -> None:
    report = decide([one.model_copy(update={"dev": None}) for one in SWEEP], GUARDS, AUTO, 0)
    assert report.coefficient == 0.4
    assert "dev" not in report.sentence
    ElementTree.fromstring(trade_off_curve(report))


def test_a_figure_that_is_no_number_is_neither_kept_nor_best() -> None:
    broken = [
        BASE,
        tried(0.2, 0.43, 0.0),
        tried(0.4, math.nan, 0.0),
        tried(0.6, 0.47, math.nan),
        tried(1.0, 0.48, math.nan),
    ]
    report = decide(broken, GUARDS, AUTO, 300)
    assert report.coefficient == 0.2
    read = MergingReport.model_validate_json(report.model_dump_json())
    assert math.isnan(read.tried[3].guards["general"].value)
    assert MergingReport.model_validate(report.model_dump(mode="json")).taken == report.taken


CHANGES = st.one_of(st.floats(-0.2, 0.1), st.just(math.nan))
DEV = st.one_of(st.none(), st.floats(0, 1), st.just(math.nan))


SHARES = st.sampled_from([round(0.05 * i, 2) for i in range(1, 20)])
MIDDLE = st.lists(
    st.builds(tried, SHARES, DEV, CHANGES, CHANGES), min_size=1, max_size=6, unique_by=lambda one: one.coefficient
)
LAST = st.builds(tried, st.just(1.0), DEV, CHANGES, CHANGES)


@given(middle=MIDDLE, last=LAST, settings=st.sampled_from([OFFER, AUTO]))
def test_whatever_was_measured_the_decision_keeps_its_rules(
    middle: list[Tried], last: Tried, settings: ForgettingSettings
) -> None:
    report = decide([last, *middle, BASE], GUARDS, settings, 100)
    assert [one.coefficient for one in report.tried] == sorted(one.coefficient for one in report.tried)
    if last.allowed:
        assert (report.outcome, report.coefficient) == ("kept", 1.0)
        return
    allowed = {one.coefficient: one for one in middle if one.allowed}
    assert (report.remedy is None) == (not allowed)
    if report.remedy is not None:
        best = allowed[report.remedy].dev
        others = [one.dev for one in allowed.values()]
        known = [value for value in others if value is not None and not math.isnan(value)]
        assert best == max(known) if known else best is None or math.isnan(best)
    if settings is OFFER:
        assert (report.outcome, report.coefficient) == ("offered", 1.0)
        return
    assert report.outcome == "merged"
    assert 0 < report.coefficient < 1
    assert not allowed or report.coefficient == report.remedy


def test_the_table_marks_what_goes_on_and_what_is_lost() -> None:
    header, rows = trade_off_table(decide(SWEEP, GUARDS, OFFER, 300))
    assert header == ["fine-tuned weights", "dev nDCG@10", "general nDCG@10", "alike Spearman", ""]
    assert [row[-1] for row in rows] == [
        "",
        "",
        "best on dev within bounds",
        "loses too much",
        "loses too much, goes on",
    ]
    assert rows[0][0] == "0\N{NO-BREAK SPACE}% (base)"
    assert rows[2][1:3] == ["0.4600", "0.5900 (\N{MINUS SIGN}0.010)"]


@pytest.mark.parametrize("settings", [OFFER, AUTO])
def test_the_curve_is_a_whole_picture_of_its_own(settings: ForgettingSettings) -> None:
    svg = trade_off_curve(decide(SWEEP, GUARDS, settings, 300))
    ElementTree.fromstring(svg)
    for text in ("dev nDCG@10 (300 questions)", "general (nDCG@10, 150)", "alike (Spearman, 2,000)", "fine-tuned"):
        assert text in svg
    assert svg == trade_off_curve(decide(SWEEP, GUARDS, settings, 300))
