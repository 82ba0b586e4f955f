"""A person sees on a materialization that other versions of the libraries made what it uses again."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import dagster as dg
import pytest

from embed_pipeline.artifacts import Made, PipelineStore, Produced, Recipe, RunIds
from embed_pipeline.orchestration.reporting import materialized


def test_a_materialization_tells_which_libraries_are_others_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PipelineStore(tmp_path, "support")
    context, installed = dg.build_asset_context(), importlib.metadata.version
    made_with = installed("sentence-transformers")

    def told(asset: str) -> object:
        recipe = Recipe(inputs={}, settings={}, seed=0, code_version="1")
        produced: Produced = store.produce(asset, recipe, [], lambda out: Made({}, RunIds()), content=None)
        return (materialized(context, produced, {}).metadata or {}).get("library_upgrades")

    assert (told("embedder"), told("raw_pairs")) == (None, None)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9" if name == "sentence-transformers" else installed(name)
    )
    assert told("embedder") == f"made with sentence-transformers {made_with} (9.9 is installed)"
    assert told("raw_pairs") is None  # no model has a part in it
