"""`cleaned_pairs`: queries, passages and qrels in splits that cannot leak, and what was dropped."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from embed_pipeline.artifacts import Artifact
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.overrides import Overrides
from embed_pipeline.orchestration.reporting import markdown_table, materialized, readable_errors
from embed_pipeline.settings import CleaningSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_cleaned_pairs
from embed_pipeline.tables import REJECTED_EXAMPLES_FILE, REJECTED_FILE, connect, source_folder

if TYPE_CHECKING:
    from embed_pipeline.cleaning.clean import CleaningReport
    from embed_pipeline.cleaning.examples import ExamplesReport

OVERRIDES = Overrides(CleaningSettings)
_MISSING_ANSWERS = ("delivered split", "answers", "missing", "questions", "questions without any answer")


def cleaning_metadata(pipeline: Pipeline, cleaned: Artifact) -> dict[str, Any]:
    """What became of the rows, with a look at some that were dropped; a table of each extra source besides."""
    from embed_pipeline.cleaning.clean import CleaningReport
    from embed_pipeline.cleaning.sources import read_reports

    metadata: dict[str, Any] = {}
    for name, report in read_reports(cleaned.report, pipeline.settings.sources).items():
        folder = source_folder(cleaned.path, name)
        found = _about_pairs(folder, report) if isinstance(report, CleaningReport) else _about_examples(folder, report)
        if name is not None:
            found = {f"{name}/{key}": value for key, value in found.items() if key != "dagster/row_count"}
        metadata |= found
    return metadata


def _about_pairs(folder: Path, report: "CleaningReport") -> dict[str, Any]:
    from embed_pipeline.cleaning.reasons import REASONS

    splits = [
        (split, queries, report.positives_by_split.get(split, 0)) for split, queries in report.queries_by_split.items()
    ]
    missing = [(split, a.answers, a.missing, a.queries, a.queries_lost) for split, a in report.answers_by_split.items()]
    positives = max(1, sum(report.positives_by_split.values()))
    return {
        **_about_rows(report, REASONS),
        "rejected_sample": _sample(folder / REJECTED_FILE, ("query", "passage")),
        "splits": markdown_table(["split", "queries", "positives"], splits),
        **({"missing_answers": markdown_table(_MISSING_ANSWERS, missing)} if missing else {}),
        "positives_with_their_query": report.positives_with_their_query,
        "positives_with_their_query_share": report.positives_with_their_query / positives,
        "passages": report.passages,
        "near_duplicate_clusters": report.near_duplicate_clusters,
        "merged_rows": report.merged_rows,
        "withheld_pairs": report.withheld_pairs,
        "groups": report.groups,
        "largest_group": report.largest_group,
    }


def _about_examples(folder: Path, report: "ExamplesReport") -> dict[str, Any]:
    from embed_pipeline.cleaning.reasons import EXAMPLE_REASONS

    splits = [(split, rows, report.scores_by_split.get(split, "")) for split, rows in report.examples_by_split.items()]
    classes = {"classes": markdown_table(["class", "rows"], list(report.classes.items()))} if report.classes else {}
    if spellings := [(name, ", ".join(others)) for name, others in report.class_spellings.items()]:
        classes["class_spellings"] = markdown_table(["class", "also spelled"], spellings[:50])
    return {
        **_about_rows(report, EXAMPLE_REASONS),
        "rejected_sample": _sample(folder / REJECTED_EXAMPLES_FILE, ("sentence1", "sentence2")),
        "splits": markdown_table(["split", "rows", "mean score"], splits),
        **classes,
        "in_one_split_only": f"all {report.apart}",
        "held_out_texts_in_train": report.shared_texts,
        "groups": report.groups,
        "largest_group": report.largest_group,
    }


def _about_rows(report: "CleaningReport | ExamplesReport", meanings: Mapping[str, str]) -> dict[str, Any]:
    reasons = [(reason, rows, meanings[reason]) for reason, rows in report.rejected_by_reason.items()]
    named = [(value, split, n) for split, values in report.split_values.items() for value, n in values.items()]
    missing = [(column, text, n) for column, texts in report.read_as_missing.items() for text, n in texts.items()]
    return {
        "dagster/row_count": report.kept_rows,
        "raw_rows": report.raw_rows,
        "rejected_rows": report.rejected_rows,
        "rejected_by_reason": markdown_table(["reason", "rows", "meaning"], reasons),
        **({"delivered_splits": markdown_table(["delivered as", "read as", "rows"], named)} if named else {}),
        **({"read_as_missing": markdown_table(["column", "text", "rows"], missing)} if missing else {}),
    }


def _sample(rejected: Path, texts: tuple[str, str]) -> dg.MarkdownMetadataValue:
    """Three rows of each reason."""
    with connect() as connection:
        rows = connection.execute(
            f"SELECT reason, source, row_number, detail, {', '.join(texts)} FROM stored(?) QUALIFY "
            "row_number() OVER (PARTITION BY reason ORDER BY source, row_number) <= 3 ORDER BY reason, row_number",
            [str(rejected)],
        ).fetchall()
    return markdown_table(["reason", "file", "row", "detail", *texts], rows)


def cleaned_pairs_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "cleaned_pairs"],
        deps=[[name, "raw_pairs"]],
        group_name=name,
        kinds={"duckdb", "parquet"},
        config_schema=OVERRIDES.schema,
        code_version=CODE_VERSIONS["cleaned_pairs"],
        retry_policy=retry_policy(pipeline),
        description="Queries, passages and judgements, or sentences; every dropped row is kept aside with its reason.",
    )
    def cleaned_pairs(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            cleaning = OVERRIDES.applied(pipeline.settings.cleaning, context)
            produced = make_cleaned_pairs(pipeline.for_run(context.run_id, cleaning=cleaning))
        return materialized(context, produced, cleaning_metadata(pipeline, produced.artifact))

    return cleaned_pairs
