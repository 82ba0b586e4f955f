"""`raw_pairs`: the user's files as one table."""

import dagster as dg

from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.reporting import markdown_table, materialized, readable_errors
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_raw_pairs


def raw_pairs_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "raw_pairs"],
        group_name=name,
        kinds={"duckdb", "parquet"},
        code_version=CODE_VERSIONS["raw_pairs"],
        retry_policy=retry_policy(pipeline),
        description="The user's rows as delivered, in one schema, each with its file and row number.",
    )
    def raw_pairs(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            produced = make_raw_pairs(pipeline.for_run(context.run_id))
        report = produced.artifact.report
        files = report["files"]
        return materialized(
            context,
            produced,
            {
                "dagster/row_count": report["rows"],
                "rows_by_kind": markdown_table(["kind", "rows"], list(report["rows_by_kind"].items())),
                "files": markdown_table(
                    ["file", "kind", "rows"], [(f["source"], f["kind"], f["rows"]) for f in files[:50]]
                ),
            },
        )

    return raw_pairs
