"""The pipeline from top to bottom: each stage finds its inputs' versions, and makes its own artifact if it must.

These functions are what the Dagster assets call, and what a notebook or a benchmark calls without Dagster. Each
returns the artifact and whether the same recipe had made it before. Heavy libraries are imported where a stage truly
works, so that finding out that nothing changed takes a moment.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from embed_pipeline import __version__
from embed_pipeline.artifacts import (
    Artifact,
    Claim,
    Made,
    PipelineStore,
    Produced,
    Recipe,
    RunIds,
    is_smoke_test,
    store_root,
)
from embed_pipeline.champions import Champion, models_of, pair_key, pointer, read_history
from embed_pipeline.errors import ArtifactError, CleaningError, ConfigurationError, HubError
from embed_pipeline.evaluation.guard_files import guard_digest
from embed_pipeline.fitting import (
    Circumstances,
    FittedEmbedderSettings,
    FittedRerankerSettings,
    FittedSettings,
    fit_embedder,
    fit_reranker,
)
from embed_pipeline.launch.cores import limit_threads
from embed_pipeline.launch.environment import compute_as_asked
from embed_pipeline.launch.job import Job, Site, launch_job
from embed_pipeline.launch.nodes import NODES_FOLDER
from embed_pipeline.launch.torchrun import has_gpu_driver, processes_per_node, world_size
from embed_pipeline.libraries import COMPUTED, installed
from embed_pipeline.model_files import CHECKPOINTS_FOLDER, JOB_FILE, MODEL_FOLDER, SUMMARY_FILE
from embed_pipeline.models.folder import has_trained_head, pair_length
from embed_pipeline.models.precision import ResolvedPrecision, default_device, resolve_precision
from embed_pipeline.models.shape import shape_of
from embed_pipeline.models.source import locate, weights_digest
from embed_pipeline.settings import (
    SMOKE_TEST_QUERIES,
    EncodingSettings,
    LaunchSettings,
    LossSettings,
    MiningSettings,
    ModelSource,
    PipelineSettings,
    Precision,
    RerankerSettings,
    Settings,
    SourceSettings,
    TrainingSettings,
    smoke_test_of,
)
from embed_pipeline.sources.fingerprint import content_digest, fingerprint, look, refuse_changed, state_digest
from embed_pipeline.sources.read import ReadFile, raw_table, read_sources, refuse_other_prompts
from embed_pipeline.sources.sample import sample_rows
from embed_pipeline.sources.script import run_scripts
from embed_pipeline.tables import (
    CANDIDATES,
    CANDIDATES_FILE,
    EXAMPLES_FILE,
    HARD_NEGATIVES_FILE,
    PASSAGES_FILE,
    QRELS_FILE,
    QUERIES_FILE,
    WITHHELD_FILE,
    count_split,
    extra_folder,
    source_folder,
    write,
)
from embed_pipeline.tracking.runs import TrackedRun, tracked_run
from embed_pipeline.wrong_values import sentences

if TYPE_CHECKING:
    from embed_pipeline.evaluation.compared import ChampionModels, ComparedModels
    from embed_pipeline.evaluation.evaluators import EmbedderEvaluators, RerankerEvaluators
    from embed_pipeline.evaluation.guard_sets import GuardSet
    from embed_pipeline.mining.report import MiningReport
    from embed_pipeline.models.embedder import Embedder
    from embed_pipeline.models.lengths import FittedLengths
    from embed_pipeline.models.ranks import Ranks
    from embed_pipeline.publishing.card import Kind
    from embed_pipeline.tracking.promotion import Promoted
    from embed_pipeline.tracking.registry import Candidate
    from embed_pipeline.training.job import TrainingJob

logger = logging.getLogger(__name__)

# Part of every recipe: raise a stage's number when a change to its code changes what it makes.
CODE_VERSIONS = {
    "raw_pairs": "4",
    "cleaned_pairs": "5",
    "hard_negatives": "3",
    "embedder": "3",
    "merged_embedder": "3",
    "reranker": "3",
    "evaluation": "4",
    "champion": "1",
    "exports": "2",
    "hub": "1",
}

Trained = TypeVar("Trained", FittedEmbedderSettings, FittedRerankerSettings)
Launch = Callable[[Job, Path, "TrackedRun | None", Site], None]
"""Runs a job (its file is the second argument) to its end; raises TrainingError if it fails."""


@dataclass(frozen=True)
class Pipeline:
    """One pipeline's settings, the folder its YAML stands in, its store, and the Dagster run it works for, if any."""

    settings: PipelineSettings
    folder: Path
    store: PipelineStore
    dagster_run_id: str | None = None
    smoke_test: bool = False  # a run in small: see settings.smoke_test_of

    @classmethod
    def of(cls, settings: PipelineSettings, folder: Path) -> Pipeline:
        """The pipeline of a YAML in `folder`, or a smoke test of it where EMBED_PIPELINE_SMOKE_TEST asks for one."""
        small = is_smoke_test()
        told = smoke_test_of(settings) if small else settings
        return cls(told, folder, PipelineStore(store_root(), settings.name), smoke_test=small)

    def for_run(self, dagster_run_id: str, **changed: Settings) -> Pipeline:
        """This pipeline in one Dagster run, with the stages' settings that were changed for it.

        Raises ConfigurationError when a changed stage does not go with the others.
        """
        settings = {**self.settings.model_dump(), **{stage: given.model_dump() for stage, given in changed.items()}}
        store = PipelineStore(self.store.folder.parent, self.settings.name, run=dagster_run_id)
        try:
            return replace(
                self, dagster_run_id=dagster_run_id, settings=PipelineSettings.model_validate(settings), store=store
            )
        except ValidationError as error:
            raise ConfigurationError(f"this run's overrides do not fit the other stages: {sentences(error)}") from error

    @property
    def encode_precision(self) -> ResolvedPrecision:
        """The arithmetic in which models encode and score here."""
        return _resolved_here(self.settings.encode_precision)

    @property
    def site(self) -> Site:
        """Where its jobs run."""
        return Site(self.settings.launch, self.store.folder / NODES_FOLDER)

    def recipe(
        self, asset: str, inputs: Sequence[Artifact], digests: Mapping[str, str], settings: Mapping[str, Any]
    ) -> Recipe:
        """What decides the result: `digests` of models and files, and of each input artifact its content.

        The libraries' versions do only where the YAML says so.
        """
        follows = self.settings.retrain_after_library_upgrade and asset in COMPUTED
        return Recipe(
            inputs={**digests, **{artifact.manifest.asset: artifact.content for artifact in inputs}},
            settings={**settings, **({"libraries": installed()} if follows else {})},
            seed=self.settings.seed,
            code_version=f"{__version__}.{CODE_VERSIONS[asset]}",
        )

    def untracked(self, report: BaseModel) -> Made:
        return Made(report.model_dump(mode="json"), RunIds(dagster=self.dagster_run_id))

    def tracked(self, asset: str, goes_on: str | None = None) -> AbstractContextManager[TrackedRun]:
        return tracked_run(self.settings.tracking, self.store, asset, self.dagster_run_id, goes_on=goes_on)

    def runs(self, tracked: TrackedRun) -> RunIds:
        if not tracked.is_in_mlflow:
            return RunIds(dagster=self.dagster_run_id)
        return RunIds(dagster=self.dagster_run_id, mlflow=tracked.run_id, mlflow_link=tracked.link)


