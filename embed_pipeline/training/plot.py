"""The picture of a training: its loss, and what the dev set said."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from embed_pipeline.drawing import svg_of

_LOSS, _DEV = "#3b6fd4", "#2a9d5c"


def training_curve(log_file: Path) -> str:
    """An SVG of loss (left) and dev nDCG@10 (right) over optimizer steps, from a `training_log.jsonl`."""
    events = [json.loads(line) for line in log_file.read_text().splitlines()]
    figure = Figure(figsize=(7.0, 2.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    losses = [(event["step"], event["loss"]) for event in events if "loss" in event]
    axes.plot(*zip(*losses, strict=True), color=_LOSS) if losses else None
    axes.set_xlabel("step")
    axes.set_ylabel("loss", color=_LOSS)
    axes.spines[["top", "right"]].set_visible(False)
    measured = [(event["step"], event["dev_ndcg_at_10"]) for event in events if "dev_ndcg_at_10" in event]
    if measured:
        right = axes.twinx()
        right.plot(*zip(*measured, strict=True), color=_DEV, marker="o", markersize=4)
        right.set_ylabel("dev nDCG@10", color=_DEV)
        right.spines[["top", "left"]].set_visible(False)
    return svg_of(figure, "training")
