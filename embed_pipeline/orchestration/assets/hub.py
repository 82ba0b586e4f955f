"""`hub`: the champion with its cards on the Hugging Face Hub."""

from typing import Any

import dagster as dg

from embed_pipeline.artifacts import Artifact
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.reporting import markdown_table, materialized, readable_errors
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_hub


def hub_metadata(hub: Artifact) -> dict[str, Any]:
    """Where each model lies, and since when."""
    from embed_pipeline.publishing.pushing import PushReport

    pushed = PushReport.model_validate(hub.report).pushed
    rows = [
        (kind, at.repository, at.commit, at.tag, "private" if at.private else "public", at.at)
        for kind, at in pushed.items()
    ]
    return {
        "repositories": markdown_table(["model", "repository", "commit", "tag", "", "pushed"], rows),
        **{f"{kind}_on_the_hub": dg.MetadataValue.url(at.url) for kind, at in pushed.items()},
    }


def hub_asset(pipeline: Pipeline) -> dg.AssetsDefinition | None:
    """None where no repository is named."""
    name = pipeline.settings.name
    if pipeline.settings.hub is None:
        return None
    exports = [[name, "exports"]] if pipeline.settings.exports.wanted else []

    @dg.asset(
        key=[name, "hub"],
        deps=[[name, "champion"], *exports],
        group_name=name,
        kinds={"huggingface"},
        code_version=CODE_VERSIONS["hub"],
        retry_policy=retry_policy(pipeline),
        description="The champion's models with their cards, pushed to the Hugging Face Hub.",
    )
    def hub(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            produced = make_hub(pipeline.for_run(context.run_id))
        return materialized(context, produced, hub_metadata(produced.artifact))

    return hub
