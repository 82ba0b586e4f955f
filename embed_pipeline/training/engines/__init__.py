"""The two libraries that train, each for both model kinds; every module has one function, `prepare`.

`prepare(job, rank, queries, work)` gives a Prepared: a transformers Trainer ready to run, and the model in
sentence-transformers' form around the very parameters that it trains. So both engines are watched, restored and
saved by the same code, and what they leave is the same kind of folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from transformers import Trainer

from embed_pipeline.settings import Engine

Model = TypeVar("Model")


@dataclass(frozen=True)
class Prepared(Generic[Model]):
    trainer: Trainer
    model: Model
    rows: int  # what an epoch goes through, counted as `batch_size` counts


def module_of(engine: Engine, kind: Literal["embedder", "reranker"]) -> str:
    """The module of one engine for one model kind; imported only by the training that uses it."""
    return f"{__name__}.{engine.replace('-', '_')}_{kind}"


def loss_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a loss, from a YAML's: lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
