"""The gradients that the first step of a job hands to its optimizer; as a program, of several jobs under torchrun."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from embed_pipeline.training.engines import module_of
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob
from embed_pipeline.training.process import start_rank, wait_for_all
from embed_pipeline.training.run import work_folder
from embed_pipeline.training.sources import read_embedder_sources, read_reranker_sources

GRADIENTS_FILE = "gradients.pt"


class _Taken(TrainerCallback):
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }


def gradients(job: TrainingJob) -> dict[str, Tensor]:
    """By parameter, after the processes have shared them."""
    rank = start_rank(job)
    if isinstance(job, EmbedderJob):
        sources, kind = read_embedder_sources(job), "embedder"
    else:
        assert isinstance(job, RerankerJob)
        sources, kind = read_reranker_sources(job), "reranker"
    engine = importlib.import_module(module_of(job.settings.engine, kind))
    prepared = engine.prepare(job, rank, sources, work_folder(job))
    taken = _Taken(prepared.model)
    prepared.trainer.add_callback(taken)
    prepared.trainer.train()
    return taken.gradients


if __name__ == "__main__":
    for path in Path(sys.argv[1]).read_text().splitlines():
        kind = RerankerJob if "reranker" in Path(path).name else EmbedderJob
        job = kind.read(Path(path))
        found = gradients(job)
        if torch.distributed.get_rank() == 0:
            torch.save(found, job.output / GRADIENTS_FILE)
    wait_for_all()
