from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embed_pipeline.champions import read_history
from embed_pipeline.publishing.card import Carded
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline
from tests.publishing.local_hub import TOKEN, LocalHub, serving
from tests.tracking.candidates import Workshop

SETTINGS = {
    "name": "support",
    "description": "Questions about the castle.",
    "source": {"path": "raw/*.parquet", "license": "cc-by-4.0"},
    "embedder": {"base_model": {"hub": "your-company/base", "revision": "a" * 40}},
    "reranker": {"base_model": "embedder"},
    "card": {"license": "apache-2.0", "language": ["en"], "datasets": ["your-company/castle"]},
    "hub": {"embedder": "your-company/support-embedder", "reranker": "your-company/support-reranker"},
}


@pytest.fixture
def in_force(in_service: Workshop, tmp_path: Path) -> Pipeline:
    """A pipeline whose champion is the candidate of seed 2."""
    return Pipeline(PipelineSettings.model_validate(SETTINGS), tmp_path, in_service.store)


@pytest.fixture
def carded(in_force: Pipeline) -> Carded:
    champion = read_history(in_force.store).champion
    assert champion is not None
    return Carded(in_force.settings, in_force.store, champion)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub on this machine, which the real client speaks with; large files go by LFS, which it can do."""
    from huggingface_hub import constants

    with serving(tmp_path / "hub") as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served
