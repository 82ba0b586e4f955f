"""`cleaned_pairs`: queries, passages and qrels in splits that cannot leak, and what was dropped."""

import dagster as dg

from embed_pipeline.orchestration.overrides import apply_overrides, overrides_of
from embed_pipeline.orchestration.reporting import markdown_table, materialized, readable_errors
from embed_pipeline.settings import CleaningSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_cleaned_pairs

CleaningOverrides = overrides_of(CleaningSettings, "CleaningOverrides")


def cleaned_pairs_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "cleaned_pairs"],
        deps=[[name, "raw_pairs"]],
        group_name=name,
        kinds={"duckdb", "parquet"},
        code_version=CODE_VERSIONS["cleaned_pairs"],
        description="Queries, passages and judgements; every dropped row is kept aside with its reason.",
    )
    def cleaned_pairs(context: dg.AssetExecutionContext, config: CleaningOverrides) -> dg.MaterializeResult:
        with readable_errors():
            cleaning = apply_overrides(pipeline.settings.cleaning, config)
            produced = make_cleaned_pairs(pipeline.for_run(context.run_id, cleaning=cleaning))
        report = produced.artifact.report
        return materialized(context, produced, {})

    return cleaned_pairs
