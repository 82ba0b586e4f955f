"""Domain against everything else: what each coefficient keeps of both, and which one is the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from embed_pipeline.evaluation.guard_sets import METRIC_LABELS, GuardScore, GuardSet, MaybeNaN, loses_too_much
from embed_pipeline.evaluation.verdict import METRIC_NAMES, signed
from embed_pipeline.settings import ForgettingSettings

# What stands beside the model; `merge` says what each holds.
DIGEST_FILE = "weights.sha256"
MERGING_FILE = "merging.json"
CURVE_FILE = "trade_off.svg"

Outcome = Literal["kept", "offered", "merged"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class GuardInfo(_Part):
    name: str
    metric: str
    items: int  # of the choosing half
    max_loss: float


class GuardFigure(_Part):
    """One guard set at one coefficient, measured on its choosing half."""

    value: MaybeNaN
    change: MaybeNaN  # against the base
    lost: bool  # more than it may


class Tried(_Part):
    """One coefficient: the share of the fine-tuned weights; 0 is the base, 1 the fine-tuned model."""

    coefficient: float
    dev: MaybeNaN | None  # by `dev_metric`; None: no dev split
    dev_metric: str = "ndcg_at_10"
    guards: dict[str, GuardFigure]

    @property
    def allowed(self) -> bool:
        return not any(figure.lost for figure in self.guards.values())

    @property
    def metrics(self) -> dict[str, float]:
        """For MLflow."""
        dev = {} if self.dev is None else {f"dev_{self.dev_metric}": self.dev}
        guards = {f"guard/{name}": figure.value for name, figure in self.guards.items()}
        return {"coefficient": self.coefficient, **dev, **guards}


class MergingReport(_Part):
    """JSON-serialisable: what `merging.json` holds."""

    outcome: Outcome  # kept: nothing was lost; offered: something was, and goes on as it is; merged: by `coefficient`
    coefficient: float  # of the model that goes on
    remedy: float | None  # the coefficient with the best dev figure among those that lose nothing, 0 and 1 aside
    sentence: str
    dev_queries: int
    guards: list[GuardInfo]
    tried: list[Tried]  # by coefficient

    @property
    def dev_label(self) -> str:
        """dev nDCG@10"""
        return f"dev {METRIC_NAMES[self.tried[0].dev_metric]}"

    @property
    def taken(self) -> Tried:
        """What goes on."""
        return next(one for one in self.tried if one.coefficient == self.coefficient)


def figures_of(
    coefficient: float,
    dev: float | None,
    guards: Sequence[GuardSet],
    scores: Mapping[str, GuardScore],
    base: Mapping[str, GuardScore],
    dev_metric: str = "ndcg_at_10",
) -> Tried:
    """One line of the trade-off; `scores` and `base` are those of the choosing halves, by the guard's name."""
    figures = {}
    for guard in guards:
        own, of_base = scores[guard.settings.name], base[guard.settings.name]
        figures[guard.settings.name] = GuardFigure(
            value=own.value, change=own.value - of_base.value, lost=loses_too_much(guard.settings, of_base, own)
        )
    return Tried(coefficient=coefficient, dev=dev, guards=figures, dev_metric=dev_metric)


def info_of(guard: GuardSet, score: GuardScore) -> GuardInfo:
    settings = guard.settings
    return GuardInfo(
        name=settings.name, metric=METRIC_LABELS[settings.kind], items=score.items, max_loss=settings.max_loss
    )


