"""What happens beside the optimizer's steps, in either engine: both run on transformers' Trainer."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embed_pipeline.errors import TrainingError
from embed_pipeline.training.process import from_main
from embed_pipeline.training.reporting import Reporter

logger = logging.getLogger(__name__)

REPORTED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
    "train_loss": "train_loss",
    "train_runtime": "train_seconds",
    "train_steps_per_second": "train_steps_per_second",
}


class FiniteLoss(TrainerCallback):
    """Ends the training at the first loss or gradient that is no number; transformers would log it as 0 and go on."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        # In float16 the loss scaler meets infinite gradients on purpose, and skips their steps.
        for name in ("loss", "train_loss") if args.fp16 else ("loss", "grad_norm", "train_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise not_finite(name, value, state.global_step, args)


def not_finite(name: str, value: float, step: int, args: TrainingArguments) -> TrainingError:
    arithmetic = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    return TrainingError(
        f"the {name} became {value} by step {step}, at learning_rate {args.learning_rate:g} in {arithmetic}. "
        "Lower learning_rate (2e-5 is a usual start), raise warmup_ratio, or set precision: float32"
    )


class Reporting(TrainerCallback):
    """Hands what the Trainer logs to the reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        metrics = {REPORTED[name]: float(value) for name, value in (logs or {}).items() if name in REPORTED}
        if metrics:
            self.reporter.report(state.global_step, metrics)


class DevEvaluation(TrainerCallback):
    """Measures on dev before, evenly spaced during and at the end; keeps the best weights; stops early.

    `measure` gives the figures by name, and runs on rank 0 while the other ranks wait; the one called `metric` decides.
    Without it (no dev split) the last weights are the result.
    """

    def __init__(
        self,
        measure: Callable[[], dict[str, float]] | None,
        metric: str,
        model: nn.Module,
        best_weights: Path,
        *,
        evaluations: int,
        patience: int,
        reporter: Reporter | None,
    ) -> None:
        self.measure = measure
        self.metric = metric
        self.model = model
        self.best_weights = best_weights
        self.evaluations = evaluations
        self.patience = patience
        self.reporter = reporter
        self.steps: set[int] = set()
        self.before: float | None = None
        self.best: float | None = None
        self.best_step: int | None = None
        self.last_step = 0
        self.without_gain = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.measure is None:
            logger.info("no dev split: no evaluation during training, the last weights are kept")
            return
        self.steps = {math.ceil(state.max_steps * i / self.evaluations) for i in range(1, self.evaluations + 1)}
        if self.before is None:
            self.before = self._measure(args, 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.steps:
            self._evaluate(args, state.global_step, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # An epoch may hold fewer batches than announced: rows with the same text never share a batch.
        if self.measure is not None and state.global_step > self.last_step:
            self._evaluate(args, state.global_step, control)

    def told(self) -> dict[str, Any]:
        """What `go_on` needs of it."""
        return {name: getattr(self, name) for name in ("before", "best", "best_step", "last_step", "without_gain")}

    def go_on(self, told: dict[str, Any], best_weights: Path) -> None:
        """Take up what an interrupted training had been told; `best_weights` may not be there yet."""
        for name, value in told.items():
            setattr(self, name, value)
        if self.reporter is not None and best_weights.is_file():
            shutil.copyfile(best_weights, self.best_weights)

    def restore_best(self) -> None:
        """Lay the best weights over the model."""
        if self.best_step is not None and self.best_step != self.last_step:
            load_model(self.model, self.best_weights)

    def _evaluate(self, args: TrainingArguments, step: int, control: TrainerControl) -> None:
        value = self._measure(args, step)
        self.last_step = step
        if self.best is None or value > self.best:
            self.best, self.best_step, self.without_gain = value, step, 0
            if self.reporter is not None:
                save_model(self.model, str(self.best_weights))
            return
        self.without_gain += 1
        if self.without_gain >= self.patience:
            logger.info("no better dev %s in %d evaluations: stopping at step %d", self.metric, self.patience, step)
            control.should_training_stop = True

    def _measure(self, args: TrainingArguments, step: int) -> float:
        assert self.measure is not None
        figures = from_main(self.measure() if self.reporter is not None else {})
        value = figures[self.metric]
        if not math.isfinite(value):
            raise not_finite("dev score", value, step, args)
        if self.reporter is not None:
            self.reporter.report(step, {f"dev_{name}": figure for name, figure in figures.items()})
            logger.info("step %d: dev %s", step, ", ".join(f"{name} {found:.4f}" for name, found in figures.items()))
        return value