def make_raw_pairs(pipeline: Pipeline) -> Produced:
    """The user's files -> one raw parquet table."""
    settings, folder = pipeline.settings, pipeline.folder
    run_scripts(settings.sources, folder, pipeline.store.script_lists)
    state = state_digest(look(settings.sources, folder))
    files = fingerprint(settings.sources, folder)

    def make(out: Path) -> Made:
        reports: dict[str | None, dict[str, Any]] = {}
        for source in settings.sources:
            rows = source_folder(out, source.extra_name)
            rows.mkdir(parents=True, exist_ok=True)
            report = read_sources(source, folder, rows)
            refuse_other_prompts(report.files, settings.embedder.encoding)
            if pipeline.smoke_test:
                by_kind = sample_rows(rows, SMOKE_TEST_QUERIES, settings.seed)
                report = report.model_copy(update={"rows": sum(by_kind.values()), "rows_by_kind": by_kind})
            reports[source.extra_name] = report.model_dump(mode="json")
        # A file that was still being written would tie rows to a recipe that other rows have.
        refuse_changed(files, settings.sources, folder)
        extra = {name: report for name, report in reports.items() if name is not None}
        return Made({**reports[None], "extra_sources": extra}, RunIds(dagster=pipeline.dagster_run_id))

    content = [_handed_over(source, raw_table(source)[0]) for source in settings.sources]
    produced = pipeline.store.produce(
        "raw_pairs", raw_recipe(pipeline, content_digest(files)), [], make, content=content
    )
    if produced.reused:
        told = produced.artifact.report
        for report in (told, *told["extra_sources"].values()):
            refuse_other_prompts([ReadFile.model_validate(one) for one in report["files"]], settings.embedder.encoding)
    pipeline.store.note_read(produced.artifact, state)
    return produced


def raw_recipe(pipeline: Pipeline, files: str) -> Recipe:
    """What decides the raw rows; `files` is the `content_digest` of the raw files."""
    # What is done with the rows, and under which licence, decides nothing here.
    keys = {"name", *SourceSettings.model_fields} - {"license", "score_range", "positive_label"}
    source, *extra = (source.model_dump(mode="json", include=keys) for source in pipeline.settings.sources)
    told = {**source, "extra_sources": extra}
    if pipeline.smoke_test:
        told["sampled_queries"] = SMOKE_TEST_QUERIES
    return pipeline.recipe("raw_pairs", [], {"files": files}, told)


def _handed_over(source: SourceSettings, name: str) -> str:
    """A source's table, relative to the artifact's folder."""
    return source_folder(Path(), source.extra_name).joinpath(name).as_posix()


def make_cleaned_pairs(pipeline: Pipeline) -> Produced:
    """Raw rows -> queries, passages, qrels with leak-proof splits, and every dropped row with its reason."""
    settings = pipeline.settings
    raw = pipeline.store.current("raw_pairs")

    def make(out: Path) -> Made:
        from embed_pipeline.cleaning.sources import clean_sources, told, verify_sources, verify_sources_apart

        reports = clean_sources(raw.path, settings.sources, settings.cleaning, settings.seed, out)
        broken = verify_sources(raw.path, out, settings.sources, reports)
        if broken := [*broken, *verify_sources_apart(out, settings.sources, reports)]:
            raise CleaningError(f"cleaning broke its own promises, nothing is published: {'; '.join(broken)}")
        return Made(told(reports), RunIds(dagster=pipeline.dagster_run_id))

    # How raw rows are to be understood.
    keys = {"name", "kind", "score_range", "positive_label"}
    sources = [source.model_dump(mode="json", include=keys) for source in settings.sources]
    recipe = pipeline.recipe(
        "cleaned_pairs", [raw], {}, {**settings.cleaning.model_dump(mode="json"), "sources": sources}
    )
    # What was rejected is not handed over: a raw row more that is dropped must not retrain anything.
    handed_over = [
        _handed_over(source, name)
        for source in settings.sources
        for name in (
            (QUERIES_FILE, PASSAGES_FILE, QRELS_FILE, WITHHELD_FILE) if source.is_retrieval else (EXAMPLES_FILE,)
        )
    ]
    return pipeline.store.produce("cleaned_pairs", recipe, [raw], make, content=handed_over)


def make_hard_negatives(pipeline: Pipeline, launch: Launch = launch_job) -> Produced:
    """Cleaned pairs -> hard negatives as the base embedder retrieves them, for each source that has questions."""
    settings = pipeline.settings
    mined = [source for source in settings.sources if source.is_retrieval]
    cleaned = pipeline.store.current("cleaned_pairs")
    base = locate(settings.embedder.base_model, pipeline.folder)
    encoding = encoding_for(pipeline, cleaned, base)
    told = {"encoding": encoding.model_dump(mode="json"), **_mining_told(pipeline, settings.mining)}
    digests = {"base_embedder": weights_digest(base), **_cross_encoder_digest(pipeline)}

    def make(out: Path) -> Made:
        if (lengths := _lengths(pipeline, cleaned, base)) is not None:
            logger.info("%s", lengths.sentence())
        _check_before_mining(pipeline, cleaned)
        ranks = ranks_of(pipeline, launch)
        embedder = base_embedder(pipeline, encoding, ranks)
        reports: dict[str | None, dict[str, Any]] = {}
        for source in mined:
            folder = source_folder(out, source.extra_name)
            folder.mkdir(parents=True, exist_ok=True)
            rows = source_folder(cleaned.path, source.extra_name)
            report = _mine(pipeline, rows, embedder, settings.mining, folder, ranks)
            reports[source.extra_name] = report.model_dump(mode="json")
        extra = {name: report for name, report in reports.items() if name is not None}
        return Made({**reports.get(None, {}), "extra_sources": extra}, RunIds(dagster=pipeline.dagster_run_id))

    recipe = pipeline.recipe("hard_negatives", [cleaned], digests, told)
    content = [_handed_over(source, HARD_NEGATIVES_FILE) for source in mined]
    return pipeline.store.produce("hard_negatives", recipe, [cleaned], make, content=content)


