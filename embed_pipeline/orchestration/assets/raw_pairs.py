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
        description="The user's rows as delivered, source by source, each with its file and row number.",
    )
    def raw_pairs(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            produced = make_raw_pairs(pipeline.for_run(context.run_id))
        own = produced.artifact.report
        reports = {name: own, **own["extra_sources"]}
        kinds = [(of, kind, rows) for of, report in reports.items() for kind, rows in report["rows_by_kind"].items()]
        files = [(of, f["source"], f["kind"], f["rows"]) for of, report in reports.items() for f in report["files"]]
        not_read = [(of, n["source"], n["reason"]) for of, report in reports.items() for n in report["not_read"]]
        return materialized(
            context,
            produced,
            {
                "dagster/row_count": sum(report["rows"] for report in reports.values()),
                "rows_by_kind": markdown_table(["source", "kind", "rows"], kinds),
                "files": markdown_table(["source", "file", "kind", "rows"], files[:50]),
                "files_not_read": len(not_read),
                **({"not_read": markdown_table(["source", "file", "why"], not_read[:50])} if not_read else {}),
            },
        )

    return raw_pairs
