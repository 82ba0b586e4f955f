"""Step metrics from inside a training to MLflow, in a way that cannot hurt the training.

The asset creates the MLflow run and hands its id over in the environment; rank 0 only joins it. Whatever goes wrong
with the tracking server is a warning in the log, never an exception in the trainer; every metric stands in
`training_log.jsonl` beside the model as well.
"""

from __future__ import annotations

import logging
import os
import re
import time

logger = logging.getLogger(__name__)

GIVE_UP_AFTER = 5  # failed requests in a row: a dead server must not cost its time-out at every step


def valid_name(name: str) -> str:
    """MLflow refuses characters such as `@` asynchronously, which loses the metric: replace them beforehand."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def fail_in_seconds() -> None:
    """Have MLflow's client give up on a dead server in seconds, not after its default of minutes of retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


class MetricsLogger:
    """Joins the MLflow run named by MLFLOW_RUN_ID and logs to it."""

    def __init__(self, run_id: str, *, system_metrics: bool) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        self._run_id = run_id
        self._failures = 0
        if system_metrics:
            try:
                mlflow.start_run(run_id=run_id, log_system_metrics=True)
            except Exception as error:  # anything: tracking may not stop a training
                logger.warning("MLflow system metrics are not recorded: %s", error)

    @classmethod
    def from_environment(cls) -> MetricsLogger | None:
        """The logger for the run that the launching process made, or None when there is none or it is unreachable."""
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if not run_id or not os.environ.get("MLFLOW_TRACKING_URI"):
            return None
        fail_in_seconds()
        system_metrics = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() == "true"
        try:
            return cls(run_id, system_metrics=system_metrics)
        except Exception as error:
            logger.warning("MLflow is not reachable, metrics go to training_log.jsonl only: %s", error)
            return None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record `metrics` at optimizer step `step`."""
        if self._failures >= GIVE_UP_AFTER or not metrics:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(valid_name(name), float(value), now, step) for name, value in metrics.items()]
        try:
            self._client.log_batch(self._run_id, metrics=batch, synchronous=True)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            logger.warning("MLflow did not take the metrics of step %d: %s", step, error)
            if self._failures == GIVE_UP_AFTER:
                logger.warning("MLflow failed %d times in a row: later metrics go to the log file only", GIVE_UP_AFTER)

    def close(self) -> None:
        """Stop the system monitor; the run's status is set by the process that created it."""
        import mlflow

        try:
            if mlflow.active_run() is not None:
                mlflow.end_run()
        except Exception as error:
            logger.warning("MLflow could not be told that the training ended: %s", error)
