"""What happens without a person: watching the raw files, retraining on change or at night, trying again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import dagster as dg
from dagster import AutomationCondition as AC

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.retraining import raw_rows_read, retraining_due
from embed_pipeline.sources.watch import Look, Memory, look_again
from embed_pipeline.stages import Pipeline

RETRY_DELAY_SECONDS = 30.0
INGESTED = ("raw_pairs", "cleaned_pairs")
PIPELINE_TAG = "embed_pipeline/pipeline"
REASON_TAG = "embed_pipeline/reason"
WHOLE_TAG = "embed_pipeline/whole"  # on runs of the whole pipeline, which train on what they cleaned themselves
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def retry_policy(pipeline: Pipeline) -> dg.RetryPolicy | None:
    """A step is tried again after a passing failure; `readable_errors` says which failures are none."""
    retries = pipeline.settings.automation.retries
    if retries == 0:
        return None
    return dg.RetryPolicy(max_retries=retries, delay=RETRY_DELAY_SECONDS, backoff=dg.Backoff.EXPONENTIAL)


def whole_job(pipeline: Pipeline) -> str:
    """The name of the job that runs everything."""
    return f"{pipeline.settings.name}_pipeline"


def ingest_job(pipeline: Pipeline) -> str:
    """The name of the job that reads and cleans the raw files."""
    return f"{pipeline.settings.name}_ingest"


def run_tags(pipeline: Pipeline) -> dict[str, str]:
    """Tags of every run that a job, a sensor or a schedule of this pipeline starts."""
    seconds = round(pipeline.settings.automation.max_run_hours * 3600)
    return {PIPELINE_TAG: pipeline.settings.name, "dagster/max_runtime": str(seconds)}


def automated(pipeline: Pipeline, assets: Sequence[dg.AssetsDefinition]) -> dg.Definitions:
    """The assets with the conditions of their automation, the pipeline's jobs, and what starts them by itself."""
    settings, name = pipeline.settings.automation, pipeline.settings.name
    whole = dg.define_asset_job(
        whole_job(pipeline),
        dg.AssetSelection.assets(*assets),
        tags={**run_tags(pipeline), WHOLE_TAG: name},
        description="Everything, from the raw files to the champion; what was made before is not made again.",
    )
    ingest = dg.define_asset_job(
        ingest_job(pipeline),
        dg.AssetSelection.assets(*([name, asset] for asset in INGESTED)),
        tags=run_tags(pipeline),
        description="Read and clean the raw files.",
    )
    sensors: list[dg.SensorDefinition] = [_watching(pipeline)] if settings.watch else []
    if settings.retrain == "on_change":
        sensors.append(_retraining(pipeline))
        assets = _retrained_on_change(pipeline, assets)
    keys = [key for asset in assets for key in asset.keys]
    schedules = [_nightly(pipeline, keys)] if settings.cron is not None else []
    return dg.Definitions(assets=assets, jobs=[whole, ingest], sensors=sensors, schedules=schedules)


# ----------------------------------------------------------------------------------------------- watching


def _watching(pipeline: Pipeline) -> dg.SensorDefinition:
    """Requests one run for one state of the raw files, once two looks agreed on it."""
    name = pipeline.settings.name

    @dg.sensor(
        name=f"{name}_raw_files",
        job_name=ingest_job(pipeline),
        minimum_interval_seconds=pipeline.settings.automation.watch_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reads and cleans every new state of the raw files, once it has settled.",
    )
    def raw_files(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        before = Memory.model_validate_json(context.cursor) if context.cursor else Memory()
        look = look_again(before, pipeline.settings.sources, pipeline.folder, raw_rows_read(pipeline))
        if look.request is None:
            return _rested(look)
        if run := _unfinished_run(context.instance, pipeline, [dg.AssetKey([name, "raw_pairs"])]):
            return _rested(look.postponed(before, f"run {run} of this pipeline reads them or is about to"))
        request = dg.RunRequest(run_key=look.request, tags={REASON_TAG: look.reason})
        return dg.SensorResult([request], cursor=look.memory.model_dump_json())

    return raw_files


def _rested(look: Look) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=dg.SkipReason(look.reason), cursor=look.memory.model_dump_json())


