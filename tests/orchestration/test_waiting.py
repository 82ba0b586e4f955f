"""A person sees on a materialization what MLflow was not told."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from embed_pipeline.artifacts import Made, PipelineStore, Recipe, RunIds
from embed_pipeline.orchestration.reporting import materialized
from embed_pipeline.tracking.journal import Journal


def test_a_materialization_tells_what_waits(tmp_path: Path) -> None:
    store = PipelineStore(tmp_path, "support")
    recipe = Recipe(inputs={}, settings={}, seed=0, code_version="1")
    produced = store.produce("embedder", recipe, [], lambda out: Made({}, RunIds()), content=None)
    context = dg.build_asset_context()
    assert "mlflow_waiting" not in (materialized(context, produced, {}).metadata or {})

    Journal.new(store.folder, "reranker", {})
    journal = Journal.new(store.folder, "embedder", {})
    journal.append({"metrics": {"loss": 0.5, "epoch": 1.0}, "step": 1, "at": 1})

    told = (materialized(context, produced, {}).metadata or {})["mlflow_waiting"]
    assert told == (
        f"2 metrics and 1 other lines of embedder wait in {journal.path}. The next run of the pipeline sends them, or "
        "`embed-pipeline replay-metrics support`"
    )