def make_embedder(pipeline: Pipeline, launch: Launch = launch_job) -> Produced:
    """Cleaned pairs, with hard negatives where the source is mined -> fine-tuned embedder, by one torchrun job."""
    from embed_pipeline.training.job import EmbedderJob

    source = pipeline.settings.source
    negatives = pipeline.store.current("hard_negatives") if pipeline.settings.mines else None
    if negatives is None:
        cleaned = pipeline.store.current("cleaned_pairs")
    else:
        # The split a model was trained on is the one its negatives were mined from, whatever is current by now.
        cleaned = pipeline.store.get("cleaned_pairs", negatives.input("cleaned_pairs"))
    inputs = [cleaned] if negatives is None else [cleaned, negatives]
    base = locate(pipeline.settings.embedder.base_model, pipeline.folder)
    settings = _trained_in(pipeline, _fitted_embedder(pipeline, cleaned, base))
    processes = world_size(pipeline.settings.launch, settings.nproc_per_node)
    guides, teachers = _learnt_from(pipeline, "guide"), _learnt_from(pipeline, "teacher")
    digests = {
        "base_embedder": weights_digest(base),
        **{f"guide of {name}": weights_digest(folder) for name, folder in guides.items()},
        **{f"teacher of {name}": weights_digest(folder) for name, folder in teachers.items()},
    }
    told = {**_training_told(pipeline, settings, processes), **_extra_sources_told(pipeline, "embedder")}
    recipe = pipeline.recipe("embedder", inputs, digests, told)

    def make(out: Path, claim: Claim) -> Made:
        _load_guards(pipeline)  # a guard set that cannot be read is told before the training, not after
        job = EmbedderJob(
            settings=settings,
            seed=pipeline.settings.seed,
            base_model=base,
            trust_remote_code=settings.base_model.trust_remote_code,
            source_name=pipeline.settings.name,
            source_kind=source.kind,
            extra_sources=pipeline.settings.extra_sources,
            cleaned_pairs=cleaned.path,
            hard_negatives=negatives.path if negatives is not None else None,
            guides=guides,
            teachers=teachers,
            output=out,
            world_size=processes,
        )
        return _train(pipeline, "embedder", claim, job, launch, inputs)

    return _produce_model(pipeline, "embedder", recipe, inputs, make)


def make_merged_embedder(pipeline: Pipeline, launch: Launch = launch_job) -> Produced:
    """Fine-tuned embedder -> the same, or where it lost more than the guard sets allow, merged with its base."""
    from embed_pipeline.merging.trade_off import DIGEST_FILE

    settings = pipeline.settings
    embedder = pipeline.store.current("embedder")
    cleaned = pipeline.store.get("cleaned_pairs", embedder.input("cleaned_pairs"))
    _refuse_another_base(pipeline, embedder)
    base = locate(settings.embedder.base_model, pipeline.folder)
    inputs, trust = [cleaned, embedder], settings.embedder.base_model.trust_remote_code
    encoding = encoding_for(pipeline, cleaned, base)
    told = {
        "forgetting": settings.forgetting.model_dump(mode="json"),
        "encoding": encoding.model_dump(mode="json"),
        "encode_precision": pipeline.encode_precision,
        "device": device_kind(),
    }

    def make(out: Path) -> Made:
        from embed_pipeline.merging.merge import Ancestry, DevPairs, merge
        from embed_pipeline.training.dev_set import EmbedderDevSet
        from embed_pipeline.training.job import EmbedderJob

        job = EmbedderJob.read(embedder.path / JOB_FILE).model_copy(update={"cleaned_pairs": cleaned.path})
        with pipeline.tracked("merged_embedder") as tracked, tracked.system_metrics_of_this_process():
            report = merge(
                Ancestry(base, encoding, embedder.path / MODEL_FOLDER, trust),
                # What the training chose its best weights by.
                EmbedderDevSet.read(job) if settings.source.is_retrieval else DevPairs.read(job),
                _load_guards(pipeline),
                settings.forgetting,
                out,
                encode_precision=pipeline.encode_precision,
                ranks=ranks_of(pipeline, launch),
            )
            tracked.log_parameters(told)
            tracked.log_inputs(inputs, "merging")
            tracked.log_metrics(report.taken.metrics)
            if report.outcome == "merged" and settings.tracking.log_model:
                tracked.log_folder(out / MODEL_FOLDER, "model")
        return Made(report.model_dump(mode="json"), pipeline.runs(tracked))

    digests = {"base_embedder": weights_digest(base), **_guard_digests(pipeline)}
    recipe = pipeline.recipe("merged_embedder", inputs, digests, told)
    # The weights are what is handed over: where the same ones go on, nothing after them is trained again.
    return pipeline.store.produce("merged_embedder", recipe, inputs, make, content=[DIGEST_FILE])


def final_embedder(pipeline: Pipeline) -> Artifact:
    """The embedder that goes on to the reranker and to the gate: the fine-tuned one, or what merging made of it.

    Raises ArtifactError when merging has not yet looked at the current embedder, guard sets or settings.
    """
    final = pipeline.store.current(pipeline.settings.final_embedder)
    if final.manifest.asset == "embedder":
        return final
    embedder, made_from = pipeline.store.current("embedder"), final.manifest.recipe
    expected = {"embedder": embedder.content, **_guard_digests(pipeline)}
    forgetting = pipeline.settings.forgetting.model_dump(mode="json")
    found = {name: made_from.inputs.get(name) for name in expected}
    if found != expected or made_from.settings["forgetting"] != forgetting:
        raise ArtifactError(
            f"{_title(final)} was made from embedder {final.input('embedder')}, but the embedder (current is "
            f"{embedder.version}), a guard set or the settings under `forgetting` changed since. Materialize "
            f"{pipeline.settings.name}/merged_embedder first"
        )
    return final


