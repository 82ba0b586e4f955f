"""`type: embed_pipeline.RetrievalPipeline`: one YAML file, one pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import BaseModel, RootModel

from embed_pipeline.errors import ConfigurationError, ModelError
from embed_pipeline.evaluation.guard_files import check_guards
from embed_pipeline.evaluation.nano_beir import check_nano_beir
from embed_pipeline.exporting.forms import check_packages
from embed_pipeline.launch.job import check_site
from embed_pipeline.masking import without_password
from embed_pipeline.models.source import locate
from embed_pipeline.orchestration.assets import ASSET_FACTORIES
from embed_pipeline.orchestration.automation import automated
from embed_pipeline.orchestration.checks import checks_of
from embed_pipeline.orchestration.rollback import rollback_job
from embed_pipeline.pipeline_file import Document, file_in, read_documents, settings_of
from embed_pipeline.settings import ModelSource, PipelineSettings
from embed_pipeline.sources.check import check_all
from embed_pipeline.stages import Pipeline


class PipelineAttributes(RootModel[dict[str, Any]]):
    """Any mapping for Dagster, which shall not judge what it has not read as it is written; the schema is ours."""

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _with_templates(PipelineSettings.model_json_schema(*args, **kwargs))


def _with_templates(schema: Any) -> Any:
    """The schema, which takes `{{ env.NAME }}` and a number such as 1e-5 for every number and every yes or no."""
    if isinstance(schema, list):
        return [_with_templates(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") in ("number", "integer", "boolean"):
        return {**schema, "type": [schema["type"], "string"], "pattern": _TEMPLATE_OR_NUMBER}
    return {key: _with_templates(value) for key, value in schema.items()}


_TEMPLATE_OR_NUMBER = r"^\s*(\{\{\s*env\.\w+\s*\}\}|[-+]?[0-9.]+([eE][-+]?[0-9]+)?)\s*$"


class PipelineScaffolder(dg.Scaffolder):
    """`dg scaffold defs embed_pipeline.RetrievalPipeline NAME` starts from a YAML that says what must be filled in."""

    def scaffold(self, request: dg.ScaffoldRequest) -> None:
        dg.scaffold_component(
            request,
            {
                "name": request.target_path.name,
                "source": {"kind": "pairs", "path": "raw/*.parquet"},
                "embedder": {"base_model": {"hub": "BAAI/bge-small-en-v1.5", "revision": "FILL IN: 40-digit commit"}},
                "reranker": {"base_model": {"hub": "BAAI/bge-reranker-base", "revision": "FILL IN: 40-digit commit"}},
            },
        )


@dg.scaffold_with(PipelineScaffolder)
@dataclass
class RetrievalPipeline(dg.Component):
    """Fine-tune an embedder and a reranker on one domain's questions and documents, and measure what it gained."""

    pipeline: Pipeline

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return PipelineAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> RetrievalPipeline:
        """Read the YAML anew, as it is written, then check every path that can be checked before any work.

        What Dagster hands over went through its templates, which change what is written.
        """
        path = context.component_path
        yaml_file = path.file_path if path.file_path.is_file() else file_in(path.file_path)
        assert yaml_file is not None
        number = path.instance_key if isinstance(path.instance_key, int) else 0
        document = read_documents(yaml_file)[number]
        return cls(pipeline_of(document))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        assets = [asset for factory in ASSET_FACTORIES if (asset := factory(self.pipeline)) is not None]
        return dg.Definitions.merge(
            automated(self.pipeline, assets),
            dg.Definitions(asset_checks=checks_of(self.pipeline), jobs=[rollback_job(self.pipeline)]),
        )


def pipeline_of(document: Document) -> Pipeline:
    """The pipeline of a YAML, when all that it names is there.

    Raises ConfigurationError, or ModelError for a base model, that names the file, the line and the key.
    """
    settings, folder = settings_of(document), document.file.parent
    try:
        check_all(settings.sources, folder, unattended=settings.automation.unattended)
        check_guards(settings.forgetting, folder)
        if settings.evaluation.nano_beir is not None:
            check_nano_beir(folder / settings.evaluation.nano_beir)
        check_packages(settings.exports)
        check_site(settings.launch)
        _check_local_models(settings, folder)
        return Pipeline.of(settings, folder)
    except (ConfigurationError, ModelError) as error:
        raise type(error)(f"{document.at_named(str(error))}: {without_password(str(error))}") from error


def _check_local_models(settings: PipelineSettings, folder: Path) -> None:
    """A local folder or package that is not there fails now; a Hub model is looked for when it is needed."""
    sources: dict[str, ModelSource | str | None] = {
        "embedder.base_model": settings.embedder.base_model,
        "reranker.base_model": settings.reranker.base_model if settings.reranker else None,
        "mining.cross_encoder.model": settings.mining.cross_encoder.model if settings.mining.cross_encoder else None,
    }
    for learn, where in ((settings.embedder, "embedder"), *((extra, extra.where) for extra in settings.extra_sources)):
        sources |= {f"{where}.guide": learn.guide, f"{where}.teacher": learn.teacher}
    for key, source in sources.items():
        if isinstance(source, ModelSource) and source.hub is None:
            try:
                # The weights' hash is checked where they are used: hashing gigabytes is work, not loading.
                locate(source.model_copy(update={"sha256": None}), folder)
            except ModelError as error:
                raise ModelError(f"{key}: {error}") from error
