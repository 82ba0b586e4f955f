"""Several processes take the step that one with all their rows would: the same gradients, to rounding."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import GRADIENTS_FILE, gradients
from torch import Tensor

from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.torchrun import torchrun_command
from embed_pipeline.losses import EMBEDDER_LOSSES
from embed_pipeline.training.job import TrainingJob

BATCH_SIZE = 4
# Rows in the order of the seed alone: batches without equal texts are composed by their size.
SENTENCE_TRANSFORMERS = {"engine": "sentence-transformers", "batch_sampler": "batch_sampler"}
FLAG_EMBEDDING = {"engine": "flag-embedding"}
EVERY_WAY = {"directions": ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]}
MATRYOSHKA = {"loss_wrapper": "MatryoshkaLoss", "loss_wrapper_arguments": {"matryoshka_dims": [32, 16]}}
CASES: dict[str, dict[str, Any]] = {
    "ranking": SENTENCE_TRANSFORMERS,
    "ranking, cached": {**SENTENCE_TRANSFORMERS, "sub_batch_size": 3},
    "ranking, accumulated": {**SENTENCE_TRANSFORMERS, "gradient_accumulation_steps": 2},
    "ranking, every way": {**SENTENCE_TRANSFORMERS, "loss_arguments": EVERY_WAY},
    "ranking, pairs": {**SENTENCE_TRANSFORMERS, "train_group_size": 1},
    "ranking, matryoshka": {**SENTENCE_TRANSFORMERS, **MATRYOSHKA},
    "ranking, cached, matryoshka": {**SENTENCE_TRANSFORMERS, **MATRYOSHKA, "sub_batch_size": 3},
    "symmetric": {**SENTENCE_TRANSFORMERS, "loss": "MultipleNegativesSymmetricRankingLoss"},
    "symmetric, cached": {
        **SENTENCE_TRANSFORMERS,
        "loss": "MultipleNegativesSymmetricRankingLoss",
        "sub_batch_size": 3,
    },
    "guided": {**SENTENCE_TRANSFORMERS, "loss": "GISTEmbedLoss"},
    "guided, cached": {**SENTENCE_TRANSFORMERS, "loss": "GISTEmbedLoss", "sub_batch_size": 3},
    # Each process encodes a share with the teacher, which pools in another way than the student.
    "taught": {**SENTENCE_TRANSFORMERS, "loss": "MSELoss", "encoding": {"pooling": "cls"}},
    "flag": FLAG_EMBEDDING,
    "flag, in parts": {**FLAG_EMBEDDING, "sub_batch_size": 3},
    "flag, accumulated": {**FLAG_EMBEDDING, "gradient_accumulation_steps": 2},
    "flag, distilled": {**FLAG_EMBEDDING, "knowledge_distillation": True},
    "flag, m3": {**FLAG_EMBEDDING, "knowledge_distillation": True, "arguments": {"kd_loss_type": "m3_kd_loss"}},
    "reranker": {"engine": "sentence-transformers"},
    "reranker, flag": {"engine": "flag-embedding"},
}


@pytest.fixture(scope="module")
def job_for(job_of: Callable[..., TrainingJob], tiny_bert_folder: Path) -> Callable[..., TrainingJob]:
    def make(name: str, folder: Path, processes: int) -> TrainingJob:
        settings = {
            # Nothing is drawn, nothing is cut.
            **{"dropout": 0.0, "max_grad_norm": 1e9, "max_steps": 1},
            "batch_size": BATCH_SIZE * 2 // processes,
            **CASES[name],
        }
        output = folder / name.replace(", ", "-")
        if name.startswith("reranker"):
            return job_of("reranker", output, processes, **settings)
        needed = EMBEDDER_LOSSES[settings.get("loss", "MultipleNegativesRankingLoss")].needs
        given = {key: {"path": str(tiny_bert_folder)} for key in ("guide", "teacher") if key in needed}
        job = job_of("embedder", output, processes, temperature=0.1, **given, **settings)
        folders = {"shop": tiny_bert_folder}
        return job.model_copy(update={f"{key}s": folders for key in given})

    return make


@pytest.fixture(scope="module")
def of_two(job_for: Callable[..., TrainingJob], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all cases: starting the processes is what takes the time."""
    folder = tmp_path_factory.mktemp("of_two")
    jobs = [job_for(name, folder, 2) for name in CASES]
    files = [str(job.write(job.output.with_suffix(".json"))) for job in jobs]
    (folder / "jobs.txt").write_text("\n".join(files))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run_local(
        torchrun_command("one_step", folder / "jobs.txt", 2),
        env={"PYTHONPATH": path},
        error_file=folder / "error.json",
    )
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one_with_their_rows(
    of_two: Path, job_for: Callable[..., TrainingJob], name: str, tmp_path: Path
) -> None:
    job = job_for(name, tmp_path, 1)
    one = gradients(job)
    # Two processes add in another order than one: in float32 that is about 1e-5 of the length.
    assert apart(one, torch.load(of_two / job.output.name / GRADIENTS_FILE)) < 3e-5
    if name in ("ranking, cached", "symmetric, cached"):  # in parts or at once is the same step
        at_once = job_for(name.removesuffix(", cached"), tmp_path, 1).output.name
        assert apart(one, torch.load(of_two / at_once / GRADIENTS_FILE)) < 1e-5


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Length of the difference over the length of `one`."""
    assert one.keys() == other.keys()
    assert len(one) > 10
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return math.sqrt(difference / sum(float(gradient.square().sum()) for gradient in one.values()))