def make_reranker(pipeline: Pipeline, launch: Launch = launch_job) -> Produced:
    """Negatives as the fine-tuned embedder retrieves them -> fine-tuned reranker, by one torchrun job."""
    from embed_pipeline.training.job import RerankerJob

    asked, window = pipeline.settings.reranker, pipeline.settings.evaluation.rerank_top_k
    assert asked is not None, "this pipeline has no reranker"
    mining = pipeline.settings.mining.model_copy(update={"num_negatives": asked.num_negatives})
    embedder = final_embedder(pipeline)
    cleaned = pipeline.store.get("cleaned_pairs", embedder.input("cleaned_pairs"))
    base, trust_remote_code = base_reranker(pipeline, embedder)
    settings = _trained_in(pipeline, _fitted_reranker(pipeline, asked, cleaned, base))
    processes = world_size(pipeline.settings.launch, settings.nproc_per_node)
    recipe = pipeline.recipe(
        "reranker",
        [cleaned, embedder],
        {"base_reranker": weights_digest(base), **_cross_encoder_digest(pipeline)},
        {
            **_training_told(pipeline, settings, processes),
            **_mining_told(pipeline, mining),
            **_extra_sources_told(pipeline, "reranker"),
            "rerank_top_k": window,
        },
    )

    def make(out: Path, claim: Claim) -> Made:
        from embed_pipeline.mining.retrieve import retrieve

        pair_length(base, settings)  # lengths that the model cannot take are told before mining, not after
        ranks = ranks_of(pipeline, launch)
        fine_tuned = fine_tuned_embedder(pipeline, embedder, ranks)
        _mine(pipeline, cleaned.path, fine_tuned, mining, out, ranks)
        for extra in pipeline.settings.extra_sources:
            if extra.is_retrieval and extra.reranker_loss is not None:
                folder = extra_folder(out, extra.name)
                folder.mkdir(parents=True)
                _mine(pipeline, extra_folder(cleaned.path, extra.name), fine_tuned, mining, folder, ranks)
        candidates = retrieve(
            cleaned.path, fine_tuned, "dev", window, settings.dev_queries, pipeline.settings.seed, ranks=ranks
        )
        write(candidates, CANDIDATES, out / CANDIDATES_FILE)
        job = RerankerJob(
            settings=settings,
            seed=pipeline.settings.seed,
            base_model=base,
            trust_remote_code=trust_remote_code,
            source_name=pipeline.settings.name,
            source_kind=pipeline.settings.source.kind,
            extra_sources=pipeline.settings.extra_sources,
            cleaned_pairs=cleaned.path,
            hard_negatives=Path(),
            dev_candidates=Path(CANDIDATES_FILE),
            output=out,
            world_size=processes,
        )
        return _train(pipeline, "reranker", claim, job, launch, [cleaned, embedder])

    return _produce_model(pipeline, "reranker", recipe, [cleaned, embedder], make)


def make_evaluation(pipeline: Pipeline, launch: Launch = launch_job) -> Produced:
    """Base models, candidate and champion on the test split -> figures, the gate's verdict, and the report."""
    settings = pipeline.settings
    cleaned, embedder, reranker = trained_together(pipeline)
    inputs = [artifact for artifact in (cleaned, embedder, reranker) if artifact is not None]
    champion = reference(pipeline, embedder, reranker)
    told = {
        "evaluation": settings.evaluation.model_dump(mode="json"),
        "gate": settings.gate.model_dump(mode="json"),
        "forgetting": settings.forgetting.model_dump(mode="json", exclude={"coefficients"}),
        "sources": {source.extra_name or settings.name: source.kind for source in settings.sources},
        "encode_precision": pipeline.encode_precision,
        "device": device_kind(),
    }

    def make(out: Path) -> Made:
        from embed_pipeline.evaluation.evaluate import evaluate
        from embed_pipeline.evaluation.evaluate_pairs import evaluate_pairs
        from embed_pipeline.evaluation.history import history_of

        with pipeline.tracked("evaluation") as tracked, tracked.system_metrics_of_this_process():
            of_rerankers = _reranker_test_evaluators(pipeline, cleaned) if reranker else None
            measure = partial(evaluate, reranker_evaluators=of_rerankers)
            report = (measure if settings.source.is_retrieval else evaluate_pairs)(
                cleaned.path,
                _compared_models(pipeline, cleaned, embedder, reranker, champion),
                settings.evaluation,
                settings.seed,
                out,
                gate=settings.gate,
                guards=_load_guards(pipeline),
                # Where merging looked at one half of a guard set, the other half judges.
                guard_part="all" if settings.final_embedder == "embedder" else "judging",
                evaluators=_test_evaluators(pipeline, cleaned),
                history=history_of(pipeline.store),
                encode_precision=pipeline.encode_precision,
                ranks=ranks_of(pipeline, launch),
                title=settings.name,
                versions={a.manifest.asset: a.version for a in inputs},
            )
            tracked.log_parameters(told)
            tracked.log_inputs(inputs, "evaluation")
            tracked.log_metrics({f"{row.system}/{row.metric}": row.value for row in report.summary})
            tracked.log_metrics(report.details.source_metrics)
            tracked.log_folder(out, "evaluation")
        told_in_short = {
            "headline": report.details.headline,
            "verdicts": report.details.verdicts,
            "metric": settings.gate.metric,
            "reference": champion.key if champion else None,
            "gate": report.details.gate.model_dump(mode="json"),
            "summary": [row.model_dump(mode="json") for row in report.summary],
            "evaluators": report.details.source_metrics,
        }
        return Made(told_in_short, pipeline.runs(tracked))

    digests = {
        **_guard_digests(pipeline),
        **_evaluator_digests(pipeline),
        "champion": champion.key if champion else "none",
    }
    recipe = pipeline.recipe("evaluation", inputs, digests, told)
    return pipeline.store.produce("evaluation", recipe, inputs, make, content=None)


def _compared_models(
    pipeline: Pipeline, cleaned: Artifact, embedder: Artifact, reranker: Artifact | None, champion: Champion | None
) -> ComparedModels:
    from embed_pipeline.evaluation.compared import ComparedModels

    settings = pipeline.settings.embedder
    base = locate(settings.base_model, pipeline.folder)
    models = ComparedModels(
        base_embedder=base,
        base_encoding=encoding_for(pipeline, cleaned, base),
        embedder=embedder.path / MODEL_FOLDER,
        champion=_champion_models(pipeline, champion, cleaned) if champion else None,
        trust_embedder_code=settings.base_model.trust_remote_code,
        trust_reranker_code=settings.base_model.trust_remote_code,  # of a champion's reranker, if nothing else
    )
    if reranker is None:
        return models
    start, start_trusts = base_reranker(pipeline, embedder)
    # The lengths the reranker was trained with: a run may have changed those of the YAML.
    trained = reranker.manifest.recipe.settings
    return replace(
        models,
        base_reranker=start,
        base_reranker_max_length=trained["query_max_length"] + trained["passage_max_length"],
        reranker=reranker.path,
        trust_reranker_code=start_trusts,
    )


