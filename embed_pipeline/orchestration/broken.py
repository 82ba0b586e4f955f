"""What stands for a pipeline whose YAML is broken: the others go on, and nobody takes its silence for rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import ValidationError

from embed_pipeline.errors import UserError
from embed_pipeline.masking import without_password
from embed_pipeline.pipeline_file import Document, read_documents
from embed_pipeline.wrong_values import sentences

ASSET = "broken_yaml"
CHECK = "yaml_can_be_loaded"
_AT_NIGHT = "0 2 * * *"  # where the YAML's own time cannot be read


@dataclass(frozen=True)
class Broken:
    """One pipeline, or one folder of pipelines, that cannot be loaded: its file, and why not."""

    file: Path
    reason: str

    @classmethod
    def by(cls, file: Path, error: BaseException) -> Broken:
        """What the innermost error that a user is meant to read says, or else the innermost of all."""
        chain, seen = [error], {id(error)}
        while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and id(inner) not in seen:
            chain.append(inner)
            seen.add(id(inner))
        readable = [one for one in chain if isinstance(one, UserError)]
        last = chain[-1]
        told = (
            str(readable[0]) if readable
            else sentences(last) if isinstance(last, ValidationError)
            else f"{type(last).__name__}: {last}"
        )  # fmt: skip
        if str(file) not in told:
            documents = cls(file, told)._documents()
            told = f"{documents[0].at_named(told) if len(documents) == 1 else file}: {told}"
        return cls(file, without_password(told))

    def name(self, taken: Sequence[str] = ()) -> str:
        """The pipeline's name where it can be read, else that of its folder, made different from those in `taken`."""
        name = next((document.name for document in self._documents() if document.name), None)
        place = self.file.parent if self.file.suffix in (".yaml", ".yml") else self.file
        name = name or re.sub(r"[^a-z0-9]+", "_", place.stem.lower()).strip("_")[:64] or "pipeline"
        while name in taken:
            name += "_broken"
        return name

    def automation(self) -> Mapping[str, Any] | None:
        """What the YAML says under `automation`; None where it cannot be read."""
        documents = self._documents()
        if not documents:
            return None
        found = next((document.attributes.get("automation") for document in documents if document.is_pipeline), None)
        return found if isinstance(found, Mapping) else {}

    def _documents(self) -> list[Document]:
        try:
            return read_documents(self.file)
        except Exception:  # it may be what makes the file broken
            return []


def placeholder(broken: Broken, name: str) -> dg.Definitions:
    """An asset that fails with the reason, its failing check, and a schedule and sensors that say why nothing runs.

    They have the names of the pipeline's own, so whoever looks there finds the reason.
    """

    @dg.asset(
        key=[name, ASSET],
        group_name=name,
        description=f"This pipeline cannot be loaded:\n\n{broken.reason}",
        metadata={"file": dg.MetadataValue.path(str(broken.file))},
        kinds={"yaml"},
    )
    def broken_yaml() -> None:
        raise dg.Failure(broken.reason, allow_retries=False)

    @dg.asset_check(asset=broken_yaml, name=CHECK, blocking=True, description="Fails with the reason.")
    def can_be_loaded() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=False, description=broken.reason, metadata={"file": dg.MetadataValue.path(str(broken.file))}
        )

    job = dg.define_asset_job(
        f"{name}_pipeline", dg.AssetSelection.assets(broken_yaml), description="Fails with the reason."
    )
    told = broken.automation()
    asked = {"watch": True, "retrain": _AT_NIGHT} if told is None else told
    sensors = [_silent_sensor(f"{name}_raw_files", job.name, broken)] if asked.get("watch") is True else []
    schedules = []
    if asked.get("retrain") == "on_change":
        sensors.append(_silent_sensor(f"{name}_retraining", job.name, broken))
    elif asked.get("retrain") is not None:
        schedules = [_silent_schedule(f"{name}_nightly", job.name, broken, asked)]
    return dg.Definitions(
        assets=[broken_yaml], asset_checks=[can_be_loaded], jobs=[job], sensors=sensors, schedules=schedules
    )


def _silent_sensor(name: str, job: str, broken: Broken) -> dg.SensorDefinition:
    @dg.sensor(
        name=name,
        job_name=job,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Says why the pipeline does not run.",
    )
    def silent() -> dg.SkipReason:
        return dg.SkipReason(broken.reason)

    return silent


def _silent_schedule(name: str, job: str, broken: Broken, asked: Mapping[str, Any]) -> dg.ScheduleDefinition:
    """At the time that the YAML asks for; where that cannot be, once a night."""

    def tick(_: dg.ScheduleEvaluationContext) -> dg.SkipReason:
        return dg.SkipReason(broken.reason)

    def at(cron: str, timezone: str) -> dg.ScheduleDefinition:
        return dg.ScheduleDefinition(
            name=name,
            job_name=job,
            cron_schedule=cron,
            execution_timezone=timezone,
            execution_fn=tick,
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Says why the pipeline does not run.",
        )

    try:
        return at(str(asked["retrain"]), str(asked.get("timezone") or "UTC"))
    except Exception:  # what is no time may be anything, and Dagster refuses it in several ways
        return at(_AT_NIGHT, "UTC")