def _unfinished_run(instance: dg.DagsterInstance, pipeline: Pipeline, keys: Sequence[dg.AssetKey]) -> str | None:
    """A run that is not finished, of one of the pipeline's jobs or for one of `keys`: the first digits of its id."""
    jobs = (whole_job(pipeline), ingest_job(pipeline))
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED)):
        if run.job_name in jobs or not (run.asset_selection or set()).isdisjoint(keys):
            return run.run_id[:8]
    return None


# ------------------------------------------------------------------------------------- retraining on change


def _retraining(pipeline: Pipeline) -> dg.AutomationConditionSensorDefinition:
    name = pipeline.settings.name
    return dg.AutomationConditionSensorDefinition(
        f"{name}_retraining",
        target=dg.AssetSelection.groups(name),
        run_tags=run_tags(pipeline),
        minimum_interval_seconds=pipeline.settings.automation.watch_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Trains and evaluates as soon as the content of the cleaned pairs changed.",
    )


def _retrained_on_change(pipeline: Pipeline, assets: Sequence[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
    """The assets, those after the cleaned pairs with a condition: the first waits for a change, the others follow."""
    first = "hard_negatives" if pipeline.settings.mines else "embedder"
    start = _cleaned_pairs_changed([key for asset in assets for key in asset.keys])
    follow = AC.any_deps_match(AC.will_be_requested()).with_label("what it is made from is made anew")

    def with_condition(spec: dg.AssetSpec) -> dg.AssetSpec:
        asset = spec.key.path[-1]
        if asset in INGESTED:
            return spec
        return spec.replace_attributes(automation_condition=start if asset == first else follow)

    return [asset.map_asset_specs(with_condition) for asset in assets]


def _cleaned_pairs_changed(keys: Sequence[dg.AssetKey]) -> AC:
    """Once for each change of content, when no run is making any of the assets `keys`.

    A change that comes while a training runs waits for its end: nothing but a request answers it. A run that cleans
    and mines answers its own change.
    """
    own = AC.executed_with_root_target() | AC.executed_with_tags(tag_keys={WHOLE_TAG})
    changed = AC.any_deps_match(AC.data_version_changed() & ~own)
    # Said by what is answered, not by what is open: where a change and a request are seen by the same tick, `since`
    # forgets the first of its two, and the request was for the state before the change.
    answered = (AC.newly_requested() | AC.initial_evaluation()).since(changed)
    never_made = AC.newly_missing().since(AC.newly_requested() | AC.newly_updated())
    ready = ~AC.any_deps_missing() & AC.all_deps_blocking_checks_passed()
    busy = reduce(or_, [AC.asset_matches(key, AC.in_progress()) for key in keys])
    return (
        (
            (~answered).with_label("the content of the cleaned pairs changed")
            | never_made.with_label("nothing was ever made from the cleaned pairs")
        )
        & ready.with_label("the cleaned pairs passed their checks")
        & (~busy).with_label("no run of this pipeline is in progress")
    )


# ------------------------------------------------------------------------------------------------ at night


def _nightly(pipeline: Pipeline, keys: Sequence[dg.AssetKey]) -> dg.ScheduleDefinition:
    """Requests a run of the whole pipeline where something is due, and says what, or why nothing is."""
    settings = pipeline.settings.automation
    assert settings.cron is not None

    def tick(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        if run := _unfinished_run(context.instance, pipeline, keys):
            return dg.SkipReason(f"run {run} of this pipeline is in progress")
        due = retraining_due(pipeline)
        return dg.RunRequest(tags={REASON_TAG: due.reason}) if due.due else dg.SkipReason(due.reason)

    try:
        return dg.ScheduleDefinition(
            name=f"{pipeline.settings.name}_nightly",
            job_name=whole_job(pipeline),
            cron_schedule=settings.cron,
            execution_timezone=settings.timezone,
            execution_fn=tick,
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Runs the pipeline where the raw files, the cleaned pairs or the models are not up to date.",
        )
    except dg.DagsterInvalidDefinitionError as error:
        raise ConfigurationError(
            f"automation.retrain: found '{settings.cron}', expected on_change or a cron line of five fields (minute, "
            "hour, day of month, month, day of week), such as '0 2 * * *' for two o'clock every night"
        ) from error
