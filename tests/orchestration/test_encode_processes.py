"""A stage that encodes and searches in two processes makes what it makes in one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.models import blocks, ranks
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline, make_cleaned_pairs, make_hard_negatives, make_raw_pairs
from tests.orchestration.conftest import SmallPipeline, settings_of


def test_hard_negatives_of_two_processes_are_those_of_one(
    make_pipeline: Callable[..., SmallPipeline],
    tiny_bert_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    two = make_pipeline(encode_processes=2)
    for module in (blocks, ranks):
        monkeypatch.setattr(module, "BLOCK_SIZE", 100)
    monkeypatch.setattr(ranks, "START_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        assert two.materialize("raw_pairs", "cleaned_pairs", "hard_negatives").success
    # The questions are one block.
    jobs = [record.getMessage() for record in caplog.records if "in 2 processes" in record.getMessage()]
    assert "did not receive any messages" not in caplog.text
    assert [message.split()[0] for message in jobs] == ["encoding", "searching"]

    settings = PipelineSettings.model_validate({**settings_of(tiny_bert_folder), "encode_processes": 1})
    one = Pipeline(settings, two.yaml_file.parent, PipelineStore(tmp_path / "one", "small"))
    for make in (make_raw_pairs, make_cleaned_pairs, make_hard_negatives):
        made = make(one).artifact
    shared = two.store.current("hard_negatives")
    assert shared.content == made.content
    # The number of processes is no part of what decides the result.
    assert shared.manifest.recipe == made.manifest.recipe
