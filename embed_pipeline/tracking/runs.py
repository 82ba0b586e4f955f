"""MLflow runs as the launching process sees them: one parent for a Dagster run, one child for each training.

What a run is told goes to its journal first, and a thread of the launching process sends it: a tracking server that is
slow, full or gone costs a warning, and nothing that it is to be told. The launching process alone decides a run's final
status.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embed_pipeline.artifacts import Artifact, PipelineStore
from embed_pipeline.errors import TrackingError
from embed_pipeline.masking import without_password
from embed_pipeline.settings import TrackingSettings
from embed_pipeline.tracking.delivery import (
    CLOSE_SECONDS,
    DAGSTER_RUN_TAG,
    OPEN_SECONDS,
    Sender,
    remove_if_over,
    replay,
)
from embed_pipeline.tracking.journal import Journal, journals, now, told_where
from embed_pipeline.tracking.metrics import (
    JOURNAL_VARIABLE,
    SYSTEM_METRICS_VARIABLE,
    SystemMetrics,
    valid_name,
)
from embed_pipeline.tracking.server import fail_in_seconds, tracking_uri, ui_address

logger = logging.getLogger(__name__)

# Whoever cancels waits: a job has `launch.local.TERMINATE_SECONDS` and KILL_SECONDS to end before, and all of it stays
# below 15. What MLflow was not told by then waits in the store.
INTERRUPTED_SECONDS = 5.0


class TrackedRun:
    """A child run that is open. Every method survives a tracking server that is away, and returns in seconds."""

    def __init__(self, journal: Journal, sender: Sender, *, system_metrics: bool, goes_on: bool) -> None:
        self.journal = journal
        self.goes_on = goes_on  # it was interrupted, and knows its parameters and inputs
        self._sender = sender
        self._system_metrics = system_metrics

    @property
    def is_in_mlflow(self) -> bool:
        """Whether MLflow has made the run; it does so later where it does not answer now."""
        return self._sender.mark.run_id is not None

    @property
    def run_id(self) -> str:
        """Raises TrackingError where MLflow has not made the run."""
        return self._known(self._sender.mark.run_id)

    @property
    def experiment_id(self) -> str:
        """Raises TrackingError where MLflow has not made the run."""
        return self._known(self._sender.mark.experiment_id)

    @property
    def link(self) -> str:
        return f"{ui_address().rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def environment(self) -> dict[str, str]:
        """What rank 0 of a training needs to tell this run of its steps."""
        return {
            JOURNAL_VARIABLE: str(self.journal.path.absolute()),
            SYSTEM_METRICS_VARIABLE: str(self._system_metrics).lower(),
        }

    def log_parameters(self, settings: Mapping[str, Any]) -> None:
        """All settings: flat as parameters, whole as the artifact settings.json."""
        self._tell({"parameters": settings})

    def log_inputs(self, artifacts: Sequence[Artifact], context: str) -> None:
        """The artifacts this run was made from, by their content; `context` says what for."""
        inputs = [
            {
                "name": f"{a.manifest.pipeline}/{a.manifest.asset}",
                "digest": a.content,
                "path": str(a.path),
                "profile": {k: v for k, v in a.report.items() if isinstance(v, int | float)},
            }
            for a in artifacts
        ]
        self._tell({"inputs": inputs, "context": context})

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        if metrics:
            named = {valid_name(name): float(value) for name, value in metrics.items()}
            self._tell({"metrics": named, "step": 0, "at": now()})

    def log_folder(self, folder: Path, name: str) -> None:
        """Upload a folder; where MLflow does not answer it stays in the store alone."""
        self._upload(folder, name, lambda client: client.log_artifacts(self.run_id, str(folder), name))

    def log_file(self, file: Path, folder: str) -> None:
        """Upload a file; where MLflow does not answer it stays in the store alone."""
        self._upload(file, file.name, lambda client: client.log_artifact(self.run_id, str(file), folder))

    @contextmanager
    def system_metrics_of_this_process(self) -> Iterator[None]:
        """Record processor, memory and GPU use while the body runs here (a training's rank 0 does it by itself)."""
        monitor = None
        if self._system_metrics:
            monitor = SystemMetrics(self.journal)
            monitor.start()
        try:
            yield
        finally:
            if monitor is not None:
                monitor.stop()

    def _tell(self, entry: Mapping[str, Any]) -> None:
        try:
            self.journal.append(entry)
        except OSError as error:  # tracking may not cost a finished training
            logger.warning("MLflow will not be told %s of %s: %s", "/".join(entry), self.journal.asset, error)

    def _upload(self, what: Path, name: str, upload: Callable[[Any], None]) -> None:
        import mlflow

        error: object = self._sender.error or "it does not answer"
        # Asked first whether it is there at all: an upload has a time limit for every file.
        if self._sender.flush(OPEN_SECONDS):
            try:
                upload(mlflow.MlflowClient(tracking_uri()))
                return
            except Exception as raised:  # anything: tracking may not cost a finished training
                error = raised
        logger.warning(
            "MLflow did not take %s (%s) of %s; it stays in the store: %s",
            name, what.name, self.journal.asset, without_password(str(error)),
        )  # fmt: skip
        self._tell({"tags": {f"embed_pipeline.in_the_store_only.{name}": what.name}})

    def _known(self, value: str | None) -> str:
        if value is None:
            uri, error = without_password(tracking_uri()), self._sender.error or "it does not answer"
            raise TrackingError(f"MLflow at {uri} made no run for {self.journal.asset}: {error}", passing=True)
        return value


@contextmanager
def tracked_run(
    settings: TrackingSettings,
    store: PipelineStore,
    asset: str,
    dagster_run_id: str | None,
    *,
    goes_on: str | None = None,
) -> Iterator[TrackedRun]:
    """Open a child run for `asset` under the Dagster run's parent; where MLflow is away it is made when it is back.

    `goes_on` is the name of the journal of a run that was interrupted, to be opened again; a new one if it is gone.

    The run ends FINISHED, or FAILED when the body raises, or KILLED when it is interrupted. What MLflow was not told
    then is a warning; it waits in the store for the next run of the pipeline, or for `replay`.
    """
    taken_up = None if goes_on is None else _taken_up(store, asset, goes_on)
    if taken_up is None:
        experiment = settings.experiment or store.pipeline
        run = {"pipeline": store.pipeline, "experiment": experiment, "dagster_run_id": dagster_run_id}
        journal = Journal.new(store.folder, asset, run)
        sender = Sender(journal)
    else:
        journal, sender = taken_up
        journal.append({"again": {"pipeline": store.pipeline, "dagster_run_id": dagster_run_id}, "at": now()})
    sender.flush(OPEN_SECONDS)
    tracked = TrackedRun(journal, sender, system_metrics=settings.system_metrics, goes_on=taken_up is not None)
    status = "FAILED"
    try:
        yield tracked
        status = "FINISHED"
    except Exception:
        raise
    except BaseException:
        status = "KILLED"
        raise
    finally:
        tracked._tell({"ended": status, "at": now()})
        try:
            left = sender.close(INTERRUPTED_SECONDS if status == "KILLED" else CLOSE_SECONDS)
            if left is not None:
                told = told_where([left], store.pipeline)
                logger.warning("MLflow at %s was not told everything: %s", without_password(tracking_uri()), told)
            elif status != "KILLED":
                remove_if_over(journal)
                replay(store.folder, CLOSE_SECONDS)
        except OSError as error:  # the store's disk: tracking may not cost a finished training
            logger.warning("it is not known whether MLflow was told everything of %s: %s", journal.path, error)


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


def _taken_up(store: PipelineStore, asset: str, name: str) -> tuple[Journal, Sender] | None:
    """The journal of an interrupted run, once nobody else sends it."""
    found = [journal for journal in journals(store.folder) if journal.name == name]
    deadline = time.monotonic() + CLOSE_SECONDS
    while found:
        try:
            return found[0], Sender(found[0])
        except FileNotFoundError:
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
    logger.warning("the journal %s is gone or in use: %s has a new MLflow run", name, asset)
    return None
