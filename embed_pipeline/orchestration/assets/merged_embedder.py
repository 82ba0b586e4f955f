"""`merged_embedder`: the fine-tuned embedder, merged with its base where it forgot too much."""

import math
from functools import partial
from typing import Any

import dagster as dg

from embed_pipeline.artifacts import Artifact
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.launching import launch_under_dagster
from embed_pipeline.orchestration.reporting import markdown_table, materialized, picture, readable_errors
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_merged_embedder


def merging_metadata(merged: Artifact) -> dict[str, Any]:
    """What was decided and why, what goes on, and every coefficient that was tried."""
    from embed_pipeline.merging.trade_off import CURVE_FILE, MergingReport, trade_off_table

    report = MergingReport.model_validate(merged.report)
    curve = merged.path / CURVE_FILE
    swept = {"curve": picture(curve.read_text(), "domain and guard sets over coefficients")} if curve.is_file() else {}
    return {
        "decision": report.sentence,
        "outcome": report.outcome,
        "trade_off": markdown_table(*trade_off_table(report)),
        **swept,
        **{name: value for name, value in report.taken.metrics.items() if math.isfinite(value)},
    }


def merged_embedder_asset(pipeline: Pipeline) -> dg.AssetsDefinition | None:
    """None where no guard set is named or merging is off: then the fine-tuned embedder itself goes on."""
    name = pipeline.settings.name
    if pipeline.settings.final_embedder != "merged_embedder":
        return None

    @dg.asset(
        key=[name, "merged_embedder"],
        deps=[[name, "embedder"]],
        group_name=name,
        kinds={"pytorch", "huggingface", "mlflow"},
        pool="gpu",
        code_version=CODE_VERSIONS["merged_embedder"],
        retry_policy=retry_policy(pipeline),
        description="The fine-tuned embedder; where it lost more than the guard sets allow, merged with its base or "
        "with the offer to.",
    )
    def merged_embedder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            produced = make_merged_embedder(pipeline.for_run(context.run_id), partial(launch_under_dagster, context))
        return materialized(context, produced, merging_metadata(produced.artifact))

    return merged_embedder
