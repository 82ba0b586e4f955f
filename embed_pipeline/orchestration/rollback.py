"""`<pipeline>_rollback`: the same as `embed-pipeline rollback`, for a person in the UI."""

import dagster as dg
from pydantic import Field

from embed_pipeline.orchestration.assets.champion import champion_data_version, champion_metadata
from embed_pipeline.orchestration.reporting import readable_errors
from embed_pipeline.stages import Pipeline

DATA_VERSION_TAG = "dagster/data_version"


class RollbackConfig(dg.Config):
    reason: str = Field(description="kept in the history")
    to: str | None = Field(None, description="number of a promotion, or a version; unset: the champion of before")


def rollback_job(pipeline: Pipeline) -> dg.JobDefinition:
    name = pipeline.settings.name

    @dg.op(name=f"{name}_roll_back", pool="gpu")
    def roll_back_champion(context: dg.OpExecutionContext, config: RollbackConfig) -> None:
        from embed_pipeline.tracking.promotion import roll_back

        with readable_errors():
            promotion = roll_back(
                pipeline.store, to=config.to, reason=config.reason, by=f"Dagster run {context.run_id}"
            )
        context.log_event(
            dg.AssetMaterialization(
                dg.AssetKey([name, "champion"]),
                description=f"rolled back: {promotion.reason}",
                metadata=champion_metadata(pipeline.store, promotion),
                tags={DATA_VERSION_TAG: champion_data_version(promotion).value},
            )
        )

    @dg.job(name=f"{name}_rollback", description="Brings back the champion of before, on a person's word.")
    def rollback() -> None:
        roll_back_champion()

    return rollback
