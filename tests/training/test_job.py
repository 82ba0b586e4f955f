"""A job as a file, and the settings that it may hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from embed_pipeline.errors import TrainingError
from embed_pipeline.settings import LOSS_ARGUMENTS, EmbedderSettings, EncodingSettings, RerankerSettings
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


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        (EmbedderSettings, {"loss": "TripletLoss"}, "'MultipleNegativesRankingLoss' or 'Cached"),
        (RerankerSettings, {"loss": "CrossEntropyLoss"}, "'BinaryCrossEntropyLoss', 'ListNetLoss'"),
        (RerankerSettings, {"loss": "LambdaLoss", "engine": "flag-embedding"}, "`loss` belongs to engine sentence"),
        (EmbedderSettings, {"loss_arguments": {"a": 1}, "engine": "flag-embedding"}, "`loss_arguments` belongs to"),
    ],
)
def test_losses_that_cannot_be_are_refused_with_the_settings(
    settings: type[EmbedderSettings], extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        settings.model_validate({"base_model": {"path": "somewhere"}, **extra})


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        (EmbedderSettings, {"loss_arguments": {"margin": 1}}, "takes no margin. Allowed: directions, partition_mode"),
        (EmbedderSettings, {"loss_arguments": {"scale": 1}}, "takes no scale"),
        (EmbedderSettings, {"loss_arguments": {"mini_batch_num_tokens": 9}}, "takes no mini_batch_num_tokens"),
        (RerankerSettings, {"loss_arguments": {"k": 1}}, "BinaryCrossEntropyLoss takes no k. Allowed: pos_weight"),
    ],
)
def test_arguments_that_a_loss_does_not_take_are_refused_with_the_settings(
    settings: type[EmbedderSettings], extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        settings.model_validate({"base_model": {"path": "somewhere"}, **extra})


def test_the_arguments_of_a_losss_cached_form_are_known() -> None:
    given = {"base_model": {"path": "x"}, "sub_batch_size": 2, "loss_arguments": {"mini_batch_num_tokens": 9}}
    assert EmbedderSettings.model_validate(given).loss_arguments == {"mini_batch_num_tokens": 9}


@pytest.mark.parametrize("loss", LOSS_ARGUMENTS)
def test_the_arguments_that_are_offered_are_the_librarys(loss: str) -> None:
    from sentence_transformers.cross_encoder import losses as of_pairs
    from sentence_transformers.sentence_transformer import losses as of_texts

    found = inspect.signature(getattr(of_texts, loss, None) or getattr(of_pairs, loss)).parameters
    # Decided by other settings or by how the models here are made, or not sayable in YAML.
    ours = {"model", "scale", "gather_across_devices", "show_progress_bar", "kwargs"}
    ours |= {"mini_batch_size"} if loss.startswith("Cached") else set()  # sub_batch_size
    ours |= {"similarity_fct", "activation_fn", "weighting_scheme", "lambda_weight"}
    assert set(LOSS_ARGUMENTS[loss]) == set(found) - ours


def test_flag_embeddings_names_of_the_lengths_are_accepted() -> None:
    settings = RerankerSettings.model_validate({"base_model": "embedder", "query_max_len": 20, "passage_max_len": 30})
    assert (settings.query_max_length, settings.passage_max_length) == (20, 30)


def test_embeddings_without_normalisation_are_refused() -> None:
    with pytest.raises(ValidationError, match="rank by cosine similarity, so embeddings are always normalised"):
        EncodingSettings.model_validate({"normalize_embeddings": False})
    assert EncodingSettings.model_validate({"normalize": True}).normalize
