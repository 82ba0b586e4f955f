"""What happens beside the optimizer's steps, in either engine: both run on transformers' Trainer."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from embed_pipeline.errors import TrainingError
from embed_pipeline.evaluation.evaluators import Figures
from embed_pipeline.training.dev_choice import Choice, State, choose, difference
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
    return TrainingError(
        f"the {name} became {value} by step {step}, at learning_rate {args.learning_rate:g} in {arithmetic_of(args)}. "
        "Lower learning_rate (2e-5 is a usual start), raise warmup_ratio, or set precision: float32"
    )


def arithmetic_of(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


class MovingLoss(TrainerCallback):
    """Ends a training that learns nothing any more, one that runs away, and one in float16 that makes no steps.

    `scale` gives the loss scaler's factor in float16. With `has_margin` a gradient of zero may mean that everything is
    learnt: that is told, once.
    """

    def __init__(self, has_margin: bool, scale: Callable[[], float]) -> None:
        self.has_margin, self.scale = has_margin, scale
        self.logged: list[dict[str, float]] = []
        self.told = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.logged = [row for row in state.log_history if "loss" in row]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if "loss" not in (logs or {}):
            return
        self.logged.append(dict(logs or {}))
        if args.fp16 and self.scale() < 1.0:
            raise TrainingError(
                f"float16 overflows in every step: the loss scale fell below 1 by step {state.global_step}, so no "
                "step changes the weights. Set precision: bfloat16 or float32"
            )
        if (start := exploded([row["loss"] for row in self.logged])) is not None:
            raise TrainingError(
                f"the loss has run away: {self.logged[-1]['loss']:.4g} by step {state.global_step}, after {start:.4g} "
                f"at the start, at learning_rate {args.learning_rate:g}. Lower learning_rate (2e-5 is usual) or "
                "max_grad_norm, or raise warmup_ratio"
            )
        if not self.told and frozen(self.logged):
            self.told = True
            found = (
                f"the loss has not moved for {FROZEN} logged figures: {self.logged[-1]['loss']:.6g} by step "
                f"{state.global_step}, gradient {self.logged[-1].get('grad_norm', 0.0):.3g}"
            )
            if not self.has_margin:
                raise TrainingError(
                    f"{found}. All embeddings or scores have become alike, or learning_rate {args.learning_rate:g} "
                    "is too small to change a weight. Lower learning_rate in the first case (2e-5 is a usual start), "
                    "raise it in the second"
                )
            logger.warning("%s. Every margin is kept: raise loss_arguments.margin, or mine harder negatives", found)


FROZEN = 20  # logged figures
_LEARNT = 1e-6  # a loss so near zero may stand still


def frozen(logged: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last FROZEN figures say that nothing is learnt: no gradient, or one loss to the last digit.

    A loss of zero is none of that: everything was learnt.
    """
    last = logged[-FROZEN:]
    if len(last) < FROZEN or any(abs(row["loss"]) <= _LEARNT for row in last):
        return False
    return all(row.get("grad_norm") == 0.0 for row in last) or len({row["loss"] for row in last}) == 1