def _test_evaluators(pipeline: Pipeline, cleaned: Artifact) -> EmbedderEvaluators | None:
    """The library's evaluators on the test split of every source, and on NanoBEIR where there is a copy.

    What `evaluate` measures of the own source is not measured again.
    """
    from embed_pipeline.evaluation.evaluators import EmbedderEvaluators, MeasuredSource, embedder_evaluators
    from embed_pipeline.evaluation.nano_beir import nano_beir_parts
    from embed_pipeline.models.embedder import Embedder

    settings, teachers = pipeline.settings, _learnt_from(pipeline, "teacher")
    sources = []
    for source in settings.sources:
        name = source.extra_name or settings.name
        own = source.extra_name is None
        if own and not source.is_retrieval:
            continue
        teacher = teachers.get(name) if source.kind == "parallel" else None
        sources.append(
            MeasuredSource(
                name,
                source.kind,
                source_folder(cleaned.path, source.extra_name),
                search=not own,
                teacher=Embedder(teacher, precision=pipeline.encode_precision) if teacher is not None else None,
            )
        )
    found = embedder_evaluators(
        sources,
        "test",
        seed=settings.seed,
        max_queries=settings.evaluation.source_queries,
        max_passages=settings.evaluation.source_passages,
    )
    parts = found.parts if found is not None else ()
    if settings.evaluation.nano_beir is not None:
        parts = (*parts, *nano_beir_parts(pipeline.folder / settings.evaluation.nano_beir))
    return EmbedderEvaluators(parts) if parts else None


def _reranker_test_evaluators(pipeline: Pipeline, cleaned: Artifact) -> RerankerEvaluators | None:
    """The same for the reranker, on the extra sources that it has learnt from."""
    from embed_pipeline.evaluation.evaluators import MeasuredSource, reranker_evaluators

    settings = pipeline.settings
    queries, reranked = settings.evaluation.source_queries, settings.evaluation.rerank_queries
    return reranker_evaluators(
        [
            MeasuredSource(extra.name, extra.kind, extra_folder(cleaned.path, extra.name))
            for extra in settings.extra_sources
            if extra.reranker_loss is not None
        ],
        "test",
        seed=settings.seed,
        max_queries=queries if reranked is None else min(queries, reranked),
        max_passages=settings.evaluation.source_passages,
    )


def _evaluator_digests(pipeline: Pipeline) -> dict[str, str]:
    """Of what the evaluators read besides the cleaned pairs."""
    from embed_pipeline.evaluation.nano_beir import nano_beir_digest

    settings, teachers = pipeline.settings, _learnt_from(pipeline, "teacher")
    parallel = [extra.name for extra in settings.extra_sources if extra.kind == "parallel"]
    digests = {f"teacher of {name}": weights_digest(teachers[name]) for name in parallel if name in teachers}
    if settings.evaluation.nano_beir is not None:
        digests["nano_beir"] = nano_beir_digest(pipeline.folder / settings.evaluation.nano_beir)
    return digests


def make_champion(pipeline: Pipeline) -> Promoted:
    """A candidate that passed the gate -> its models in MLflow's registry, the aliases and the store's pointer moved.

    Raises ArtifactError, GateError, ModelError or TrackingError where it may not serve; nothing has moved then.
    """
    from embed_pipeline.tracking.promotion import person, promote

    run = pipeline.dagster_run_id
    return promote(
        pipeline.store,
        _candidate(pipeline),
        lambda: pipeline.tracked("champion"),
        by=f"Dagster run {run}" if run else person(),
        smoke_test=pipeline.smoke_test,
    )


def mark_challenger(pipeline: Pipeline) -> None:
    """A candidate that did not pass -> the alias `challenger`, if MLflow answers. A smoke test marks nothing."""
    from embed_pipeline.tracking.promotion import challenge

    if not pipeline.smoke_test:
        challenge(pipeline.store, _candidate(pipeline), lambda: pipeline.tracked("challenger"))


def write_champion_cards(pipeline: Pipeline) -> dict[Kind, Path]:
    """The champion's model cards, beside the record of its promotion: its models' own folders are sealed."""
    from embed_pipeline.publishing.card import Carded, write_cards

    champion = _in_force(pipeline)
    return write_cards(Carded(pipeline.settings, pipeline.store, champion), pointer(pipeline.store).resolve())


def make_exports(pipeline: Pipeline, launch: Launch = launch_job) -> Produced:
    """The champion -> its other forms, each measured on the test split against the original; one table."""
    from embed_pipeline.exporting.forms import REPORT_FILE, TABLE_FILE, check_packages, library_versions

    settings, store = pipeline.settings, pipeline.store
    check_packages(settings.exports)
    champion = _in_force(pipeline)
    embedder, reranker = _models_in_force(store, champion)
    cleaned, evaluation = (
        store.get("cleaned_pairs", champion.cleaned_pairs),
        store.get("evaluation", champion.evaluation),
    )
    inputs = [artifact for artifact in (cleaned, embedder, reranker, evaluation) if artifact is not None]
    told = {
        "exports": settings.exports.model_dump(mode="json"),
        "evaluation": settings.evaluation.model_dump(mode="json", include={"bootstrap_samples", "confidence"}),
        "encode_precision": pipeline.encode_precision,
        "device": device_kind(),
        "libraries": library_versions(settings.exports),
    }

    def make(out: Path) -> Made:
        from embed_pipeline.evaluation.parity import read_parity
        from embed_pipeline.exporting.export import ExportedModels, export
        from embed_pipeline.exporting.measure import load_test_split
        from embed_pipeline.tracking.registry import trusts_code

        models = ExportedModels(
            embedder.path / MODEL_FOLDER,
            reranker.path / MODEL_FOLDER if reranker else None,
            trust_embedder_code=trusts_code(store, embedder),
            trust_reranker_code=trusts_code(store, reranker) if reranker else False,
        )
        test = load_test_split(cleaned.path, settings.exports, settings.seed, scored=not settings.source.is_retrieval)
        with pipeline.tracked("exports") as tracked, tracked.system_metrics_of_this_process():
            report = export(
                models,
                test,
                settings.exports,
                settings.evaluation,
                settings.seed,
                out,
                parity=read_parity(evaluation.path) if reranker else None,
                precision=pipeline.encode_precision,
                ranks=ranks_of(pipeline, launch),
                versions={artifact.manifest.asset: artifact.version for artifact in inputs},
            )
            tracked.log_parameters(told)
            tracked.log_inputs(inputs, "exports")
            tracked.log_metrics(report.metrics)
            for file in (REPORT_FILE, TABLE_FILE):
                tracked.log_file(out / file, "exports")
        return Made(report.model_dump(mode="json"), pipeline.runs(tracked))

    recipe = pipeline.recipe("exports", inputs, {}, told)
    return store.produce("exports", recipe, inputs, make, content=None)


