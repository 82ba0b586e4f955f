"""A pipeline with real raw and cleaned pairs, and models of a few bytes in its store: enough to ask what is due."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed_pipeline.artifacts import Artifact, Made, PipelineStore, RunIds
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline, make_cleaned_pairs, make_raw_pairs

SETTINGS: dict[str, Any] = {
    "name": "small",
    "source": {"path": "raw/*.parquet"},
    "embedder": {"base_model": {"path": "model"}},
    "reranker": {"base_model": {"path": "model"}},
}


def pipeline_in(folder: Path, **changed: Any) -> Pipeline:
    """A pipeline whose raw files lie in `folder/raw`, with a store beside it; writes 40 raw rows if there are none."""
    (folder / "raw").mkdir(exist_ok=True)
    if not list((folder / "raw").iterdir()):
        write_rows(folder / "raw" / "pairs.parquet", range(40))
    settings = PipelineSettings.model_validate({**SETTINGS, **changed})
    return Pipeline(settings, folder, PipelineStore(folder / "store", settings.name))


def write_rows(path: Path, numbers: range, at: int | None = None) -> None:
    """A raw row for each number; `at` sets the time of the last change, in seconds."""
    rows = [
        {"query": f"where is item number {n}", "passage": f"item number {n} lies in drawer {n * 7}"} for n in numbers
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    if at is not None:
        os.utime(path, (at, at))


def ingest(pipeline: Pipeline) -> Artifact:
    make_raw_pairs(pipeline)
    return make_cleaned_pairs(pipeline).artifact


def make_up(pipeline: Pipeline, asset: str, *inputs: str, **report: Any) -> Artifact:
    """The version of `asset` that would be made from the current versions of `inputs`."""
    artifacts = [pipeline.store.current(name) for name in inputs]

    def make(out: Path) -> Made:
        (out / "weights").write_text(asset)
        return Made(report, RunIds())

    recipe = pipeline.recipe(asset, artifacts, {}, {})
    return pipeline.store.produce(asset, recipe, artifacts, make, content=None).artifact


def make_up_models(pipeline: Pipeline, outcome: str = "refuse") -> None:
    """Everything after the cleaned pairs; `outcome` is what the gate said of it."""
    make_up(pipeline, "hard_negatives", "cleaned_pairs")
    make_up(pipeline, "embedder", "cleaned_pairs", "hard_negatives")
    final = pipeline.settings.final_embedder
    if final == "merged_embedder":
        make_up(pipeline, "merged_embedder", "cleaned_pairs", "embedder")
    make_up(pipeline, "reranker", "cleaned_pairs", final)
    make_up(pipeline, "evaluation", "cleaned_pairs", final, "reranker", gate={"outcome": outcome})
