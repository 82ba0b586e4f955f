"""The trade-off as a picture: what the domain gains and what everything else loses, over the coefficient."""

from __future__ import annotations

from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from embed_pipeline.drawing import svg_of
from embed_pipeline.merging.trade_off import MergingReport

_DEV, _INK, _LINE = "#3b6fd4", "#1d2430", "#d8d6d0"
_GUARDS = ("#d9822b", "#2a9d5c", "#8e5bc0", "#c2413a", "#4a9fb0")


def trade_off_curve(report: MergingReport) -> str:
    """An SVG on a white ground: the figure on dev (left), each guard's change and the loss it may have (right).

    Vertical lines stand at the coefficient that goes on, and at the remedy where that is another.
    """
    figure = Figure(figsize=(9.0, 3.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    shares = [one.coefficient for one in report.tried]
    dev = [(one.coefficient, one.dev) for one in report.tried if one.dev is not None]
    items = "pairs" if report.tried[0].dev_metric == "spearman" else "questions"
    if dev:
        left.plot(*zip(*dev, strict=True), color=_DEV, marker="o", markersize=5)
    for share, label in _marks(report).items():
        place = left.get_xaxis_transform()
        left.text(share - 0.008, 0.03, label, transform=place, rotation=90, fontsize=8.5, color=_INK, ha="right")
    left.set_title(f"domain: {report.dev_label} ({report.dev_queries:,} {items})", fontsize=10.5, loc="left")
    for guard, colour in zip(report.guards, cycle(_GUARDS), strict=False):
        changes = [one.guards[guard.name].change for one in report.tried]
        label = f"{guard.name} ({guard.metric}, {guard.items:,})"
        right.plot(shares, changes, color=colour, marker="o", markersize=5, label=label)
        right.axhline(-guard.max_loss, color=colour, linewidth=1, dashes=(5, 3))
    right.set_title("guard sets: change, and dashed the loss allowed", fontsize=10.5, loc="left")
    right.legend(frameon=False, fontsize=9.5)
    for axes in (left, right):
        _finish(axes, report)
    return svg_of(figure, "trade-off")


def _marks(report: MergingReport) -> dict[float, str]:
    remedy = {} if report.remedy is None else {report.remedy: "best within bounds"}
    return {**remedy, report.coefficient: "goes on"}


def _finish(axes: Axes, report: MergingReport) -> None:
    for share in _marks(report):
        axes.axvline(share, color=_INK, linewidth=1, alpha=0.6, dashes=(4, 2))
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["base", "25 %", "50 %", "75 %", "fine-tuned"])
    axes.set_xlabel("share of the fine-tuned weights")
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