def make_hub(pipeline: Pipeline) -> Produced:
    """The champion with its cards -> the Hub's repositories; what lies there already is not pushed again.

    Raises HubError where nobody serves, in a smoke test, and where the Hub refuses.
    """
    from embed_pipeline.publishing.card import Carded
    from embed_pipeline.publishing.pushing import push_champion, pushed_already

    settings, store = pipeline.settings, pipeline.store
    assert settings.hub is not None
    if pipeline.smoke_test:
        raise HubError("a smoke test pushes nothing to the Hub: what it makes is not any good")
    champion = _in_force(pipeline)
    embedder, reranker = _models_in_force(store, champion)
    exports = store.current("exports") if settings.exports.wanted else None
    if exports is not None and exports.manifest.recipe.inputs.get(embedder.manifest.asset) != embedder.content:
        raise ArtifactError(
            f"{_title(exports)} is not of {_title(embedder)}, which serves. Materialize {settings.name}/exports first"
        )
    inputs = [artifact for artifact in (embedder, reranker, exports) if artifact is not None]
    told = {"hub": settings.hub.model_dump(mode="json"), "card": settings.card.model_dump(mode="json")}
    recipe = pipeline.recipe("hub", inputs, {"evaluation": champion.evaluation}, told)
    last = store.whole_current("hub")
    if last is not None and pushed_already(last, recipe):
        return Produced(last, reused=True)
    # After a rollback the same models are pushed again: something else lies in the repositories by then.
    after = {**recipe.inputs, "after": last.version if last else "nothing"}

    def make(out: Path) -> Made:
        assert settings.hub is not None
        return pipeline.untracked(push_champion(Carded(settings, store, champion), settings.hub, exports, out))

    return store.produce("hub", recipe.model_copy(update={"inputs": after}), inputs, make, content=None)


def _in_force(pipeline: Pipeline) -> Champion:
    """Who serves; raises ArtifactError when nobody does."""
    champion = read_history(pipeline.store).champion
    if champion is None:
        name = pipeline.settings.name
        raise ArtifactError(f"{name} has no champion: materialize {name}/champion first")
    return champion


def _models_in_force(store: PipelineStore, champion: Champion) -> tuple[Artifact, Artifact | None]:
    embedder, *others = models_of(store, champion)
    return embedder, others[0] if others else None


def _candidate(pipeline: Pipeline) -> Candidate:
    """The current models with the evaluation that judged them; raises ArtifactError where it judged others."""
    from embed_pipeline.tracking.registry import Candidate

    cleaned, embedder, reranker = trained_together(pipeline)
    evaluation = pipeline.store.current("evaluation")
    for artifact in (cleaned, embedder, reranker):
        if artifact is None:
            continue
        asset = artifact.manifest.asset
        if evaluation.manifest.recipe.inputs.get(asset) != artifact.content:
            raise ArtifactError(
                f"{_title(evaluation)} was made with {asset} {evaluation.manifest.inputs.get(asset, 'of no version')}, "
                f"but {artifact.version} is current. Materialize {pipeline.settings.name}/evaluation again"
            )
    return Candidate(embedder, reranker, evaluation)


def reference(pipeline: Pipeline, embedder: Artifact, reranker: Artifact | None) -> Champion | None:
    """Who the candidate has to beat: the champion, or whom it beat when it is the champion itself."""
    history = read_history(pipeline.store)
    candidate = pair_key(embedder, reranker)
    if history.champion is not None and history.champion.key == candidate:
        return history.beaten_by(candidate)
    return history.champion


def _champion_models(pipeline: Pipeline, champion: Champion, cleaned: Artifact) -> ChampionModels:
    """The champion's folders, file by file as they were published, and what it has seen of the test split."""
    from embed_pipeline.evaluation.compared import ChampionModels
    from embed_pipeline.evaluation.held_out import seen_by

    store = pipeline.store
    try:
        embedder, *rerankers = models_of(store, champion)
        trained_on = store.get("cleaned_pairs", champion.cleaned_pairs)
        negatives = negatives_of(pipeline, embedder)
        for artifact in (embedder, *rerankers):
            artifact.verify()
    except ArtifactError as error:
        raise ArtifactError(
            f"the champion of {store.pipeline} is not what it was when it was promoted: {error}. A candidate that "
            "cannot be compared with it is not promoted: restore the folder from a backup, or go back with "
            f"`embed-pipeline rollback {store.pipeline}`, or take it out of service with `embed-pipeline retire "
            f"{store.pipeline}`"
        ) from error
    mined = [artifact.path for artifact in (negatives, *rerankers) if artifact is not None]
    return ChampionModels(
        title=champion.title,
        embedder=embedder.path / MODEL_FOLDER,
        reranker=rerankers[0].path if rerankers else None,
        seen=frozenset(seen_by(trained_on.path, mined, cleaned.path)),
    )


def trained_together(pipeline: Pipeline) -> tuple[Artifact, Artifact, Artifact | None]:
    """Current cleaned pairs, embedder and reranker, if they belong together and to the base models of the YAML.

    None in the reranker's place where the pipeline has none.

    Raises ArtifactError otherwise: a model trained on another split may have seen what is a test question now, and a
    gain over a base that it was not trained from means nothing.
    """
    store, name = pipeline.store, pipeline.settings.name
    cleaned, embedder = store.current("cleaned_pairs"), final_embedder(pipeline)
    if embedder.manifest.recipe.inputs["cleaned_pairs"] != cleaned.content:
        raise ArtifactError(
            f"{_title(embedder)} was trained on cleaned_pairs {embedder.input('cleaned_pairs')}, but "
            f"{cleaned.version} is current: its test questions may have been trained on. {_train_again(pipeline)}"
        )
    _refuse_another_base(pipeline, embedder)
    if pipeline.settings.reranker is None:
        return cleaned, embedder, None
    reranker = store.current("reranker")
    final, of_reranker = embedder.manifest.asset, reranker.manifest.recipe
    if of_reranker.inputs.get(final) != embedder.content:
        raise ArtifactError(
            f"{_title(reranker)} was trained for {final} {reranker.manifest.inputs.get(final, 'of no version')}, but "
            f"{embedder.version} is current. Materialize {name}/reranker first"
        )
    if of_reranker.inputs["base_reranker"] != weights_digest(base_reranker(pipeline, embedder)[0]):
        raise ArtifactError(
            f"{_title(reranker)} was not trained from the base model that the YAML names now. "
            f"Materialize {name}/reranker first"
        )
    return cleaned, embedder, reranker


def negatives_of(pipeline: Pipeline, embedder: Artifact) -> Artifact | None:
    """The hard negatives that an embedder, merged or not, was trained on; None where nothing was mined."""
    if embedder.manifest.asset == "merged_embedder":
        embedder = pipeline.store.get("embedder", embedder.input("embedder"))
    version = embedder.manifest.inputs.get("hard_negatives")
    return pipeline.store.get("hard_negatives", version) if version is not None else None


