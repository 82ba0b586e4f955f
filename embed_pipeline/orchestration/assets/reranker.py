"""`reranker`: the fine-tuned cross-encoder, trained by torchrun."""

from functools import partial

import dagster as dg

from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.launching import launch_under_dagster
from embed_pipeline.orchestration.overrides import Overrides
from embed_pipeline.orchestration.reporting import materialized, readable_errors, training_metadata
from embed_pipeline.settings import RerankerSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_reranker

OVERRIDES = Overrides(RerankerSettings)


def reranker_asset(pipeline: Pipeline) -> dg.AssetsDefinition | None:
    """None where the pipeline ends with its embedder."""
    name, settings = pipeline.settings.name, pipeline.settings.reranker
    if settings is None:
        return None

    @dg.asset(
        key=[name, "reranker"],
        deps=[[name, pipeline.settings.final_embedder]],
        group_name=name,
        kinds={"pytorch", "huggingface", "mlflow"},
        pool="gpu",
        config_schema=OVERRIDES.schema,
        code_version=CODE_VERSIONS["reranker"],
        retry_policy=retry_policy(pipeline),
        description="The fine-tuned reranker, trained on negatives as the fine-tuned embedder retrieves them.",
    )
    def reranker(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            reranker = OVERRIDES.applied(settings, context)
            produced = make_reranker(
                pipeline.for_run(context.run_id, reranker=reranker), partial(launch_under_dagster, context)
            )
        return materialized(context, produced, training_metadata(produced.artifact))

    return reranker
