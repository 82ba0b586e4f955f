"""`hard_negatives`: what the base embedder takes for answers, without what may be one."""

import dagster as dg

from embed_pipeline.orchestration.overrides import apply_overrides, overrides_of
from embed_pipeline.orchestration.reporting import markdown_table, materialized, readable_errors
from embed_pipeline.settings import MiningSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_hard_negatives

MiningOverrides = overrides_of(MiningSettings, "MiningOverrides")


def hard_negatives_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "hard_negatives"],
        deps=[[name, "cleaned_pairs"]],
        group_name=name,
        kinds={"parquet", "sentencetransformers"},
        pool="gpu",
        code_version=CODE_VERSIONS["hard_negatives"],
        description="Per train query its positives and hard negatives with scores, and what was refused and why.",
    )
    def hard_negatives(context: dg.AssetExecutionContext, config: MiningOverrides) -> dg.MaterializeResult:
        with readable_errors():
            mining = apply_overrides(pipeline.settings.mining, config)
            produced = make_hard_negatives(pipeline.for_run(context.run_id, mining=mining))
        report = produced.artifact.report
        return materialized(context, produced, {})

    return hard_negatives
