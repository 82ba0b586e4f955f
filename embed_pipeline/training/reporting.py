"""Where a training's figures go while it runs: a file beside the model, Dagster, MLflow. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from embed_pipeline.model_files import TRAINING_LOG_FILE
from embed_pipeline.tracking.metrics import MetricsLogger

if TYPE_CHECKING:
    from dagster_pipes import PipesContext


@dataclass
class Reporter:
    """Reports every logging event once, to everyone who listens."""

    log: TextIO
    started: float
    pipes: PipesContext | None = None
    mlflow: MetricsLogger | None = None

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def go_on(self, log: Path, seconds: float) -> None:
        """Take up the log of an interrupted training, which had taken so long."""
        self.log.write(log.read_text())
        self.log.flush()
        self.started = time.monotonic() - seconds

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """`metrics` at optimizer step `step`; `seconds` since the start are added to them in the file."""
        row = {"step": step, **metrics, "seconds": self.seconds}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        if self.pipes is not None:
            self.pipes.report_custom_message({"type": "metrics", "step": step, "metrics": metrics})
        if self.mlflow is not None:
            self.mlflow.log(metrics, step)

    def tell(self, told: dict[str, Any]) -> None:
        """What is known before the first step: the forecast, and what of the rows costs something."""
        if self.pipes is not None:
            self.pipes.report_custom_message({"type": "preflight", "told": told})


@contextlib.contextmanager
def open_reporter(output: Path) -> Iterator[Reporter]:
    """A reporter to `output`'s training log; to Dagster and MLflow too when the launching process names a run there."""
    with contextlib.ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        reporter = Reporter(stack.enter_context((output / TRAINING_LOG_FILE).open("w")), time.monotonic())
        if "DAGSTER_PIPES_CONTEXT" in os.environ:
            from dagster_pipes import open_dagster_pipes

            reporter.pipes = stack.enter_context(open_dagster_pipes())
        reporter.mlflow = MetricsLogger.from_environment()
        if reporter.mlflow is not None:
            stack.callback(reporter.mlflow.close)
        yield reporter