def _refuse_another_base(pipeline: Pipeline, embedder: Artifact) -> None:
    base = locate(pipeline.settings.embedder.base_model, pipeline.folder)
    cleaned = pipeline.store.get("cleaned_pairs", embedder.input("cleaned_pairs"))
    encoding = encoding_for(pipeline, cleaned, base).model_dump(mode="json")
    made_from = embedder.manifest.recipe
    if made_from.inputs["base_embedder"] != weights_digest(base) or made_from.settings["encoding"] != encoding:
        raise ArtifactError(
            f"{_title(embedder)} was not trained from the base model and encoding that the YAML names now, so a gain "
            f"over them would mean nothing. {_train_again(pipeline)}"
        )


def _train_again(pipeline: Pipeline) -> str:
    settings = pipeline.settings
    *first, last = (
        f"{settings.name}/{asset}"
        for asset, there in (
            ("hard_negatives", settings.mines),
            ("embedder", True),
            ("merged_embedder", settings.final_embedder == "merged_embedder"),
            ("reranker", settings.reranker is not None),
        )
        if there
    )
    return f"Materialize {', '.join(first)} and {last} first" if first else f"Materialize {last} first"


def _title(artifact: Artifact) -> str:
    return f"{artifact.manifest.pipeline}/{artifact.manifest.asset} {artifact.version}"


def ranks_of(pipeline: Pipeline, launch: Launch) -> Ranks:
    """How many processes encode and search for this pipeline's stages; they meet in its store.

    On this machine, and the others of `launch.kind: nodes`, which are alike. A Slurm or Ray cluster may have other
    devices than the process of the stage, which does a part itself.
    """
    from embed_pipeline.models.ranks import Ranks

    compute_as_asked()
    limit_threads()
    told, site = pipeline.settings, pipeline.site
    if told.launch.elsewhere:
        site = replace(site, settings=LaunchSettings())

    def start(job: Job, job_file: Path, tracked: None) -> None:
        launch(job, job_file, tracked, site)

    return Ranks(pipeline.store.embeddings_folder, world_size(site.settings, told.encode_processes), start)


def encoding_for(pipeline: Pipeline, cleaned: Artifact, base: Path) -> EncodingSettings:
    """The encoding that the YAML states, with maximum lengths by the texts of `cleaned` where it states none.

    `base`: the folder of the base embedder.
    """
    told, lengths = pipeline.settings.embedder.encoding, _lengths(pipeline, cleaned, base)
    if lengths is None:
        return told
    return told.model_copy(
        update={
            "query_max_length": told.query_max_length or lengths.query,
            "passage_max_length": told.passage_max_length or lengths.passage,
        }
    )


def _lengths(pipeline: Pipeline, cleaned: Artifact, base: Path) -> FittedLengths | None:
    """Those of the texts, where the YAML leaves one open."""
    from embed_pipeline.models.lengths import fitted_lengths

    told = pipeline.settings.embedder.encoding
    if told.query_max_length is not None and told.passage_max_length is not None:
        return None
    return fitted_lengths(cleaned.path, base, told.query_prompt, told.passage_prompt)


def base_embedder(pipeline: Pipeline, encoding: EncodingSettings, ranks: Ranks) -> Embedder:
    """The base model, encoding as `encoding_for` says."""
    from embed_pipeline.models.embedder import Embedder

    settings = pipeline.settings
    source = settings.embedder.base_model
    return Embedder(
        locate(source, pipeline.folder),
        encoding,
        precision=pipeline.encode_precision,
        trust_remote_code=source.trust_remote_code,
        ranks=ranks,
    )


def fine_tuned_embedder(pipeline: Pipeline, embedder: Artifact, ranks: Ranks) -> Embedder:
    """A trained embedder, encoding as its own folder says."""
    from embed_pipeline.models.embedder import Embedder

    settings = pipeline.settings
    return Embedder(
        embedder.path / MODEL_FOLDER,
        precision=pipeline.encode_precision,
        trust_remote_code=settings.embedder.base_model.trust_remote_code,
        ranks=ranks,
    )


def base_reranker(pipeline: Pipeline, embedder: Artifact) -> tuple[Path, bool]:
    """Folder of what the reranker starts from, and whether its own Python code may run."""
    assert pipeline.settings.reranker is not None, "this pipeline has no reranker"
    source = pipeline.settings.reranker.base_model
    if isinstance(source, ModelSource):
        return locate(source, pipeline.folder), source.trust_remote_code
    return embedder.path / MODEL_FOLDER, pipeline.settings.embedder.base_model.trust_remote_code


def device_kind() -> Literal["cpu", "gpu"]:
    """`gpu` or `cpu`: part of every recipe that computes embeddings or weights, which differ between the two."""
    return "gpu" if has_gpu_driver() else "cpu"


def _training_device(pipeline: Pipeline) -> Literal["cpu", "gpu"]:
    """The same for what is trained, perhaps elsewhere than here."""
    launch = pipeline.settings.launch
    return ("gpu" if launch.gpus_per_node else "cpu") if launch.elsewhere else device_kind()


def _resolved_here(precision: Precision) -> ResolvedPrecision:
    return resolve_precision(precision, default_device() if has_gpu_driver() else "cpu")


def _trained_in(pipeline: Pipeline, settings: Trained) -> Trained:
    """The settings with the arithmetic that `precision: auto` stands for here, so every process of a job uses the same.

    On a cluster whose devices are not known here `auto` stays: each job finds out.
    """
    if pipeline.settings.launch.elsewhere:
        return settings
    return settings.model_copy(update={"precision": _resolved_here(settings.precision)})


def _fitted_embedder(pipeline: Pipeline, cleaned: Artifact, base: Path) -> FittedEmbedderSettings:
    """The embedder's settings with what `auto` stands for, which is what the recipe holds."""
    settings = pipeline.settings
    to = _circumstances(pipeline, settings.embedder, cleaned, base)
    told = settings.embedder.model_copy(update={"encoding": encoding_for(pipeline, cleaned, base)})
    return fit_embedder(told, to, settings.source.kind, settings.mining.num_negatives)


def _fitted_reranker(
    pipeline: Pipeline, settings: RerankerSettings, cleaned: Artifact, base: Path
) -> FittedRerankerSettings:
    """Likewise; `base` is what it starts from, or as large as that."""
    to = _circumstances(pipeline, settings, cleaned, base)
    return fit_reranker(settings, to, fresh_head=not has_trained_head(base))


def _circumstances(pipeline: Pipeline, settings: TrainingSettings, cleaned: Artifact, base: Path) -> Circumstances:
    return Circumstances(
        shape=shape_of(base),
        device=_training_device(pipeline),
        rows=count_split(cleaned.path, "train"),
        processes=world_size(pipeline.settings.launch, settings.nproc_per_node),
    )


