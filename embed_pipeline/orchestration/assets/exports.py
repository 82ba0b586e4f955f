"""`exports`: the champion in other forms, with what each costs."""

from functools import partial
from typing import Any

import dagster as dg

from embed_pipeline.artifacts import Artifact
from embed_pipeline.orchestration.automation import retry_policy
from embed_pipeline.orchestration.launching import launch_under_dagster
from embed_pipeline.orchestration.reporting import materialized, readable_errors
from embed_pipeline.stages import CODE_VERSIONS, Pipeline, make_exports


def exports_metadata(exports: Artifact) -> dict[str, Any]:
    """The one table, and where the forms are."""
    from embed_pipeline.exporting.forms import ExportReport, markdown

    report = ExportReport.model_validate(exports.report)
    return {
        "table": dg.MetadataValue.md(markdown(report)),
        "published": [form.name for form in report.published],
        **{f"{form.name}_difference": form.difference for form in report.forms if form.difference is not None},
    }


def exports_asset(pipeline: Pipeline) -> dg.AssetsDefinition | None:
    """None where no other form is wanted."""
    name = pipeline.settings.name
    if not pipeline.settings.exports.wanted:
        return None

    @dg.asset(
        key=[name, "exports"],
        deps=[[name, "champion"]],
        group_name=name,
        kinds={"onnx", "mlflow"},
        pool="gpu",
        code_version=CODE_VERSIONS["exports"],
        retry_policy=retry_policy(pipeline),
        description="The champion's embedder for other runtimes and in smaller embeddings, each measured against the "
        "original on the test split.",
    )
    def exports(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with readable_errors():
            produced = make_exports(pipeline.for_run(context.run_id), partial(launch_under_dagster, context))
        return materialized(context, produced, exports_metadata(produced.artifact))

    return exports
