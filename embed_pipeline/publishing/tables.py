"""Words that cards and tables of exports share."""

from __future__ import annotations


def metric_name(metric: str) -> str:
    """As people write it: nDCG@10."""
    from embed_pipeline.evaluation.verdict import METRIC_NAMES

    return METRIC_NAMES.get(metric, metric.replace("_at_", "@").replace("_", " ").capitalize())
