"""MLflow runs as the launching process sees them: one parent for a Dagster run, one child for each training.

The parent process creates a run, hands its id to the training, and alone decides its final status. A tracking server
that cannot be reached costs a warning, not the training.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embed_pipeline.artifacts import Artifact, home
from embed_pipeline.settings import TrackingSettings
from embed_pipeline.tracking.metrics import fail_in_seconds, valid_name

logger = logging.getLogger(__name__)

PARAMETER_LIMIT = 500  # characters; longer values are shortened, the full ones stand in settings.json
DAGSTER_RUN_TAG = "dagster.run_id"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the home folder that needs no server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def without_password(text: str) -> str:
    """A text that may hold addresses, such as an error of MLflow's, without the names and passwords in them."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)


def ui_address() -> str:
    """Where a person opens MLflow: the server itself, or what `make mlflow` serves."""
    uri = tracking_uri()
    return os.environ.get("MLFLOW_UI_URL") or (
        without_password(uri) if uri.startswith("http") else "http://127.0.0.1:5000"
    )


@dataclass(frozen=True)
class TrackedRun:
    """A child run that is open. Every method survives a tracking server that went away."""

    run_id: str
    experiment_id: str
    system_metrics: bool

    @property
    def link(self) -> str:
        return f"{ui_address().rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def environment(self) -> dict[str, str]:
        """What rank 0 of a training needs to join this run."""
        return {
            "MLFLOW_TRACKING_URI": tracking_uri(),
            "MLFLOW_RUN_ID": self.run_id,
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": str(self.system_metrics).lower(),
        }

    def log_parameters(self, settings: Mapping[str, Any]) -> None:
        """All settings: flat as parameters, whole as the artifact settings.json."""
        from mlflow.entities import Param

        flat = _flatten(settings)
        params = [Param(valid_name(key), str(value)[:PARAMETER_LIMIT]) for key, value in flat.items()]
        with self._surviving("parameters") as client:
            client.log_batch(self.run_id, params=params)
            client.log_text(self.run_id, json.dumps(settings, indent=2, default=str), "settings.json")

    def log_inputs(self, artifacts: Sequence[Artifact], context: str) -> None:
        """The artifacts this run was made from, by their content; `context` says what for."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=f"{a.manifest.pipeline}/{a.manifest.asset}",
                    digest=a.content,
                    source_type="local",
                    source=json.dumps({"uri": str(a.path)}),
                    profile=json.dumps({k: v for k, v in a.report.items() if isinstance(v, int | float)}),
                ),
                tags=[InputTag("mlflow.data.context", context)],
            )
            for a in artifacts
        ]
        with self._surviving("data sets") as client:
            client.log_inputs(self.run_id, datasets=inputs)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        with self._surviving("metrics") as client:
            for name, value in metrics.items():
                client.log_metric(self.run_id, valid_name(name), float(value))

    def log_folder(self, folder: Path, name: str) -> None:
        with self._surviving(name) as client:
            client.log_artifacts(self.run_id, str(folder), name)

    def log_file(self, file: Path, folder: str) -> None:
        with self._surviving(file.name) as client:
            client.log_artifact(self.run_id, str(file), folder)

    @contextmanager
    def system_metrics_of_this_process(self) -> Iterator[None]:
        """Record processor, memory and GPU use while the body runs here (a training's rank 0 does it by itself)."""
        monitor = None
        if self.system_metrics:
            with self._surviving("system metrics"):
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                monitor = SystemMetricsMonitor(self.run_id, tracking_uri=tracking_uri())
                monitor.start()
        try:
            yield
        finally:
            if monitor is not None:
                monitor.finish()

    @contextmanager
    def _surviving(self, what: str) -> Iterator[Any]:
        import mlflow

        try:
            yield mlflow.MlflowClient(tracking_uri())
        except Exception as error:  # anything: tracking may not cost a finished training
            logger.warning("MLflow did not take the %s of run %s: %s", what, self.run_id, error)


@contextmanager
def tracked_run(
    settings: TrackingSettings, pipeline: str, name: str, dagster_run_id: str | None, *, goes_on: str | None = None
) -> Iterator[TrackedRun | None]:
    """Open a child run `name` under the Dagster run's parent; None when MLflow is unreachable.

    `goes_on` is the id of a run that was interrupted, to be opened again; a new one if it is gone.

    The run ends FINISHED, or FAILED when the body raises, or KILLED when it is interrupted.
    """
    import mlflow

    fail_in_seconds()
    try:
        client = mlflow.MlflowClient(tracking_uri())
        experiment_id = _experiment(client, settings.experiment or pipeline)
        parent_id = _parent_run(client, experiment_id, pipeline, dagster_run_id)
        tags = {"mlflow.parentRunId": parent_id, "embed_pipeline.pipeline": pipeline, "embed_pipeline.asset": name}
        if dagster_run_id:
            tags[DAGSTER_RUN_TAG] = dagster_run_id
        run_id = _opened_again(client, goes_on)
        if run_id is None:
            run_id = client.create_run(experiment_id, tags=tags, run_name=f"{pipeline}/{name}").info.run_id
        elif dagster_run_id:
            client.set_tag(run_id, DAGSTER_RUN_TAG, dagster_run_id)
    except Exception as error:  # anything: tracking may not stop a training
        told = without_password(f"MLflow at {tracking_uri()} is not reachable, this run is not recorded there: {error}")
        logger.warning("%s", told)
        yield None
        return
    status = "FAILED"
    try:
        yield TrackedRun(run_id, experiment_id, settings.system_metrics)
        status = "FINISHED"
    except Exception:
        raise
    except BaseException:
        status = "KILLED"
        raise
    finally:
        for ended in (run_id, parent_id):
            try:
                client.set_terminated(ended, status)
            except Exception as error:
                logger.warning("MLflow run %s keeps the status RUNNING: %s", ended, error)


def end_runs_of(dagster_run_id: str) -> None:
    """Mark the MLflow runs of a Dagster run as KILLED that a process left open which was killed itself."""
    import mlflow

    fail_in_seconds()
    try:
        client = mlflow.MlflowClient(tracking_uri())
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        open_runs = f"tags.`{DAGSTER_RUN_TAG}` = '{dagster_run_id}' and attributes.status = 'RUNNING'"
        for run in client.search_runs(experiments, open_runs):
            client.set_terminated(run.info.run_id, "KILLED")
    except Exception as error:
        logger.warning("MLflow runs of Dagster's run %s keep the status RUNNING: %s", dagster_run_id, error)


def _opened_again(client: Any, run_id: str | None) -> str | None:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return None
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        logger.warning("MLflow run %s is gone, a new one is made: %s", run_id, error)
        return None
    return run_id


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    location = None if tracking_uri().startswith("http") else (home() / "mlflow-artifacts").as_uri()
    return client.create_experiment(name, artifact_location=location)


def _parent_run(client: Any, experiment_id: str, pipeline: str, dagster_run_id: str | None) -> str:
    if dagster_run_id:
        found = client.search_runs(
            [experiment_id],
            f"tags.`{DAGSTER_RUN_TAG}` = '{dagster_run_id}' and tags.`embed_pipeline.asset` = 'run'",
            max_results=1,
        )
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
    tags = {"embed_pipeline.pipeline": pipeline, "embed_pipeline.asset": "run"}
    if dagster_run_id:
        tags[DAGSTER_RUN_TAG] = dagster_run_id
    label = f"{pipeline} {dagster_run_id[:8]}" if dagster_run_id else pipeline
    return client.create_run(experiment_id, tags=tags, run_name=label).info.run_id


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
