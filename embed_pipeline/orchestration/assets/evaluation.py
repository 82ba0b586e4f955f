"""`evaluation`: before and after, on questions nobody trained on."""

import dagster as dg

from embed_pipeline.orchestration.overrides import apply_overrides, overrides_of
from embed_pipeline.orchestration.reporting import markdown_table, materialized, readable_errors
from embed_pipeline.settings import EvaluationSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_evaluation

EvaluationOverrides = overrides_of(EvaluationSettings, "EvaluationOverrides")


def evaluation_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "evaluation"],
        deps=[[name, "cleaned_pairs"], [name, "embedder"], [name, "reranker"]],
        group_name=name,
        kinds={"parquet", "mlflow"},
        pool="gpu",
        code_version=CODE_VERSIONS["evaluation"],
        description="Base and fine-tuned models and BM25 on the test split, with intervals of the gains.",
    )
    def evaluation(context: dg.AssetExecutionContext, config: EvaluationOverrides) -> dg.MaterializeResult:
        with readable_errors():
            evaluation = apply_overrides(pipeline.settings.evaluation, config)
            produced = make_evaluation(pipeline.for_run(context.run_id, evaluation=evaluation))
        report = produced.artifact.report
        return materialized(context, produced, {})

    return evaluation
