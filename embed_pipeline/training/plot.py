"""The picture of a training: its loss, and what dev said."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from embed_pipeline.drawing import svg_of
from embed_pipeline.model_files import SUMMARY_FILE, TRAINING_LOG_FILE

_LOSS, _DEV = "#3b6fd4", "#2a9d5c"


def training_curve(version: Path) -> str:
    """An SVG of loss (left) and the dev figure (right) over optimizer steps, of what a training left in `version`.

    A ring marks the weights that were kept.
    """
    events = [json.loads(line) for line in (version / TRAINING_LOG_FILE).read_text().splitlines()]
    summary = json.loads((version / SUMMARY_FILE).read_text())
    metric, kept = summary["dev_metric"], summary["kept_step"]
    figure = Figure(figsize=(7.0, 2.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    losses = [(event["step"], event["loss"]) for event in events if "loss" in event]
    axes.plot(*zip(*losses, strict=True), color=_LOSS) if losses else None
    axes.set_xlabel("step")
    axes.set_ylabel("loss", color=_LOSS)
    axes.spines[["top", "right"]].set_visible(False)
    measured = [(event["step"], event[f"dev_{metric}"]) for event in events if f"dev_{metric}" in event]
    if measured:
        right = axes.twinx()
        right.plot(*zip(*measured, strict=True), color=_DEV, marker="o", markersize=4)
        of_kept = [point for point in measured if point[0] == kept]
        right.plot(*zip(*of_kept, strict=True), "o", color=_DEV, markersize=10, fillstyle="none") if of_kept else None
        right.set_ylabel(f"dev {metric} (ring: kept)", color=_DEV)
        right.spines[["top", "left"]].set_visible(False)
    return svg_of(figure, "training")