def exploded(losses: Sequence[float], figures: int = 5, times: float = 10.0) -> float | None:
    """The highest of the first `figures` losses, if the last ones are all so many `times` above it; else None.

    Losses differ in scale and some begin near zero (hinges, small distances), so what counts as a start is at least 1:
    below ten no loss has run away. A few high figures, or another source's loss in between, are none either.
    """
    if len(losses) < 2 * figures:
        return None
    start = max(losses[:figures])
    return start if min(losses[-figures:]) > times * max(1.0, *map(abs, losses[:figures])) else None


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
    """Measures on dev before, evenly spaced during and at the end; says which weights are kept; stops early.

    The last weights are kept, unless earlier ones are better on dev by more than chance (`dev_choice` says how that is
    judged). A training stops when `patience` evaluations in a row were worse, by more than chance, than the best.

    `measure` gives the figures by name, on every rank at once; of rank 0's the one called `metric` decides.
    Without it (no dev split) the last weights are the result.
    """

    def __init__(
        self,
        measure: Callable[[], Figures] | None,
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
        self.before: State | None = None
        self.best: State | None = None
        self.last: State | None = None
        self.worse_in_a_row = 0

    def measure_before(self, args: TrainingArguments) -> float:
        """Measure the model as it comes, unless that was done already; how many seconds a measurement took."""
        if self.measure is None:
            logger.info("no dev split: no evaluation during training, the last weights are kept")
            return 0.0
        started = time.monotonic()
        if self.before is None:
            self.before = self._measure(args, 0)
        return time.monotonic() - started

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.measure is not None:
            self.steps = {math.ceil(state.max_steps * i / self.evaluations) for i in range(1, self.evaluations + 1)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.steps:
            self._evaluate(args, state.global_step, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # An epoch may hold fewer batches than announced: rows with the same text never share a batch.
        if self.measure is not None and state.global_step > (self.last.step if self.last else 0):
            self._evaluate(args, state.global_step, control)

    def told(self) -> dict[str, Any]:
        """What `go_on` needs of it."""
        states = {name: getattr(self, name) for name in ("before", "best", "last")}
        return {
            **{name: state.told() if state is not None else None for name, state in states.items()},
            "worse_in_a_row": self.worse_in_a_row,
        }

    def go_on(self, told: dict[str, Any], best_weights: Path) -> None:
        """Take up what an interrupted training had been told; `best_weights` may not be there yet."""
        for name in ("before", "best", "last"):
            setattr(self, name, State.of(told[name]) if told[name] is not None else None)
        self.worse_in_a_row = told["worse_in_a_row"]
        if self.reporter is not None and best_weights.is_file():
            shutil.copyfile(best_weights, self.best_weights)

    def keep(self) -> Choice | None:
        """Lay the weights over the model that are to be kept, and tell which; None where nothing was measured."""
        if self.before is None or self.best is None or self.last is None:
            return None
        choice = choose(self.metric, self.before, self.best, self.last, self._comparisons)
        if choice.step != self.last.step:
            load_model(self.model, self.best_weights)
        logger.info("%s", choice.sentence)
        if choice.verdict == "worse":
            logger.warning("%s. Lower learning_rate, or bring more training rows", choice.over_base)
        else:
            logger.info("%s", choice.over_base)
        return choice

    @property
    def _comparisons(self) -> int:
        """How many earlier states the last one is compared with."""
        return max(1, self.evaluations - 1)

    def _evaluate(self, args: TrainingArguments, step: int, control: TrainerControl) -> None:
        self.last = self._measure(args, step)
        if self.best is None or self.last.figure.value > self.best.figure.value:
            self.best, self.worse_in_a_row = self.last, 0
            if self.reporter is not None:
                save_model(self.model, str(self.best_weights))
            return
        worse = difference(self.best, self.last, self._comparisons).verdict == "worse"
        self.worse_in_a_row = self.worse_in_a_row + 1 if worse else 0
        if self.worse_in_a_row >= self.patience:
            logger.info(
                "dev %s was worse than at step %d by more than chance in %d evaluations in a row: stopping at step %d",
                self.metric,
                self.best.step,
                self.patience,
                step,
            )
            control.should_training_stop = True

    def _measure(self, args: TrainingArguments, step: int) -> State:
        assert self.measure is not None
        measured = self.measure()
        figures = from_main({name: figure.value for name, figure in measured.items()})
        value = figures[self.metric]
        if not math.isfinite(value):
            raise not_finite("dev score", value, step, args)
        if self.reporter is not None:
            self.reporter.report(step, {f"dev_{name}": figure for name, figure in figures.items()})
            logger.info("step %d: dev %s", step, ", ".join(f"{name} {found:.4f}" for name, found in figures.items()))
        # Every rank decides alike, so each needs the items; of pairs of sentences only rank 0 has them.
        mine = State(step, measured[self.metric]).told() if self.metric in measured else {}
        return State.of(from_main(mine))
