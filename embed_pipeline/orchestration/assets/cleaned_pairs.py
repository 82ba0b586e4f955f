"""`cleaned_pairs`: queries, passages and qrels in splits that cannot leak, and what was dropped."""

from typing import Any

import dagster as dg

from embed_pipeline.artifacts import Artifact
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.overrides import apply_overrides, overrides_of
from embed_pipeline.orchestration.reporting import markdown_table, materialized, readable_errors
from embed_pipeline.settings import CleaningSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_cleaned_pairs
from embed_pipeline.tables import REJECTED_FILE

CleaningOverrides = overrides_of(CleaningSettings, "CleaningOverrides")
_MISSING_ANSWERS = ("delivered split", "answers", "missing", "questions", "questions without any answer")


def cleaning_metadata(cleaned: Artifact) -> dict[str, Any]:
    """What became of the rows, with a look at some that were dropped."""
    import duckdb

    from embed_pipeline.cleaning.clean import CleaningReport
    from embed_pipeline.cleaning.reasons import REASONS

    report = CleaningReport.model_validate(cleaned.report)
    sample = duckdb.execute(
        "SELECT reason, source, row_number, detail, query, passage FROM read_parquet(?) "
        "QUALIFY row_number() OVER (PARTITION BY reason ORDER BY source, row_number) <= 3 ORDER BY reason, row_number",
        [str(cleaned.path / REJECTED_FILE)],
    ).fetchall()
    splits = [
        (split, queries, report.positives_by_split.get(split, 0)) for split, queries in report.queries_by_split.items()
    ]
    missing = [(split, a.answers, a.missing, a.queries, a.queries_lost) for split, a in report.answers_by_split.items()]
    reasons = [(reason, rows, REASONS[reason]) for reason, rows in report.rejected_by_reason.items()]
    return {
        "dagster/row_count": report.kept_rows,
        "raw_rows": report.raw_rows,
        "rejected_rows": report.rejected_rows,
        "rejected_by_reason": markdown_table(["reason", "rows", "meaning"], reasons),
        "rejected_sample": markdown_table(["reason", "file", "row", "detail", "query", "passage"], sample),
        "splits": markdown_table(["split", "queries", "positives"], splits),
        **({"missing_answers": markdown_table(_MISSING_ANSWERS, missing)} if missing else {}),
        "positives_with_their_query": report.positives_with_their_query,
        "positives_with_their_query_share": report.positives_with_their_query / sum(report.positives_by_split.values()),
        "passages": report.passages,
        "near_duplicate_clusters": report.near_duplicate_clusters,
        "merged_rows": report.merged_rows,
        "withheld_pairs": report.withheld_pairs,
        "groups": report.groups,
        "largest_group": report.largest_group,
    }


def cleaned_pairs_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "cleaned_pairs"],
        deps=[[name, "raw_pairs"]],
        group_name=name,
        kinds={"duckdb", "parquet"},
        code_version=CODE_VERSIONS["cleaned_pairs"],
        retry_policy=retry_policy(pipeline),
        description="Queries, passages and judgements; every dropped row is kept aside with its reason.",
    )
    def cleaned_pairs(context: dg.AssetExecutionContext, config: CleaningOverrides) -> dg.MaterializeResult:
        with readable_errors():
            cleaning = apply_overrides(pipeline.settings.cleaning, config)
            produced = make_cleaned_pairs(pipeline.for_run(context.run_id, cleaning=cleaning))
        return materialized(context, produced, cleaning_metadata(produced.artifact))

    return cleaned_pairs
