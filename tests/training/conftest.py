"""The small problem once a session, and jobs on it run by torchrun or in this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_problem import Problem, Trained, launch, read_output, write_problem

from embed_pipeline.settings import EmbedderSettings, RerankerSettings
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob


@pytest.fixture(scope="session")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return write_problem(tmp_path_factory.mktemp("problem"))


@pytest.fixture(scope="session")
def job_of(problem: Problem, tiny_bert_folder: Path) -> Callable[..., TrainingJob]:
    """`job_of("embedder", output, world_size=2, **settings)`: a job on the problem, from the tiny BERT."""

    def make(kind: str, output: Path, world_size: int = 1, seed: int = 3, **settings: Any) -> TrainingJob:
        common: dict[str, Any] = {
            "seed": seed,
            "base_model": tiny_bert_folder,
            "source_name": "shop",
            "cleaned_pairs": problem.cleaned_pairs,
            "hard_negatives": problem.hard_negatives,
            "output": output,
            "world_size": world_size,
        }
        chosen: dict[str, Any] = {
            "base_model": {"path": str(tiny_bert_folder)},
            "precision": "float32",
            "batch_size": 4,
            "train_group_size": 3,
            "epochs": 2,
            "evaluations": 2,
            "logging_steps": 2,
            "learning_rate": 1e-3,
            **settings,
        }
        if kind == "reranker":
            chosen.setdefault("random_negatives", 0)
        if kind == "embedder":
            return EmbedderJob(settings=EmbedderSettings.model_validate(chosen), **common)
        return RerankerJob(
            settings=RerankerSettings.model_validate(chosen), dev_candidates=problem.dev_candidates, **common
        )

    return make


@pytest.fixture(scope="session")
def train(job_of: Callable[..., TrainingJob], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Run such a job by torchrun to its end, and read what it left."""

    def run(
        kind: str, world_size: int = 1, change: Callable[[TrainingJob], TrainingJob] = lambda job: job, **settings: Any
    ) -> Trained:
        folder = tmp_path_factory.mktemp(kind)
        job = change(job_of(kind, folder / "output", world_size, **settings))
        launch(job, folder)
        return read_output(job)

    return run


@pytest.fixture(scope="session")
def train_here(job_of: Callable[..., TrainingJob], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """The same in this process, without torchrun: spares its start where one rank is enough."""

    def run(kind: str, change: Callable[[TrainingJob], TrainingJob] = lambda job: job, **settings: Any) -> Trained:
        folder = tmp_path_factory.mktemp(kind)
        job = change(job_of(kind, folder / "output", **settings))
        importlib.import_module(job.entry_point).main(job.write(folder / "job.json"))
        return read_output(job)

    return run
