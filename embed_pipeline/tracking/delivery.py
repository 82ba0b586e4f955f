"""Sends journals to MLflow: every line, in order, until MLflow has it; beside the work, never in its way.

One process at a time sends a journal, which its lock ensures. A line may be sent twice, when an answer was lost:
MLflow keeps a metric with the same step, time and value once, and takes a parameter again that has not changed.
"""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from embed_pipeline.artifacts import RUN_IS_OVER, home
from embed_pipeline.masking import without_password
from embed_pipeline.tracking.journal import Journal, Mark, Waiting, journals, now, waiting, waiting_in
from embed_pipeline.tracking.metrics import valid_name
from embed_pipeline.tracking.server import fail_in_seconds, tracking_uri

logger = logging.getLogger(__name__)

DAGSTER_RUN_TAG = "dagster.run_id"
JOURNAL_TAG = "embed_pipeline.journal"
SETTINGS_FILE = "settings.json"
PARAMETER_LIMIT = 500  # characters; longer values are shortened, the full ones stand in settings.json

OPEN_SECONDS = 30.0  # for the run to be made, before the work begins without it
CLOSE_SECONDS = 60.0  # for what is left at the end, as long as MLflow takes it
OUTAGE_SECONDS = 15.0  # for the same, where it took nothing the last time
_LOOK_SECONDS = 1.0  # between two looks at the journal
_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)  # after a failure, after the next one, ...; the last for ever
_METRICS_AT_ONCE = 1000  # MLflow's limit for a request

_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # sending again would not help


