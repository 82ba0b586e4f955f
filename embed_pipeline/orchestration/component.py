"""`type: embed_pipeline.RetrievalPipeline`: one YAML file, one pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from pydantic import BaseModel

from embed_pipeline.errors import ConfigurationError, ModelError
from embed_pipeline.evaluation.guard_files import check_guards
from embed_pipeline.evaluation.nano_beir import check_nano_beir
from embed_pipeline.exporting.forms import check_packages
from embed_pipeline.launch.job import check_site
from embed_pipeline.models.source import locate
from embed_pipeline.orchestration.assets import ASSET_FACTORIES
from embed_pipeline.orchestration.automation import automated
from embed_pipeline.orchestration.checks import checks_of
from embed_pipeline.orchestration.rollback import rollback_job
from embed_pipeline.settings import ModelSource, PipelineSettings
from embed_pipeline.sources.check import check_all
from embed_pipeline.stages import Pipeline


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
        return PipelineSettings

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> RetrievalPipeline:
        """Resolve templates such as `{{ env.RAW_DATA }}`, then check every path that can be checked before any work."""
        if attributes is None:
            raise ConfigurationError(f"{context.path}: `attributes` is missing: give at least name, source, embedder")
        given = attributes.model_dump(mode="json", exclude_unset=True)
        settings = PipelineSettings.model_validate(context.resolution_context.resolve_value(given))
        yaml_file = context.path / "defs.yaml" if context.path.is_dir() else context.path
        folder = yaml_file.parent
        try:
            check_all(settings.sources, folder, unattended=settings.automation.unattended)
            check_guards(settings.forgetting, folder)
            if settings.evaluation.nano_beir is not None:
                check_nano_beir(folder / settings.evaluation.nano_beir)
            check_packages(settings.exports)
            check_site(settings.launch)
            _check_local_models(settings, folder)
        except (ConfigurationError, ModelError) as error:
            raise type(error)(f"{yaml_file}: {error}") from error
        return cls(Pipeline.of(settings, folder))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        assets = [asset for factory in ASSET_FACTORIES if (asset := factory(self.pipeline)) is not None]
        return dg.Definitions.merge(
            automated(self.pipeline, assets),
            dg.Definitions(asset_checks=checks_of(self.pipeline), jobs=[rollback_job(self.pipeline)]),
        )


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
