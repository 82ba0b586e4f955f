"""`embedder`: the fine-tuned bi-encoder, trained by torchrun."""

from functools import partial

import dagster as dg

from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.launching import launch_under_dagster
from embed_pipeline.orchestration.overrides import Overrides
from embed_pipeline.orchestration.reporting import materialized, readable_errors, training_metadata
from embed_pipeline.settings import EmbedderSettings
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_embedder

OVERRIDES = Overrides(EmbedderSettings)


def embedder_asset(pipeline: Pipeline) -> dg.AssetsDefinition:
    name = pipeline.settings.name

    @dg.asset(
        key=[name, "embedder"],
        deps=[[name, "hard_negatives" if pipeline.settings.mines else "cleaned_pairs"]],
        group_name=name,
        kinds={"pytorch", "huggingface", "mlflow"},
        pool="gpu",
        config_schema=OVERRIDES.schema,
        code_version=CODE_VERSIONS["embedder"],
        retry_policy=retry_policy(pipeline),
        description="The fine-tuned embedder: a folder that sentence-transformers and FlagEmbedding load.",
    )
    def embedder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            embedder = OVERRIDES.applied(pipeline.settings.embedder, context)
            produced = make_embedder(
                pipeline.for_run(context.run_id, embedder=embedder), partial(launch_under_dagster, context)
            )
        return materialized(context, produced, training_metadata(produced.artifact))

    return embedder
