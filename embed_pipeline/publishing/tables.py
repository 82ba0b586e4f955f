"""Words and cells that cards and tables of exports share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def metric_name(metric: str) -> str:
    """As people write it: nDCG@10."""
    from embed_pipeline.evaluation.verdict import METRIC_NAMES

    return METRIC_NAMES.get(metric, metric.replace("_at_", "@").replace("_", " ").capitalize())


def markdown_rows(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells are escaped so that a user's text cannot break it."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
