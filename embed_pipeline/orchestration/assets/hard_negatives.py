"""`hard_negatives`: what the base embedder takes for answers, without what may be one."""

from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg

from embed_pipeline.artifacts import Artifact
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.launching import launch_under_dagster
from embed_pipeline.orchestration.overrides import Overrides
from embed_pipeline.orchestration.reporting import markdown_table, materialized, picture, readable_errors
from embed_pipeline.settings import MiningSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_hard_negatives

if TYPE_CHECKING:
    from embed_pipeline.mining.report import MiningReport

OVERRIDES = Overrides(MiningSettings)


def mining_metadata(negatives: Artifact) -> dict[str, Any]:
    """What a person looks at before spending GPU hours on these negatives, source by source."""
    from embed_pipeline.mining.report import MiningReport

    told = dict(negatives.report)
    extra = told.pop("extra_sources")
    metadata = _about(MiningReport.model_validate(told)) if told else {}  # none where scored pairs are the own source
    for name, report in extra.items():
        found = _about(MiningReport.model_validate(report))
        metadata |= {f"{name}/{key}": value for key, value in found.items() if key != "dagster/row_count"}
    return metadata


def _about(report: "MiningReport") -> dict[str, Any]:
    from embed_pipeline.mining.plot import score_histogram

    examples = [
        (example.query, why, round(passage.score, 3), passage.text)
        for example in report.examples
        for why, passages in (
            ("positive", example.positives),
            ("taken", example.negatives),
            ("refused", example.refused),
        )
        for passage in passages
    ]
    return {
        "dagster/row_count": report.queries,
        "taken": markdown_table(["negatives", "count"], list(report.taken.items())),
        "refused": markdown_table(["reason", "count"], list(report.refused.items())),
        "queries_with_fewer": report.queries_with_fewer,
        "queries_with_none": report.queries_with_none,
        "similarity": picture(score_histogram(report.scores), "similarity of positives and negatives"),
        "examples": markdown_table(["query", "", "similarity", "passage"], examples),
        "passages_per_second": report.passages_per_second,
        "precision": report.precision,
    }


def hard_negatives_asset(pipeline: Pipeline) -> dg.AssetsDefinition | None:
    name = pipeline.settings.name
    if not pipeline.settings.mines:
        return None

    @dg.asset(
        key=[name, "hard_negatives"],
        deps=[[name, "cleaned_pairs"]],
        group_name=name,
        kinds={"parquet", "sentencetransformers"},
        pool="gpu",
        config_schema=OVERRIDES.schema,
        code_version=CODE_VERSIONS["hard_negatives"],
        retry_policy=retry_policy(pipeline),
        description="Per train query its positives and hard negatives with scores, and what was refused and why.",
    )
    def hard_negatives(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            mining = OVERRIDES.applied(pipeline.settings.mining, context)
            produced = make_hard_negatives(
                pipeline.for_run(context.run_id, mining=mining), partial(launch_under_dagster, context)
            )
        return materialized(context, produced, mining_metadata(produced.artifact))

    return hard_negatives
