"""The report's plots: SVG in the page's own colours and font, so that they follow its light and dark theme.

Shown by themselves, as in the Dagster UI, they are on white.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from embed_pipeline.drawing import svg_of
from embed_pipeline.evaluation.comparison import BASE_EMBEDDER, BM25, EMBEDDER, RERANKER, Comparison
from embed_pipeline.evaluation.history import HistoryPoint
from embed_pipeline.evaluation.verdict import METRIC_NAMES, SYSTEM_NAMES
from embed_pipeline.mining.report import ScoreSummary

# matplotlib must be given colours; these stand for the page's CSS variables and are replaced in the drawn text. The
# second value is for a plot shown by itself, where there is no page.
_VARIABLES = {
    "#000001": "var(--ink, #1d2430)",
    "#000002": "var(--muted, #667085)",
    "#000003": "var(--line, #e4e2dc)",
    "#000004": "var(--better, #17805a)",
    "#000005": "var(--worse, #c2413a)",
    "#000006": "var(--accent, #2f5fd0)",
    "#000007": "var(--other, #d9822b)",
    "#000008": "var(--card, #ffffff)",
}
_MOST_DOTS = 1_200  # of a plot, all of them evenly spread over the pairs: the report stays a page
_INK, _MUTED, _LINE, _BETTER, _WORSE, _ACCENT, _OTHER, _CARD = _VARIABLES
_OF_VERDICT = {"better": _BETTER, "worse": _WORSE, "undecided": _MUTED}
_STYLE: Any = {
    "figure.facecolor": _CARD,
    "savefig.facecolor": "auto",
    "axes.facecolor": "none",
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10.5,
    "legend.frameon": False,
}


def gains_plot(rows: Sequence[Comparison], name: str) -> str:
    """One line a metric: the gain as a dot, its interval as a bar, coloured by what the interval says."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.34 * len(rows) + 0.75, width=5.2)
        places = np.arange(len(rows))[::-1]
        axes.axvline(0, color=_MUTED, linewidth=1, dashes=(3, 3))
        for place, row in zip(places, rows, strict=True):
            colour = _OF_VERDICT[row.verdict]
            axes.plot(
                [row.interval_low, row.interval_high],
                [place, place],
                color=colour,
                linewidth=5,
                alpha=0.35,
                solid_capstyle="round",
            )
            axes.plot([row.gain], [place], "o", color=colour, markersize=7)
        axes.set_yticks(places, [METRIC_NAMES[row.metric] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda value, _: _signed(value))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.margins(x=0.08)
        return _themed(figure, name)


def scores_plot(scores: ScoreSummary, limits: tuple[float, float], name: str) -> str:
    """Similarity of the positives against that of each query's best other passage."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.5, width=5.2)
        edges = np.array(scores.edges)
        for (kind, counts), colour in zip(scores.counts.items(), (_ACCENT, _OTHER), strict=True):
            share = np.array(counts) / max(1, sum(counts)) / np.diff(edges)
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.28, linewidth=0)
            axes.stairs(share, edges, color=colour, linewidth=1.5, label=kind)
        axes.set_xlim(*limits)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("cosine similarity to the query")
        axes.legend(loc="upper left", fontsize=9.5)
        return _themed(figure, name)


def similarities_plot(expected: np.ndarray, found: np.ndarray, name: str) -> str:
    """(n,) scores that people gave and cosines -> a dot a pair, and the mean cosine along the scores as a line."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.0, width=5.2)
        shown = np.linspace(0, len(expected) - 1, min(len(expected), _MOST_DOTS)).astype(int)
        axes.plot(expected[shown], found[shown], "o", color=_ACCENT, markersize=3, alpha=0.25, markeredgewidth=0)
        edges = np.linspace(0.0, 1.0, 11)
        tenth = np.clip(np.digitize(expected, edges) - 1, 0, 9)
        means = [(expected[tenth == i].mean(), found[tenth == i].mean()) for i in range(10) if (tenth == i).any()]
        axes.plot(*zip(*means, strict=True), "-o", color=_OTHER, linewidth=2, markersize=4.5)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("how alike people found them")
        axes.set_ylabel("cosine similarity")
        axes.grid(color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        return _themed(figure, name)


def changes_plot(changes: np.ndarray, name: str) -> str:
    """(n,) per-query change of nDCG@10 -> how many queries changed by how much; the unchanged are in the title."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.6, width=11.0)
        edges = np.linspace(-1.0, 1.0, 41)
        moved = changes[changes != 0]
        counts = np.histogram(np.clip(moved, -1, 1), edges)[0]
        colours = [_WORSE if right <= 0 else _BETTER for right in edges[1:]]
        axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.86, align="edge", color=colours, alpha=0.8)
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.set_xlim(-1.02, 1.02)
        axes.set_xticks(np.linspace(-1.0, 1.0, 5))
        axes.set_xlabel(f"change of nDCG@10 (unchanged: {len(changes) - len(moved):,} of {len(changes):,} questions)")
        axes.set_ylabel("questions")
        axes.grid(axis="y", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: _signed(value))
        return _themed(figure, name)


def history_plot(points: Sequence[HistoryPoint], name: str) -> str:
    """The primary metric of every evaluation in order; rings mark candidates that became champion.

    A dashed line stands where the test set changed: values on its two sides compare only roughly.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.1, width=11.0)
        places = np.arange(len(points))
        metric = points[-1].metric
        for system, colour in ((BM25, _OTHER), (BASE_EMBEDDER, _MUTED), (EMBEDDER, _ACCENT), (RERANKER, _BETTER)):
            values = np.array([p.values.get(system, np.nan) if p.metric == metric else np.nan for p in points])
            if not np.isfinite(values).any():
                continue
            axes.plot(places, values, "-o", color=colour, markersize=5.5, linewidth=1.6, label=SYSTEM_NAMES[system])
            crowned = [i for i, point in enumerate(points) if point.served and system in (EMBEDDER, RERANKER)]
            axes.plot(places[crowned], values[crowned], "o", color="none", markeredgecolor=_INK, markersize=11, mew=1.4)
        for place in places[1:]:
            if points[place].test_set != points[place - 1].test_set:
                axes.axvline(place - 0.5, color=_LINE, linewidth=1, dashes=(4, 3))
        labels = [point.at[5:16].replace("T", " ") for point in points]
        shown = places[:: max(1, len(points) // 10)]
        axes.set_xticks(shown, [labels[place] for place in shown])
        axes.set_xlim(-0.6, len(points) - 0.4)
        axes.set_ylabel(METRIC_NAMES[metric])
        axes.grid(axis="y", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(y=0.15)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9.5)
        return _themed(figure, name)


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if abs(value) > 1e-9 else "0"


def _figure(height: float, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _themed(figure: Figure, name: str) -> str:
    svg = svg_of(figure, name)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans, sans-serif)", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)
