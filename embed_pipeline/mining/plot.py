"""The picture of a mining: how the similarities of positives, negatives and refused candidates lie."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from embed_pipeline.drawing import svg_of
from embed_pipeline.mining.report import ScoreSummary

_COLOURS = {"positive": "#2a9d5c", "negative": "#3b6fd4", "refused": "#d1495b"}


def score_histogram(scores: ScoreSummary) -> str:
    """An SVG on a white ground: each kind's share of pairs over similarity, with its count in the legend."""
    figure = Figure(figsize=(7.0, 2.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    edges = np.array(scores.edges)
    for kind, counts in scores.counts.items():
        total = sum(counts)
        if total:
            share = np.array(counts) / total
            label = f"{kind} ({total:,})"
            axes.stairs(share, edges, fill=True, alpha=0.25, color=_COLOURS[kind])
            axes.stairs(share, edges, color=_COLOURS[kind], linewidth=1.4, label=label)
    axes.set_xlabel("cosine similarity to the query")
    axes.set_ylabel("share of pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return svg_of(figure, "mining")
