"""Step metrics from inside a training to MLflow, in a way that cannot hurt the training.

The training never speaks to MLflow: it appends lines to the journal that the launching process named in the
environment, and the launching process sends them. A server that is slow or gone is not noticed here. Every metric
stands in `training_log.jsonl` beside the model as well.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embed_pipeline.tracking.journal import SYSTEM_PREFIX, Journal, now

logger = logging.getLogger(__name__)

JOURNAL_VARIABLE = "EMBED_PIPELINE_MLFLOW_JOURNAL"
SYSTEM_METRICS_VARIABLE = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"

NAME_LIMIT = 250  # characters, MLflow's own
SAMPLE_SECONDS = 10.0


def valid_name(name: str) -> str:
    """A name of a metric or parameter that MLflow takes: `ndcg@10` is `ndcg_at_10`.

    MLflow refuses some characters, paths that are not in their shortest form, and more than 250 characters.
    """
    plain = re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
    plain = "/".join(part for part in plain.split("/") if part not in ("", ".", "..")) or "_"
    if len(plain) <= NAME_LIMIT:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]  # what is cut off may be all that differs
    return f"{plain[: NAME_LIMIT - 9]}_{digest}".replace("/_", "_")


class MetricsLogger:
    """Appends the metrics of a training to a journal; rank 0 only, so that there is one run, not one a rank."""

    def __init__(self, journal: Journal, *, system_metrics: bool) -> None:
        self._journal = journal
        self._lost = 0
        # A training that goes on from a checkpoint makes again what it made after it: MLflow keeps the first.
        told = [entry for entry, _ in journal.read() if "metrics" in entry]
        self._told = {(name, entry["step"]) for entry in told for name in entry["metrics"]}
        self._system = SystemMetrics(journal) if system_metrics else None
        if self._system is not None:
            self._system.start()

    @classmethod
    def from_environment(cls) -> MetricsLogger | None:
        """The logger for the run that the launching process made; None when it made none, or it cannot be joined."""
        path = os.environ.get(JOURNAL_VARIABLE)
        if not path:
            return None
        system_metrics = os.environ.get(SYSTEM_METRICS_VARIABLE, "").lower() == "true"
        try:
            return cls(Journal(Path(path)), system_metrics=system_metrics)
        except Exception as error:  # anything: tracking may not stop a training
            logger.warning("metrics go to training_log.jsonl only, not to MLflow: %s", error)
            return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note `metrics` at optimizer step `step`; returns at once, whatever MLflow does."""
        named = {valid_name(name): float(value) for name, value in metrics.items()}
        fresh = {name: value for name, value in named.items() if (name, step) not in self._told}
        if not fresh:
            return
        try:
            self._journal.append({"metrics": fresh, "step": step, "at": now()})
        except OSError as error:
            if self._lost == 0:
                logger.warning("the metrics of step %d go to training_log.jsonl only, not to MLflow: %s", step, error)
            self._lost += len(fresh)

    def close(self) -> None:
        """Stop measuring the machine; the run's status is set by the process that launched the training."""
        if self._system is not None:
            self._system.stop()
        if self._lost:
            logger.warning(
                "%d metrics could not be written to %s: MLflow lacks them, training_log.jsonl may have them",
                self._lost,
                self._journal.path,
            )


class SystemMetrics:
    """Processor, memory, disk, network and GPU use of this machine, appended to a journal every ten seconds.

    MLflow's own monitor measures; its thread is not used, for it speaks to the server and ends when that is away.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, name="system-metrics", daemon=True)
        self._monitors = _monitors()
        told = [e["step"] for e, _ in journal.read() if any(n.startswith(SYSTEM_PREFIX) for n in e.get("metrics", ()))]
        self._step = max(told, default=-1) + 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(SAMPLE_SECONDS)

    def _measure(self) -> None:
        try:
            while True:
                for monitor in self._monitors:
                    monitor.collect_metrics()
                if self._stop.wait(SAMPLE_SECONDS):
                    return
                found = {
                    name: value for monitor in self._monitors for name, value in monitor.aggregate_metrics().items()
                }
                for monitor in self._monitors:
                    monitor.clear_metrics()
                named = {valid_name(SYSTEM_PREFIX + name): float(value) for name, value in found.items()}
                self._journal.append({"metrics": named, "step": self._step, "at": now()})
                self._step += 1
        except Exception as error:  # a driver that fails, a full disk
            logger.warning("processor, memory and GPU use are no longer recorded: %s", error)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            return [*monitors, kind()]
        except Exception:  # each raises errors of its own where there is no such GPU
            logger.debug("no %s", kind.__name__, exc_info=True)
    return monitors