def decide(
    tried: Sequence[Tried], guards: Sequence[GuardInfo], settings: ForgettingSettings, dev_queries: int
) -> MergingReport:
    """Which coefficient goes on, and why, in a sentence.

    `tried` holds 0 and 1, and the others where 1 loses too much. `auto` takes the remedy; where there is none, the
    coefficient that is nearest to what is allowed, which the gate then judges by the other halves.
    """
    tried = sorted(tried, key=lambda one: one.coefficient)
    base, fine_tuned = tried[0], tried[-1]
    told = {"dev_queries": dev_queries, "guards": list(guards), "tried": tried}
    if fine_tuned.allowed:
        kept = "; ".join(_guard_sentence(guard, fine_tuned.guards[guard.name]) for guard in guards)
        sentence = f"Nothing was lost beyond what may be, and the fine-tuned embedder goes on as it is ({kept})."
        return MergingReport(outcome="kept", coefficient=1.0, remedy=None, sentence=sentence, **told)
    lost = "; ".join(
        f"{_guard_sentence(guard, fine_tuned.guards[guard.name])}, but may lose {guard.max_loss:.3f}"
        for guard in guards
        if fine_tuned.guards[guard.name].lost
    )
    between = [one for one in tried if 0.0 < one.coefficient < 1.0]
    remedy = _best([one for one in between if one.allowed])
    taken = (remedy or _nearest(between, guards)) if settings.merging == "auto" else fine_tuned
    words = _of_remedy(remedy, base, fine_tuned, between, taken)
    return MergingReport(
        outcome="offered" if taken is fine_tuned else "merged",
        coefficient=taken.coefficient,
        remedy=remedy.coefficient if remedy else None,
        sentence=f"Fine-tuning lost too much: {lost}. {words}",
        **told,
    )


def trade_off_table(report: MergingReport) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one coefficient a row, what goes on and what would be the remedy marked."""
    header = ["fine-tuned weights", report.dev_label, *(f"{guard.name} {guard.metric}" for guard in report.guards), ""]
    rows = []
    for one in report.tried:
        notes = [] if one.allowed else ["loses too much"]
        if one.coefficient == report.remedy:
            notes.append("best on dev within bounds")
        if one.coefficient == report.coefficient:
            notes.append("goes on")
        title = {0.0: " (base)", 1.0: " (fine-tuned)"}.get(one.coefficient, "")
        figures = [one.guards[guard.name] for guard in report.guards]
        rows.append(
            [
                _percent(one.coefficient) + title,
                "-" if one.dev is None else f"{one.dev:.4f}",
                *(f"{figure.value:.4f} ({signed(figure.change)})" for figure in figures),
                ", ".join(notes),
            ]
        )
    return header, rows


def _best(among: Sequence[Tried]) -> Tried | None:
    """By the dev figure; where there is none or it is equal, the one with more of what was learned."""
    return max(among, key=lambda one: (_number(one.dev), one.coefficient), default=None)


def _nearest(among: Sequence[Tried], guards: Sequence[GuardInfo]) -> Tried:
    """The one whose worst guard is beyond its allowance by the least; a figure that is no number is farthest."""

    def excess(one: Tried) -> float:
        over = [-one.guards[guard.name].change - guard.max_loss for guard in guards]
        return max(math.inf if math.isnan(by) else by for by in over)

    return min(among, key=lambda one: (excess(one), -_number(one.dev)))


def _of_remedy(remedy: Tried | None, base: Tried, fine_tuned: Tried, between: Sequence[Tried], taken: Tried) -> str:
    if remedy is None:
        shares = ", ".join(_percent(one.coefficient) for one in between)
        none = f"Of the shares of fine-tuned weights that were tried ({shares}) none keeps within bounds"
        mend = "A lower learning_rate, fewer epochs or smaller coefficients may help"
        if taken is fine_tuned:
            return f"{none}. {mend}. The fine-tuned embedder goes on as it is, and the gate judges it."
        return f"{none}; {_percent(taken.coefficient)} comes nearest and goes on, and the gate judges it. {mend}."
    merged = (
        f"{_percent(remedy.coefficient)} of the fine-tuned weights and {_percent(1 - remedy.coefficient)} of the base's"
    )
    by = f"dev {METRIC_NAMES[remedy.dev_metric]} "
    figures = f"{_dev(remedy, by)}{_dev(fine_tuned, ', fine-tuned ')}{_dev(base, ', base ')}"
    if taken is fine_tuned:
        return (
            f"Merged as {merged} it would keep within bounds{f' ({figures})' if figures else ''}. The fine-tuned "
            "embedder goes on as it is, and the gate judges it; with `forgetting.merging: auto` the merged one would."
        )
    return f"It goes on merged, as {merged}, which keeps within bounds{f' ({figures})' if figures else ''}."


def _guard_sentence(guard: GuardInfo, figure: GuardFigure) -> str:
    return f"{guard.name} {guard.metric} {figure.value - figure.change:.3f} → {figure.value:.3f}"


def _dev(one: Tried, before: str) -> str:
    return "" if one.dev is None else f"{before}{one.dev:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:g}\N{NO-BREAK SPACE}%"


def _number(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value
