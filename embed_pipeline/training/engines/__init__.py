"""The two libraries that train, each for both model kinds; every module has one function, `prepare`.

`prepare(job, rank, queries, work)` gives a Prepared: a transformers Trainer ready to run, and the model in
sentence-transformers' form around the very parameters that it trains. So both engines are watched, restored and
saved by the same code, and what they leave is the same kind of folder.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from transformers import Trainer

from embed_pipeline.errors import TrainingError
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


def loss_arguments(loss: type, given: dict[str, Any], ours: set[str]) -> dict[str, Any]:
    """`given`, once every key is a parameter of `loss` that a YAML may set; lists become tuples.

    Raises TrainingError naming the allowed keys.
    """
    allowed = [
        name
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in ours | {"model"}
    ]
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise TrainingError(
            f"loss_arguments: {loss.__name__} takes no {', '.join(unknown)}. Allowed: {', '.join(allowed)}"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
