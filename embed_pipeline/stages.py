"""The pipeline from top to bottom: each stage finds its inputs' versions, and makes its own artifact if it must.

These functions are what the Dagster assets call, and what a notebook or a benchmark calls without Dagster. Each
returns the artifact and whether the same recipe had made it before. Heavy libraries are imported where a stage truly
works, so that finding out that nothing changed takes a moment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from embed_pipeline.artifacts import Artifact, Made, PipelineStore, Produced, Recipe, RunIds, store_root
from embed_pipeline.errors import ArtifactError
from embed_pipeline.launch.torchrun import processes_per_node
from embed_pipeline.launch.training import launch_training
from embed_pipeline.models.source import locate, weights_digest
from embed_pipeline.settings import MiningSettings, ModelSource, PipelineSettings, Settings
from embed_pipeline.sources.fingerprint import fingerprint
from embed_pipeline.sources.read import read_sources
from embed_pipeline.sources.script import run_script
from embed_pipeline.tables import (
    CANDIDATES,
    CANDIDATES_FILE,
    HARD_NEGATIVES_FILE,
    MERGED_FILE,
    PASSAGES_FILE,
    PER_QUERY_FILE,
    QRELS_FILE,
    QUERIES_FILE,
    RANKINGS_FILE,
    RAW_FILE,
    REFUSED_FILE,
    REJECTED_FILE,
    write,
)
from embed_pipeline.tracking.runs import TrackedRun, tracked_run
from embed_pipeline.training.job import JOB_FILE, MODEL_FOLDER, SUMMARY_FILE

if TYPE_CHECKING:
    from embed_pipeline.mining.report import MiningReport
    from embed_pipeline.models.embedder import Embedder
    from embed_pipeline.training.job import TrainingJob

# Part of every recipe: raise a stage's number when a change to its code changes what it makes.
CODE_VERSIONS = {
    "raw_pairs": "1",
    "cleaned_pairs": "1",
    "hard_negatives": "1",
    "embedder": "1",
    "reranker": "1",
    "evaluation": "1",
}

Launch = Callable[["TrainingJob", Path, "TrackedRun | None"], None]
"""Runs a training job (its file is the second argument) to its end; raises TrainingError if it fails."""


@dataclass(frozen=True)
class Pipeline:
    """One pipeline's settings, the folder its YAML stands in, its store, and the Dagster run it works for, if any."""

    settings: PipelineSettings
    folder: Path
    store: PipelineStore
    dagster_run_id: str | None = None

    @classmethod
    def of(cls, settings: PipelineSettings, folder: Path) -> Pipeline:
        return cls(settings, folder, PipelineStore(store_root(), settings.name))

    def for_run(self, dagster_run_id: str, **changed: Settings) -> Pipeline:
        """This pipeline in one Dagster run, with the stages' settings that were changed for it."""
        return replace(self, dagster_run_id=dagster_run_id, settings=self.settings.model_copy(update=changed))

    def recipe(self, asset: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> Recipe:
        return Recipe(
            inputs=dict(inputs),
            settings=dict(settings),
            seed=self.settings.seed,
            code_version=CODE_VERSIONS[asset],
        )

    def untracked(self, report: BaseModel) -> Made:
        return Made(report.model_dump(mode="json"), RunIds(dagster=self.dagster_run_id))

    def tracked(self, asset: str) -> AbstractContextManager[TrackedRun | None]:
        return tracked_run(self.settings.tracking, self.settings.name, asset, self.dagster_run_id)

    def runs(self, tracked: TrackedRun | None) -> RunIds:
        if tracked is None:
            return RunIds(dagster=self.dagster_run_id)
        return RunIds(dagster=self.dagster_run_id, mlflow=tracked.run_id, mlflow_link=tracked.link)


def make_raw_pairs(pipeline: Pipeline) -> Produced:
    """The user's files -> one raw parquet table."""
    source = pipeline.settings.source
    run_script(source, pipeline.folder)
    files = json.dumps(fingerprint(source, pipeline.folder), sort_keys=True)
    inputs = {"files": hashlib.sha256(files.encode()).hexdigest()[:16]}
    return pipeline.store.produce(
        "raw_pairs",
        pipeline.recipe("raw_pairs", inputs, source.model_dump(mode="json")),
        lambda out: pipeline.untracked(read_sources(source, pipeline.folder, out)),
        content=[RAW_FILE],
    )


def make_cleaned_pairs(pipeline: Pipeline) -> Produced:
    """Raw rows -> queries, passages, qrels with leak-proof splits, and every dropped row with its reason."""
    from embed_pipeline.cleaning.clean import clean

    settings = pipeline.settings
    raw = pipeline.store.current("raw_pairs")
    return pipeline.store.produce(
        "cleaned_pairs",
        pipeline.recipe("cleaned_pairs", {"raw_pairs": raw.version}, settings.cleaning.model_dump(mode="json")),
        lambda out: pipeline.untracked(clean(raw.path / RAW_FILE, settings.cleaning, settings.seed, out)),
        content=[QUERIES_FILE, PASSAGES_FILE, QRELS_FILE, REJECTED_FILE, MERGED_FILE],
    )


def make_hard_negatives(pipeline: Pipeline) -> Produced:
    """Cleaned pairs -> hard negatives as the base embedder retrieves them."""
    settings = pipeline.settings
    cleaned = pipeline.store.current("cleaned_pairs")
    base = locate(settings.embedder.base_model, pipeline.folder)
    told = {
        "mining": settings.mining.model_dump(mode="json"),
        "encoding": settings.embedder.encoding.model_dump(mode="json"),
        "encode_precision": settings.encode_precision,
    }
    return pipeline.store.produce(
        "hard_negatives",
        pipeline.recipe(
            "hard_negatives", {"cleaned_pairs": cleaned.version, "base_embedder": weights_digest(base)}, told
        ),
        lambda out: pipeline.untracked(_mine(pipeline, cleaned.path, base_embedder(pipeline), settings.mining, out)),
        content=[HARD_NEGATIVES_FILE, REFUSED_FILE],
    )


def make_embedder(pipeline: Pipeline, launch: Launch = launch_training) -> Produced:
    """Hard negatives -> fine-tuned embedder, by one torchrun job."""
    from embed_pipeline.training.job import EmbedderJob

    settings = pipeline.settings.embedder
    negatives = pipeline.store.current("hard_negatives")
    # The split a model was trained on is the one its negatives were mined from, whatever is current by now.
    cleaned = pipeline.store.get("cleaned_pairs", negatives.input("cleaned_pairs"))
    base = locate(settings.base_model, pipeline.folder)
    processes = processes_per_node(settings.nproc_per_node)
    recipe = pipeline.recipe(
        "embedder",
        {
            "cleaned_pairs": cleaned.version,
            "hard_negatives": negatives.version,
            "base_embedder": weights_digest(base),
        },
        {**settings.model_dump(mode="json"), "processes": processes},
    )

    def make(out: Path) -> Made:
        job = EmbedderJob(
            settings=settings,
            seed=pipeline.settings.seed,
            base_model=base,
            trust_remote_code=settings.base_model.trust_remote_code,
            cleaned_pairs=cleaned.path,
            hard_negatives=negatives.path,
            output=out,
            world_size=processes,
        )
        return _train(pipeline, "embedder", job, launch, [cleaned, negatives])

    return pipeline.store.produce("embedder", recipe, make, content=None)


def make_reranker(pipeline: Pipeline, launch: Launch = launch_training) -> Produced:
    """Negatives as the fine-tuned embedder retrieves them -> fine-tuned reranker, by one torchrun job."""
    from embed_pipeline.training.job import RerankerJob

    settings = pipeline.settings.reranker
    mining = pipeline.settings.mining.model_copy(update={"num_negatives": settings.num_negatives})
    embedder = pipeline.store.current("embedder")
    cleaned = pipeline.store.get("cleaned_pairs", embedder.input("cleaned_pairs"))
    base, trust_remote_code = base_reranker(pipeline, embedder)
    processes = processes_per_node(settings.nproc_per_node)
    recipe = pipeline.recipe(
        "reranker",
        {"cleaned_pairs": cleaned.version, "embedder": embedder.version, "base_reranker": weights_digest(base)},
        {**settings.model_dump(mode="json"), "mining": mining.model_dump(mode="json"), "processes": processes},
    )

    def make(out: Path) -> Made:
        from embed_pipeline.mining.retrieve import retrieve

        fine_tuned = fine_tuned_embedder(pipeline, embedder)
        _mine(pipeline, cleaned.path, fine_tuned, mining, out)
        candidates = retrieve(
            cleaned.path, fine_tuned, "dev", settings.dev_top_k, settings.dev_queries, pipeline.settings.seed
        )
        write(candidates, CANDIDATES, out / CANDIDATES_FILE)
        job = RerankerJob(
            settings=settings,
            seed=pipeline.settings.seed,
            base_model=base,
            trust_remote_code=trust_remote_code,
            cleaned_pairs=cleaned.path,
            hard_negatives=out,
            dev_candidates=out / CANDIDATES_FILE,
            output=out,
            world_size=processes,
        )
        return _train(pipeline, "reranker", job, launch, [cleaned, embedder])

    return pipeline.store.produce("reranker", recipe, make, content=None)


def make_evaluation(pipeline: Pipeline) -> Produced:
    """Base and fine-tuned models on the test split that nothing was trained on -> figures and report."""
    settings = pipeline.settings
    cleaned, embedder, reranker = trained_together(pipeline)
    embedder.verify()
    reranker.verify()
    told = {
        "evaluation": settings.evaluation.model_dump(mode="json"),
        "encoding": settings.embedder.encoding.model_dump(mode="json"),
        "encode_precision": settings.encode_precision,
    }
    recipe = pipeline.recipe(
        "evaluation",
        {"cleaned_pairs": cleaned.version, "embedder": embedder.version, "reranker": reranker.version},
        told,
    )

    def make(out: Path) -> Made:
        from embed_pipeline.evaluation.evaluate import ComparedModels, evaluate

        start, trust_remote_code = base_reranker(pipeline, embedder)
        models = ComparedModels(
            base_embedder=locate(settings.embedder.base_model, pipeline.folder),
            base_encoding=settings.embedder.encoding,
            embedder=embedder.path / MODEL_FOLDER,
            base_reranker=start,
            base_reranker_max_length=settings.reranker.query_max_length + settings.reranker.passage_max_length,
            reranker=reranker.path,
            trust_remote_code=settings.embedder.base_model.trust_remote_code or trust_remote_code,
        )
        with pipeline.tracked("evaluation") as tracked:
            report = evaluate(
                cleaned.path,
                models,
                settings.evaluation,
                settings.seed,
                out,
                encode_precision=settings.encode_precision,
                cache_folder=pipeline.store.embeddings_folder,
                title=settings.name,
                versions={a.manifest.asset: a.version for a in (cleaned, embedder, reranker)},
            )
            if tracked is not None:
                tracked.log_parameters(told)
                tracked.log_inputs([cleaned, embedder, reranker])
                tracked.log_metrics({f"{row.system}/{row.metric}": row.value for row in report.summary})
                tracked.log_folder(out, "evaluation")
        told_in_short = {
            "headline": report.details.headline,
            "verdicts": report.details.verdicts,
            "summary": [row.model_dump(mode="json") for row in report.summary],
        }
        return Made(told_in_short, pipeline.runs(tracked))

    return pipeline.store.produce("evaluation", recipe, make, content=["summary.json", PER_QUERY_FILE, RANKINGS_FILE])


def trained_together(pipeline: Pipeline) -> tuple[Artifact, Artifact, Artifact]:
    """Current cleaned pairs, embedder and reranker, if they belong together.

    A model trained on another split may have seen what is a test question now, so raises ArtifactError when the
    lineage of the two models does not lead to the current cleaned pairs and to each other.
    """
    store, name = pipeline.store, pipeline.settings.name
    cleaned, embedder, reranker = (store.current(asset) for asset in ("cleaned_pairs", "embedder", "reranker"))
    if embedder.input("cleaned_pairs") != cleaned.version:
        raise ArtifactError(
            f"{name}/embedder {embedder.version} was trained on cleaned_pairs {embedder.input('cleaned_pairs')}, but "
            f"{cleaned.version} is current: its test questions may have been trained on. Materialize "
            f"{name}/hard_negatives, {name}/embedder and {name}/reranker first"
        )
    if reranker.input("embedder") != embedder.version:
        raise ArtifactError(
            f"{name}/reranker {reranker.version} was trained for embedder {reranker.input('embedder')}, but "
            f"{embedder.version} is current. Materialize {name}/reranker first"
        )
    return cleaned, embedder, reranker


def base_embedder(pipeline: Pipeline) -> Embedder:
    """The base model, encoding as the pipeline's YAML says."""
    from embed_pipeline.models.embedder import Embedder

    settings = pipeline.settings
    source = settings.embedder.base_model
    return Embedder(
        locate(source, pipeline.folder),
        settings.embedder.encoding,
        precision=settings.encode_precision,
        trust_remote_code=source.trust_remote_code,
        cache_folder=pipeline.store.embeddings_folder,
    )


def fine_tuned_embedder(pipeline: Pipeline, embedder: Artifact) -> Embedder:
    """A trained embedder, encoding as its own folder says."""
    from embed_pipeline.models.embedder import Embedder

    settings = pipeline.settings
    return Embedder(
        embedder.path / MODEL_FOLDER,
        precision=settings.encode_precision,
        trust_remote_code=settings.embedder.base_model.trust_remote_code,
        cache_folder=pipeline.store.embeddings_folder,
    )


def base_reranker(pipeline: Pipeline, embedder: Artifact) -> tuple[Path, bool]:
    """Folder of what the reranker starts from, and whether its own Python code may run."""
    source = pipeline.settings.reranker.base_model
    if isinstance(source, ModelSource):
        return locate(source, pipeline.folder), source.trust_remote_code
    return embedder.path / MODEL_FOLDER, pipeline.settings.embedder.base_model.trust_remote_code


def _mine(pipeline: Pipeline, cleaned: Path, embedder: Embedder, settings: MiningSettings, out: Path) -> MiningReport:
    from embed_pipeline.mining.mine import mine
    from embed_pipeline.models.reranker import Reranker

    veto = None
    if settings.veto is not None:
        source = settings.veto.model
        veto = Reranker(
            locate(source, pipeline.folder),
            max_length=settings.veto.max_length,
            precision=pipeline.settings.encode_precision,
            trust_remote_code=source.trust_remote_code,
        )
    return mine(cleaned, embedder, settings, pipeline.settings.seed, out, veto=veto)


def _train(pipeline: Pipeline, asset: str, job: TrainingJob, launch: Launch, inputs: Sequence[Artifact]) -> Made:
    job_file = job.write(job.output / JOB_FILE)
    with pipeline.tracked(asset) as tracked:
        if tracked is not None:
            tracked.log_parameters(job.model_dump(mode="json"))
            tracked.log_inputs(inputs)
        launch(job, job_file, tracked)
        if tracked is not None and pipeline.settings.tracking.log_model:
            tracked.log_folder(job.output / MODEL_FOLDER, "model")
    return Made(json.loads((job.output / SUMMARY_FILE).read_text()), pipeline.runs(tracked))