class Sender:
    """Sends one journal from a thread of its own, as it grows. Raises BlockingIOError when another process does."""

    def __init__(self, journal: Journal) -> None:
        import mlflow  # seconds, and not in a thread: other modules are being imported meanwhile

        fail_in_seconds()
        self.journal = journal
        self._client_of = mlflow.MlflowClient
        self._client: Any = None
        self._lock = journal.path.open("rb")
        self.locked = True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise
        except OSError as error:  # a file system without locks
            logger.debug("%s cannot be locked: %s", journal.path, error)
            self.locked = False
        self.mark = journal.mark
        self.error: str | None = None  # of the last try, None when it went well
        self._failures = self._failures_in_a_row = 0
        self._known_to_be_there = False
        self._at_once = _METRICS_AT_ONCE
        self._changed = threading.Condition()
        self._woken = self._closing = self._left = False
        self._thread = threading.Thread(target=self._run, name="mlflow-sender", daemon=True)
        self._thread.start()

    def flush(self, seconds: float) -> bool:
        """Whether MLflow has every line of now, after at most `seconds` or the next try that fails."""
        try:
            target = self.journal.size
        except OSError:
            return False
        with self._changed:
            failures = self._failures
            seconds = seconds if self.error is None else min(seconds, OUTAGE_SECONDS)
            self._wake()
            self._changed.wait_for(lambda: self.mark.bytes >= target or self._failures > failures, seconds)
            return self.mark.bytes >= target

    def close(self, seconds: float | None) -> Waiting | None:
        """Send what is left until a try fails, for at most `seconds` if given; returns what MLflow lacks then."""
        with self._changed:
            self._closing = True
            self._wake()
        started = time.monotonic()
        while self._thread.is_alive():
            waited = time.monotonic() - started
            if (seconds is not None and waited > seconds) or (self.error is not None and waited > OUTAGE_SECONDS):
                break
            self._thread.join(0.1)
        with self._changed:
            self._left = True  # a request that hangs may end whenever it likes, but marks nothing any more
        self._lock.close()
        return waiting_in(self.journal)

    # ------------------------------------------------------------------------------------------- the thread

    def _wake(self) -> None:
        self._woken = True
        self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._woken, seconds)
            self._woken = False

    def _run(self) -> None:
        while not self._left:
            last = self._closing
            try:
                sent = self._send_some()
            except Exception as error:  # anything: what is not sent waits
                self._failed(error)
                if last:
                    return
                self._pause(_PAUSES[min(self._failures_in_a_row, len(_PAUSES)) - 1])
                continue
            if sent:
                self._went_well()
            elif last:
                return
            else:
                self._pause(_LOOK_SECONDS)

    def _failed(self, error: Exception) -> None:
        told = without_password(str(error)).partition("\n")[0][:500]
        if self._failures_in_a_row == 0:
            uri = without_password(tracking_uri())
            logger.warning(
                "MLflow at %s takes nothing, the work goes on; what it is to be told waits in %s: %s",
                uri,
                self.journal.path,
                told,
            )
        self._failures_in_a_row += 1
        self._at_once = max(1, self._at_once // 4)  # a slow server may not answer to as many in time
        with self._changed:
            self.error = told
            self._failures += 1
            self._changed.notify_all()

    def _went_well(self) -> None:
        if self._failures_in_a_row:
            logger.info("MLflow answers again: what waited in %s is being sent", self.journal.path)
        self._failures_in_a_row = 0
        self._at_once = min(_METRICS_AT_ONCE, 2 * self._at_once)
        with self._changed:
            self.error = None
            self._changed.notify_all()

    def _send_some(self) -> bool:
        """Send one line, or as many of metrics as fit into a request; False when nothing is left."""
        entries: list[tuple[dict[str, Any], int]] = []
        figures = 0
        for entry, end in self.journal.read(self.mark.bytes):
            figures += len(entry.get("metrics", ()))
            if entries and ("metrics" not in entry or figures > self._at_once):
                break
            entries.append((entry, end))
            if "metrics" not in entry:
                break
        if not entries:
            return False
        if self._client is None:
            self._client = self._client_of(tracking_uri())
        first, end = entries[0][0], entries[-1][1]
        if "run" in first:
            changes = self._make_run(first["run"])
        elif self._is_gone():
            logger.warning("MLflow run %s is gone: a new one is made and told everything", self.mark.run_id)
            changes, end = Mark().model_dump(exclude={"bytes"}), 0
        else:
            self._tell([entry for entry, _ in entries])
            changes = {}
        self._mark(bytes=end, **changes)
        return True

    def _mark(self, **changes: Any) -> None:
        with self._changed:
            if not self._left:
                self.mark = self.mark.model_copy(update=changes)
                self.journal.set_mark(self.mark)

    # ------------------------------------------------------------------------------------------ the requests

    def _is_gone(self) -> bool:
        """Whether a person deleted the run; asked once, and whenever MLflow refuses something."""
        from mlflow.exceptions import MlflowException

        if not self._known_to_be_there:
            try:
                if self._client.get_run(self.mark.run_id).info.lifecycle_stage != "active":
                    return True
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return True
                raise
            self._known_to_be_there = True
        return False

    def _make_run(self, told: Mapping[str, Any]) -> dict[str, Any]:
        client, pipeline, dagster_run_id = self._client, told["pipeline"], told["dagster_run_id"]
        experiment_id = _experiment(client, told["experiment"])
        named = f"tags.`{JOURNAL_TAG}` = '{self.journal.name}'"
        if self.mark.asked_for_a_run and (found := client.search_runs([experiment_id], named, max_results=1)):
            (run,) = found
            parent_id = run.data.tags["mlflow.parentRunId"]
        else:
            self._mark(asked_for_a_run=True)
            parent_id = _parent_run(client, experiment_id, pipeline, dagster_run_id, told["at"])
            tags = {
                "mlflow.parentRunId": parent_id,
                "embed_pipeline.pipeline": pipeline,
                "embed_pipeline.asset": self.journal.asset,
                JOURNAL_TAG: self.journal.name,
                **({DAGSTER_RUN_TAG: dagster_run_id} if dagster_run_id else {}),
            }
            run = client.create_run(experiment_id, told["at"], tags, f"{pipeline}/{self.journal.asset}")
        return {"run_id": run.info.run_id, "experiment_id": experiment_id, "parent_id": parent_id}

    def _tell(self, entries: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric, Param

        first, run_id = entries[0], self.mark.run_id
        if "metrics" in first:
            figures = [(*figure, told["at"], told["step"]) for told in entries for figure in told["metrics"].items()]
            for start in range(0, len(figures), _METRICS_AT_ONCE):
                self._batch("metrics", [Metric(*figure) for figure in figures[start : start + _METRICS_AT_ONCE]])
        elif "parameters" in first:
            told = _flatten(first["parameters"]).items()
            self._batch("params", [Param(valid_name(key), str(value)[:PARAMETER_LIMIT]) for key, value in told])
            try:
                self._client.log_text(run_id, json.dumps(first["parameters"], indent=2), SETTINGS_FILE)
            except Exception as error:  # files have a store of their own: metrics do not wait for it
                self._client.get_run(run_id)  # but where it is the server that does not answer, this fails too
                logger.warning("MLflow did not take %s of run %s: %s", SETTINGS_FILE, run_id, error)
        elif "inputs" in first:
            data_sets = [_data_set(told, first["context"]) for told in first["inputs"]]
            self._ask(partial(self._client.log_inputs, run_id, datasets=data_sets), "the data sets")
        elif "tags" in first:
            for key, value in first["tags"].items():
                self._ask(partial(self._client.set_tag, run_id, key, value), f"the tag {key}")
        elif "again" in first:
            self._ask(partial(self._client.update_run, run_id, status="RUNNING"), "the status RUNNING")
            self._go_over_to(**first["again"], at=first["at"])
        else:
            for ended in (run_id, self.mark.parent_id):
                status, at = first["ended"], first["at"]
                self._ask(partial(self._client.set_terminated, ended, status, at), f"the status {status}")

    def _go_over_to(self, pipeline: str, dagster_run_id: str | None, at: int) -> None:
        """Another Dagster run goes on with what was interrupted: it stands under that one's parent from now on."""
        if dagster_run_id is None:
            return
        assert self.mark.experiment_id is not None
        parent_id = _parent_run(self._client, self.mark.experiment_id, pipeline, dagster_run_id, at)
        for key, value in (("mlflow.parentRunId", parent_id), (DAGSTER_RUN_TAG, dagster_run_id)):
            self._ask(partial(self._client.set_tag, self.mark.run_id, key, value), f"the tag {key}")
        self._mark(parent_id=parent_id)

    def _batch(self, kind: str, entities: list[Any]) -> None:
        """Send all; where MLflow refuses, one by one, to find which it does not take."""

        def send(some: list[Any]) -> None:
            self._client.log_batch(self.mark.run_id, **{kind: some})

        with suppress(_Refused):
            self._ask(partial(send, entities))
            return
        for entity in entities:
            self._ask(partial(send, [entity]), f"{kind} {entity.key} = {entity.value}")

    def _ask(self, request: Callable[[], Any], what: str | None = None) -> None:
        """Make a request. What MLflow refuses for good is a warning, or _Refused where `what` is not told."""
        from mlflow.exceptions import MlflowException

        try:
            request()
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._known_to_be_there = False
            if self._is_gone():
                raise
            if what is None:
                raise _Refused from error
            logger.warning("MLflow refuses %s of run %s: %s", what, self.mark.run_id, error)


class _Refused(Exception):
    """MLflow will not take it next time either."""


def replay(store: Path, seconds: float | None) -> list[Waiting]:
    """Send what waits in the journals of a pipeline, oldest first; returns what still waits when a try fails.

    It takes at most `seconds`, or as long as it goes well.

    Those that another process is sending are left to it. A run whose process died without a word ends KILLED.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    for journal in journals(store):
        try:
            sender = Sender(journal)
        except (BlockingIOError, FileNotFoundError):
            continue
        if journal.ended is None and sender.locked:
            journal.append({"ended": "KILLED", "at": now()})
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if sender.close(left) is not None:
            break
        remove_if_over(journal)
    return waiting(store)


def remove_if_over(journal: Journal) -> None:
    """Remove a journal of which MLflow has everything. A run that failed may go on, so that it stays for some days."""
    last = journal.ended
    if last and (last["ended"] == "FINISHED" or now() - last["at"] > RUN_IS_OVER.total_seconds() * 1000):
        journal.remove()


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    location = None if tracking_uri().startswith("http") else (home() / "mlflow-artifacts").as_uri()
    return client.create_experiment(name, artifact_location=location)


def _parent_run(client: Any, experiment_id: str, pipeline: str, dagster_run_id: str | None, started: int) -> str:
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
    return client.create_run(experiment_id, started, tags, label).info.run_id


def _data_set(told: Mapping[str, Any], context: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data_set = Dataset(
        name=told["name"],
        digest=told["digest"],
        source_type="local",
        source=json.dumps({"uri": told["path"]}),
        profile=json.dumps(told["profile"]),
    )
    return DatasetInput(data_set, tags=[InputTag("mlflow.data.context", context)])


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat
