"""What starts by itself, when, and what a person is told when it does not: with Dagster's own evaluation tools."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.errors import TrainingError
from embed_pipeline.orchestration import automation
from embed_pipeline.orchestration.assets import hard_negatives, raw_pairs
from embed_pipeline.stages import Pipeline
from tests.made_up_models import make_up_models
from tests.orchestration.conftest import SmallPipeline, settings_of, write_pipeline
from tests.orchestration.test_yaml import changed, told

MakePipeline = Callable[..., SmallPipeline]
INGESTED = ("raw_pairs", "cleaned_pairs")


def raw_file(small: SmallPipeline) -> Path:
    return small.yaml_file.parent / "raw" / "pairs.parquet"


def drop(small: SmallPipeline, name: str, rows: slice) -> None:
    """A raw file with some of the rows that are there."""
    table = pq.read_table(raw_file(small))
    pq.write_table(table.slice(rows.start, rows.stop - rows.start), raw_file(small).with_name(name))


def drop_new_rows(small: SmallPipeline, name: str) -> None:
    rows = [{"question": f"what is {name} {n}", "passage": f"{name} is the answer to {n}"} for n in range(5)]
    rows = [{**row, "document_id": name} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), raw_file(small).with_name(f"{name}.parquet"))


# ------------------------------------------------------------------------------------------- what there is


def test_nothing_starts_by_itself_unless_it_is_asked_for(make_pipeline: MakePipeline) -> None:
    definitions = make_pipeline().definitions()

    assert list(definitions.sensors or []) == []
    assert list(definitions.schedules or []) == []
    assert all(spec.automation_condition is None for spec in definitions.resolve_all_asset_specs())


def test_what_is_asked_for_runs_without_a_click(make_pipeline: MakePipeline) -> None:
    small = make_pipeline(automation={"watch": True, "retrain": "on_change", "max_run_hours": 2})
    definitions = small.definitions()

    statuses = {sensor.name: sensor.default_status for sensor in definitions.sensors or []}
    assert statuses == dict.fromkeys(("small_raw_files", "small_retraining"), dg.DefaultSensorStatus.RUNNING)
    for job in ("small_pipeline", "small_ingest"):
        assert definitions.resolve_job_def(job).tags["dagster/max_runtime"] == "7200"


BAD = [
    ({"automation.retrain": "nightly"}, "automation.retrain: found 'nightly', expected on_change or a cron line"),
    ({"automation.retrain": "0 25 * * *"}, "found '0 25 * * *', expected on_change or a cron line of five fields"),
    ({"automation.timezone": "Europe/Berln"}, "no time zone is called 'Europe/Berln'. Did you mean 'Europe/Berlin'?"),
    ({"automation.retries": -1}, "must be at least 0; found -1"),
    (
        {"automation.watch": True, "source.script": "build.py", "source.script_output": "raw"},
        "automation.watch: source.script builds the raw files anew in every run",
    ),
    (
        {"automation.watch": True, "source.path": "elsewhere/*.parquet"},
        "source.path: no file matches",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(reversed(c)) + f" {i}" for i, (c, _) in enumerate(BAD)])
def test_a_bad_automation_fails_when_definitions_load(
    changes: dict[str, Any], message: str, tmp_path: Path, tiny_bert_folder: Path
) -> None:
    write_pipeline(tmp_path, changed(settings_of(tiny_bert_folder), changes), pairs=2)
    assert message in told(tmp_path)


@pytest.mark.parametrize("asked", [{"watch": True}, {"retrain": "0 2 * * *"}, {"retrain": "on_change"}])
def test_files_may_come_and_go_while_nobody_looks(make_pipeline: MakePipeline, asked: dict[str, Any]) -> None:
    small = make_pipeline(automation=asked)
    raw_file(small).unlink()
    assert small.definitions().resolve_all_asset_specs()


# ---------------------------------------------------------------------------------------------- watching


@dataclass
class Sensor:
    """The sensor `small_raw_files` as the daemon calls it: one look after the other, with the cursor of the last."""

    small: SmallPipeline
    cursor: str | None = None

    def look(self) -> dg.SensorExecutionData:
        definitions = self.small.definitions()
        with self.small.instance as instance:
            context = dg.build_sensor_context(instance=instance, cursor=self.cursor, definitions=definitions)
            found = definitions.resolve_sensor_def("small_raw_files").evaluate_tick(context)
        self.cursor = found.cursor
        return found

    def reason(self) -> str:
        """Why a look asks for nothing."""
        found = self.look()
        assert not found.run_requests
        assert found.skip_message is not None
        return found.skip_message

    def request(self) -> dg.RunRequest:
        """What the second look at a new state asks for."""
        assert "waiting until a second look finds the same" in self.reason()
        (request,) = self.look().run_requests
        return request


def test_one_run_for_one_state_of_the_files(make_pipeline: MakePipeline) -> None:
    small = make_pipeline(automation={"watch": True})
    sensor = Sensor(small)

    asked = sensor.request()
    assert asked.tags["embed_pipeline/reason"] == "1 file settled, with a new content"
    assert sensor.reason().startswith("1 file, unchanged since")

    done = small.definitions().resolve_job_def("small_ingest").execute_in_process(instance=small.instance)
    made = {event.asset_key.path[-1] for event in done.get_asset_materialization_events() if event.asset_key}
    assert made == set(INGESTED)
    assert {check.check_name for check in done.get_asset_check_evaluations()} >= {"splits_do_not_leak_and_rows_add_up"}

    read = small.store.current("raw_pairs").version
    of_a_fresh_deployment = Sensor(small)
    of_a_fresh_deployment.look()
    assert of_a_fresh_deployment.reason() == f"1 file in the state that raw_pairs {read} was read from"

    drop_new_rows(small, "more")
    again = sensor.request()
    assert again.run_key != asked.run_key
    raw_file(small).with_name("more.parquet").unlink()
    assert "raw/more.parquet is gone" in sensor.reason()
    assert sensor.reason() == f"1 file in the state that raw_pairs {read} was read from"


def test_the_files_wait_for_a_run_that_reads_them(make_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_pipeline(automation={"watch": True})
    sensor = Sensor(small)
    sensor.look()
    with held(small, raw_pairs, "make_raw_pairs", monkeypatch, lambda: small.materialize(*INGESTED)) as run_id:
        assert sensor.reason() == (
            f"1 file settled, with a new content, but run {run_id()[:8]} of this pipeline reads them or is about to"
        )
    assert "in the state that raw_pairs" in sensor.reason()


def test_raw_files_that_cannot_be_seen_do_not_end_the_watch(make_pipeline: MakePipeline) -> None:
    small = make_pipeline(automation={"watch": True})
    sensor = Sensor(small)
    folder = raw_file(small).parent
    kept = pq.read_table(raw_file(small))
    sensor.look()
    raw_file(small).unlink()
    assert sensor.reason().startswith("the raw files cannot be seen: source.path: no file matches")
    pq.write_table(kept, folder / "pairs.parquet")
    assert sensor.request().run_key


class held:
    """While the body runs, a run in another thread stands still in the stage `function` of an asset's module."""

    def __init__(
        self,
        small: SmallPipeline,
        module: Any,
        function: str,
        monkeypatch: pytest.MonkeyPatch,
        run: Callable[[], object],
    ) -> None:
        self.small, self.entered, self.go_on = small, threading.Event(), threading.Event()
        stage = getattr(module, function)

        def standing(*arguments: Any, **named: Any) -> Any:
            self.entered.set()
            assert self.go_on.wait(60)
            return stage(*arguments, **named)

        monkeypatch.setattr(module, function, standing)
        self.thread = threading.Thread(target=run)

    def __enter__(self) -> Callable[[], str]:
        self.thread.start()
        assert self.entered.wait(60)
        return self.run_id

    def run_id(self) -> str:
        with self.small.instance as instance:
            (run,) = instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        return run.run_id

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.join()


# ---------------------------------------------------------------------------------- retraining on change


@dataclass
class Conditions:
    """The automation conditions as the daemon evaluates them, tick by tick."""

    small: SmallPipeline
    cursor: Any = None

    def requested(self) -> set[str]:
        definitions = self.small.definitions()
        with self.small.instance as instance:
            found = dg.evaluate_automation_conditions(definitions, instance, cursor=self.cursor)
        self.cursor = found.cursor
        keys = [spec.key for spec in definitions.resolve_all_asset_specs()]
        return {key.path[-1] for key in keys if found.get_num_requested(key)}


@pytest.fixture
def on_change(make_pipeline: MakePipeline) -> SmallPipeline:
    return make_pipeline(automation={"retrain": "on_change"})


def trained(small: SmallPipeline) -> set[str]:
    """The assets that a retraining makes."""
    names = {spec.key.path[-1] for spec in small.definitions().resolve_all_asset_specs()}
    return names - set(INGESTED)


def pretend_to_train(small: SmallPipeline) -> None:
    """The run that the conditions asked for, as far as Dagster knows of it."""
    with small.instance as instance:
        for asset in trained(small):
            instance.report_runless_asset_event(dg.AssetMaterialization(["small", asset]))


def test_a_change_of_the_cleaned_pairs_trains_once(on_change: SmallPipeline) -> None:
    conditions = Conditions(on_change)
    assert conditions.requested() == set(), "nothing was cleaned yet"

    on_change.materialize(*INGESTED)
    assert conditions.requested() == trained(on_change)
    assert {"hard_negatives", "embedder", "reranker", "evaluation"} <= trained(on_change)
    assert conditions.requested() == set()
    pretend_to_train(on_change)
    assert conditions.requested() == set()

    drop(on_change, "again.parquet", slice(0, 2))
    on_change.materialize(*INGESTED)
    assert on_change.store.current("cleaned_pairs").report["rejected_rows"] == 2
    assert conditions.requested() == set(), "rows that are rejected change nothing"

    drop_new_rows(on_change, "more")
    on_change.materialize(*INGESTED)
    assert conditions.requested() == trained(on_change)


def test_what_was_made_before_anybody_asked(on_change: SmallPipeline) -> None:
    on_change.materialize(*INGESTED)
    of_pairs = Conditions(on_change)
    assert of_pairs.requested() == trained(on_change), "cleaned pairs that no model knows yet"
    assert of_pairs.requested() == set()

    pretend_to_train(on_change)
    of_models = Conditions(on_change)
    assert of_models.requested() == set(), "models that were trained before are left alone"
    assert of_models.requested() == set()


def test_pairs_that_failed_a_blocking_check_are_not_trained_on(
    on_change: SmallPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = Conditions(on_change)
    conditions.requested()
    with monkeypatch.context() as patched:
        patched.setattr("embed_pipeline.cleaning.verify.verify", lambda *_: [])
        patched.setattr("embed_pipeline.orchestration.checks.GUARDS", _failing_guards())
        on_change.materialize(*INGESTED, raise_on_error=False)
        assert conditions.requested() == set()
    on_change.materialize(*INGESTED)
    assert conditions.requested() == trained(on_change)


def _failing_guards() -> tuple[Any, ...]:
    from dataclasses import replace

    from embed_pipeline.orchestration.checks import GUARDS

    def splits_do_not_leak_and_rows_add_up(pipeline: Pipeline) -> list[str]:
        return ["they leak"]

    return tuple(
        replace(guard, find=splits_do_not_leak_and_rows_add_up)
        if guard.find.__name__ == splits_do_not_leak_and_rows_add_up.__name__
        else guard
        for guard in GUARDS
    )


def test_a_change_during_a_training_waits_for_its_end(
    on_change: SmallPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = Conditions(on_change)
    on_change.materialize(*INGESTED)
    assert conditions.requested() == trained(on_change)

    run = lambda: on_change.materialize("hard_negatives")  # noqa: E731
    with held(on_change, hard_negatives, "make_hard_negatives", monkeypatch, run):
        drop_new_rows(on_change, "more")
        on_change.materialize(*INGESTED)
        assert conditions.requested() == set()
        assert conditions.requested() == set()
    assert conditions.requested() == trained(on_change)
    assert conditions.requested() == set()


def test_a_run_of_the_whole_pipeline_answers_its_own_change(on_change: SmallPipeline) -> None:
    conditions = Conditions(on_change)
    on_change.materialize(*INGESTED)
    pretend_to_train(on_change)
    conditions.requested()

    drop_new_rows(on_change, "more")
    on_change.materialize(*INGESTED, "hard_negatives")
    assert conditions.requested() == set()

    drop_new_rows(on_change, "still_more")
    whole = on_change.definitions().resolve_job_def("small_pipeline")
    selected = [dg.AssetKey(["small", asset]) for asset in INGESTED]
    whole.execute_in_process(instance=on_change.instance, asset_selection=selected)
    assert conditions.requested() == set()


# ---------------------------------------------------------------------------------------------- at night


@pytest.fixture
def nightly(make_pipeline: MakePipeline) -> SmallPipeline:
    """Cleaned, trained and evaluated, as far as the store knows."""
    small = make_pipeline(automation={"retrain": "30 2 * * *", "timezone": "Europe/Berlin"})
    small.materialize(*INGESTED)
    make_up_models(pipeline_of(small))
    return small


def pipeline_of(small: SmallPipeline) -> Pipeline:
    import yaml

    from embed_pipeline.settings import PipelineSettings

    attributes = yaml.safe_load(small.yaml_file.read_text())["attributes"]
    return Pipeline.of(PipelineSettings.model_validate(attributes), small.yaml_file.parent)


def tick(small: SmallPipeline) -> dg.ScheduleExecutionData:
    definitions = small.definitions()
    schedule = definitions.resolve_schedule_def("small_nightly")
    at = datetime(2026, 11, 21, 1, 30, tzinfo=UTC)
    repository = definitions.get_repository_def()
    with dg.build_schedule_context(small.instance, scheduled_execution_time=at, repository_def=repository) as context:
        return schedule.evaluate_tick(context)


def test_the_schedule_is_that_of_the_yaml(nightly: SmallPipeline) -> None:
    schedule = nightly.definitions().resolve_schedule_def("small_nightly")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 2 * * *", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    assert schedule.job_name == "small_pipeline"


def test_an_unchanged_night_is_skipped_with_a_reason(nightly: SmallPipeline) -> None:
    found = tick(nightly)
    assert not found.run_requests
    assert found.skip_message is not None
    assert found.skip_message.startswith("nothing to retrain: the raw files are those that raw_pairs ")


def test_a_night_after_a_change_runs_the_whole_pipeline(nightly: SmallPipeline) -> None:
    drop_new_rows(nightly, "more")
    (request,) = tick(nightly).run_requests
    assert request.tags["embed_pipeline/reason"].startswith("the raw files are not those that raw_pairs ")


def test_a_night_waits_for_no_second_training(nightly: SmallPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_new_rows(nightly, "more")
    run = lambda: nightly.materialize("hard_negatives")  # noqa: E731
    with held(nightly, hard_negatives, "make_hard_negatives", monkeypatch, run) as run_id:
        found = tick(nightly)
        assert not found.run_requests
        assert found.skip_message == f"run {run_id()[:8]} of this pipeline is in progress"


# --------------------------------------------------------------------------------------------- trying again


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """What the next attempts to make raw_pairs run into; the attempt after them does its work."""
    errors: list[BaseException] = []
    stage = raw_pairs.make_raw_pairs

    def make(pipeline: Pipeline) -> Any:
        if errors:
            raise errors.pop(0)
        return stage(pipeline)

    monkeypatch.setattr(raw_pairs, "make_raw_pairs", make)
    monkeypatch.setattr(automation, "RETRY_DELAY_SECONDS", 0.01)
    return errors


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (TrainingError("rank 0 was ended by SIGKILL", passing=True), True),
        (TrainingError("the loss is NaN"), False),
        (ConnectionResetError("by peer"), True),
    ],
    ids=str,
)
def test_a_step_is_tried_again_where_that_can_help(
    make_pipeline: MakePipeline, attempts: list[BaseException], error: BaseException, retried: bool
) -> None:
    small = make_pipeline()
    attempts.append(error)
    done = small.materialize("raw_pairs", raise_on_error=False)
    assert done.success == retried


def test_a_step_is_not_tried_for_ever(make_pipeline: MakePipeline, attempts: list[BaseException]) -> None:
    small = make_pipeline(automation={"retries": 2})
    attempts += [ConnectionResetError("by peer") for _ in range(4)]
    assert not small.materialize("raw_pairs", raise_on_error=False).success
    assert len(attempts) == 1
