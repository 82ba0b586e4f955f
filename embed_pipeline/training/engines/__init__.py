"""The two libraries that train, each for both model kinds; every module has one function, `prepare`.

`prepare(job, rank, sources, work)` gives a Prepared: a transformers Trainer ready to run, and the model in
sentence-transformers' form around the very parameters that it trains. So both engines are watched, restored and
saved by the same code, and what they leave is the same kind of folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from transformers import Trainer

from embed_pipeline.settings import Engine

Model = TypeVar("Model")


@dataclass(frozen=True)
class Prepared(Generic[Model]):
    trainer: Trainer
    model: Model
    rows: dict[str, int]  # of each source, what an epoch goes through
    resumable: bool = True  # whether the rows of a step are known from its number


def module_of(engine: Engine, kind: Literal["embedder", "reranker"]) -> str:
    """The module of one engine for one model kind; imported only by the training that uses it."""
    return f"{__name__}.{engine.replace('-', '_')}_{kind}"
