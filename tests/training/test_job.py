"""A job as a file, and the settings that it may hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from embed_pipeline.errors import TrainingError
from embed_pipeline.settings import EncodingSettings, RerankerSettings
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
@pytest.mark.parametrize(("kind", "model"), [("embedder", EmbedderJob), ("reranker", RerankerJob)])
def test_a_job_is_read_as_it_was_written(
    job_of: Callable[..., TrainingJob], tmp_path: Path, kind: str, model: type[TrainingJob], engine: str
) -> None:
    job = job_of(kind, tmp_path / "output", engine=engine)
    assert model.read(job.write(tmp_path / "job.json")) == job


def test_a_damaged_job_is_named(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"kind": "embedder"')
    with pytest.raises(TrainingError, match=r"job\.json is not a job for embed_pipeline\.training\.embedder"):
        EmbedderJob.read(tmp_path / "job.json")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train_group_size": 1}, "greater than or equal to 2"),
        ({"random_negatives": 5}, r"random_negatives \(5\) must be below train_group_size \(5\)"),
        ({"train_group_size": 16}, "takes 15 mined negatives .* but num_negatives is 8: they would repeat"),
        ({"train_group_size": 16, "random_negatives": 6}, "takes 9 mined negatives"),
    ],
)
def test_a_group_that_cannot_be_filled_is_refused_with_the_settings(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RerankerSettings.model_validate({"base_model": "embedder", **extra})


def test_flag_embeddings_names_of_the_lengths_are_accepted() -> None:
    settings = RerankerSettings.model_validate({"base_model": "embedder", "query_max_len": 20, "passage_max_len": 30})
    assert (settings.query_max_length, settings.passage_max_length) == (20, 30)


def test_embeddings_without_normalisation_are_refused() -> None:
    with pytest.raises(ValidationError, match="rank by cosine similarity, so embeddings are always normalised"):
        EncodingSettings.model_validate({"normalize_embeddings": False})
    assert EncodingSettings.model_validate({"normalize": True}).normalize