def _training_told(pipeline: Pipeline, settings: TrainingSettings, processes: int) -> dict[str, Any]:
    """What of a training's settings decides its weights; the base model stands among the inputs."""
    unimportant = {"base_model", "guide", "teacher", "logging_steps", "nproc_per_node"}
    unimportant |= {"checkpoint_minutes", "collective_timeout_minutes", "preflight"}
    return {
        **settings.model_dump(mode="json", exclude=unimportant),
        "processes": processes,
        "device": _training_device(pipeline),
    }


def _extra_sources_told(pipeline: Pipeline, model: Literal["embedder", "reranker"]) -> dict[str, Any]:
    """What of the extra sources decides a model's weights, besides their rows: by source, how it is learnt from."""
    of_reranker = {"reranker_loss", "reranker_loss_arguments"}
    of_embedder = set(LossSettings.model_fields) - {"guide", "teacher"}
    keys = {"train_rows", *(of_embedder if model == "embedder" else of_reranker)}
    told = {
        extra.name: extra.model_dump(mode="json", include=keys)
        for extra in pipeline.settings.extra_sources
        if model == "embedder" or extra.reranker_loss is not None
    }
    return {"extra_sources": told} if told else {}


def _learnt_from(pipeline: Pipeline, key: Literal["guide", "teacher"]) -> dict[str, Path]:
    """The folders of the sources' guides or teachers, by the source's name."""
    settings = pipeline.settings
    named: dict[str, LossSettings] = {settings.name: settings.embedder}
    named |= {extra.name: extra for extra in settings.extra_sources}
    found = {name: getattr(learn, key) for name, learn in named.items()}
    return {name: locate(model, pipeline.folder) for name, model in found.items() if model is not None}


def _mining_told(pipeline: Pipeline, mining: MiningSettings) -> dict[str, Any]:
    return {
        "mining": mining.model_dump(mode="json"),
        **({"keep_scored": True} if pipeline.settings.learns_given_scores else {}),
        "encode_precision": pipeline.encode_precision,
        "device": device_kind(),
    }


def _cross_encoder_digest(pipeline: Pipeline) -> dict[str, str]:
    told = pipeline.settings.mining.cross_encoder
    return {} if told is None else {"cross_encoder": weights_digest(locate(told.model, pipeline.folder))}


def _load_guards(pipeline: Pipeline) -> list[GuardSet]:
    from embed_pipeline.evaluation.guard_sets import load_guard

    settings = pipeline.settings
    return [load_guard(guard, pipeline.folder, settings.seed) for guard in settings.forgetting.guards]


def _guard_digests(pipeline: Pipeline) -> dict[str, str]:
    guards = pipeline.settings.forgetting.guards
    return {f"guard {guard.name}": guard_digest(guard, pipeline.folder) for guard in guards}


def _check_before_mining(pipeline: Pipeline, cleaned: Artifact) -> None:
    """Tell what the trainings could not do before they are mined for; on another machine its preflight tells."""
    from embed_pipeline.training.before_mining import Planned, check_before_mining

    settings = pipeline.settings
    if settings.launch.elsewhere or not settings.source.is_retrieval:
        return
    base = locate(settings.embedder.base_model, pipeline.folder)
    planned: list[tuple[FittedSettings, Path]] = [(_fitted_embedder(pipeline, cleaned, base), base)]
    if settings.reranker is not None:
        source = settings.reranker.base_model
        start = locate(source, pipeline.folder) if isinstance(source, ModelSource) else base
        planned.append((_fitted_reranker(pipeline, settings.reranker, cleaned, start), start))
    trainings = [
        Planned(told, folder, _resolved_here(told.precision), processes_per_node(told.nproc_per_node))
        for told, folder in planned
    ]
    device = default_device() if has_gpu_driver() else "cpu"
    check_before_mining(cleaned.path, settings.source.kind, trainings, device)


def _mine(
    pipeline: Pipeline, cleaned: Path, embedder: Embedder, settings: MiningSettings, out: Path, ranks: Ranks
) -> MiningReport:
    from embed_pipeline.mining.mine import mine
    from embed_pipeline.models.reranker import Reranker

    cross_encoder = None
    if settings.cross_encoder is not None:
        source = settings.cross_encoder.model
        cross_encoder = Reranker(
            locate(source, pipeline.folder),
            max_length=settings.cross_encoder.max_length,
            precision=pipeline.encode_precision,
            trust_remote_code=source.trust_remote_code,
            ranks=ranks,
        )
    return mine(
        cleaned,
        embedder,
        settings,
        pipeline.settings.seed,
        out,
        cross_encoder=cross_encoder,
        keep_scored=pipeline.settings.learns_given_scores,
        ranks=ranks,
    )


def _produce_model(
    pipeline: Pipeline,
    asset: str,
    recipe: Recipe,
    inputs: Sequence[Artifact],
    make: Callable[[Path, Claim], Made],
) -> Produced:
    """As `produce`; the checkpoints go when the model is published, and stay for another try when it is not."""
    with pipeline.store.claim(asset, recipe) as claim:
        produced = pipeline.store.produce(
            asset, recipe, inputs, lambda out: make(out, claim), content=None, claim=claim
        )
        claim.remove()
    return produced


def _train(
    pipeline: Pipeline, asset: str, claim: Claim, job: TrainingJob, launch: Launch, inputs: Sequence[Artifact]
) -> Made:
    """A training that was killed goes on where the same recipe left off, in its MLflow run."""
    job_file = job.write(job.output / JOB_FILE)
    checkpoints, linked = claim.folder, job.output / CHECKPOINTS_FOLDER
    before = None
    if checkpoints is not None:
        linked.symlink_to(checkpoints.absolute(), target_is_directory=True)
        claim.link = linked
        noted = checkpoints / "mlflow_journal"
        before = noted.read_text(errors="replace") if noted.is_file() and any(checkpoints.glob("step-*")) else None
    with pipeline.tracked(asset, goes_on=before) as tracked:
        if not tracked.goes_on:
            tracked.log_parameters(job.model_dump(mode="json"))
            tracked.log_inputs(inputs, "training")
            if checkpoints is not None:
                with suppress(FileNotFoundError):  # somebody deleted them: then there is nothing to go on from
                    (checkpoints / "mlflow_journal").write_text(tracked.journal.name)
        launch(job, job_file, tracked, pipeline.site)
        linked.unlink(missing_ok=True)
        if pipeline.settings.tracking.log_model:
            tracked.log_folder(job.output / MODEL_FOLDER, "model")
    return Made(json.loads((job.output / SUMMARY_FILE).read_text()), pipeline.runs(tracked))
