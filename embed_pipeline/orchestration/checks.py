"""Guards of every hand-over: blocking where a bad artifact would cost GPU hours or trust, else a warning to look."""

from collections.abc import Callable
from dataclasses import dataclass

import dagster as dg

from embed_pipeline.orchestration.reporting import gate_metadata, readable_errors
from embed_pipeline.settings import MiningSettings, PipelineSettings
from embed_pipeline.stages import Pipeline, negatives_of, trained_together
from embed_pipeline.tables import HARD_NEGATIVES_FILE, source_folder


def every_file_was_read(pipeline: Pipeline) -> list[str]:
    own = pipeline.store.current("raw_pairs").report
    reports = {None: own, **own["extra_sources"]}
    return [
        f"{'' if name is None else f'{name}: '}{one['source']}: {one['reason']}"
        for name, report in reports.items()
        for one in report["not_read"]
    ]


def splits_do_not_leak_and_rows_add_up(pipeline: Pipeline) -> list[str]:
    from embed_pipeline.cleaning.sources import read_reports, verify_sources

    cleaned = pipeline.store.current("cleaned_pairs")
    raw = pipeline.store.get("raw_pairs", cleaned.input("raw_pairs"))
    sources = pipeline.settings.sources
    return verify_sources(raw.path, cleaned.path, sources, read_reports(cleaned.report, sources))


def sources_do_not_leak_into_each_other(pipeline: Pipeline) -> list[str]:
    from embed_pipeline.cleaning.sources import read_reports, verify_sources_apart

    cleaned, sources = pipeline.store.current("cleaned_pairs"), pipeline.settings.sources
    return verify_sources_apart(cleaned.path, sources, read_reports(cleaned.report, sources))


def answers_are_in_the_corpus(pipeline: Pipeline) -> list[str]:
    """Those that are missing; where they are too many, cleaning itself has refused the delivery."""
    from embed_pipeline.cleaning.clean import CleaningReport
    from embed_pipeline.cleaning.sources import read_reports

    reports = read_reports(pipeline.store.current("cleaned_pairs").report, pipeline.settings.sources)
    return [
        found.told(split) if name is None else f"{name}: {found.told(split)}"
        for name, report in reports.items()
        if isinstance(report, CleaningReport)
        for split, found in report.answers_by_split.items()
        if found.missing
    ]


def no_positive_among_negatives(pipeline: Pipeline) -> list[str]:
    from embed_pipeline.mining.verify import verify

    negatives = pipeline.store.current("hard_negatives")
    cleaned = pipeline.store.get("cleaned_pairs", negatives.input("cleaned_pairs"))
    # What they were mined with: a run may have changed the YAML's settings.
    mining = MiningSettings.model_validate(negatives.manifest.recipe.settings["mining"])
    found = []
    for source in pipeline.settings.sources:
        if source.is_retrieval:
            rows = source_folder(cleaned.path, source.extra_name)
            objections = verify(source_folder(negatives.path, source.extra_name), rows, mining)
            found += objections if source.extra_name is None else [f"{source.extra_name}: {o}" for o in objections]
    return found


def trained_on_no_held_out_question(pipeline: Pipeline) -> list[str]:
    """Of the own source and of the extra ones, in what each model was given to train on."""
    from embed_pipeline.evaluation.held_out import held_out_pairs_among, held_out_queries_among

    cleaned, embedder, reranker = trained_together(pipeline)
    mined = {"embedder": negatives_of(pipeline, embedder), "reranker": reranker}
    found = []
    for model, artifact in mined.items():
        if artifact is None:
            continue
        for source in pipeline.settings.sources:
            rows = source_folder(artifact.path, source.extra_name) / HARD_NEGATIVES_FILE
            # A reranker learns of an extra source only where it has a loss for it.
            if source.is_retrieval and rows.is_file():
                ids = held_out_queries_among(rows, source_folder(cleaned.path, source.extra_name))
                of = f" of {source.extra_name}" if source.extra_name else ""
                found += [f"the {model} was trained on held-out queries{of} {ids[:3]}"] if ids else []
    if not pipeline.settings.source.is_retrieval and (ids := held_out_pairs_among(cleaned.path)):
        found.append(f"the embedder was trained on test pairs {ids[:3]}")
    return found


@dataclass(frozen=True)
class Guard:
    """`find` returns what it objects to; nothing means passed."""

    asset: str
    find: Callable[[Pipeline], list[str]]
    description: str
    blocking: bool = True
    needed: Callable[[PipelineSettings], bool] = lambda _: True


GUARDS = (
    Guard(
        "raw_pairs",
        every_file_was_read,
        "Every data file where the YAML names one was read; else why not.",
        blocking=False,
    ),
    Guard(
        "cleaned_pairs",
        splits_do_not_leak_and_rows_add_up,
        "No query, document or near-duplicate in two splits; every raw row is kept or rejected with one reason.",
    ),
    Guard(
        "cleaned_pairs",
        answers_are_in_the_corpus,
        "Every answer that was delivered points to a query and a passage that are there.",
        blocking=False,
    ),
    Guard(
        "cleaned_pairs",
        sources_do_not_leak_into_each_other,
        "What one source holds out for dev or test, no other source trains on.",
        needed=lambda settings: len(settings.sources) > 1,
    ),
    Guard(
        "hard_negatives",
        no_positive_among_negatives,
        "No positive, nor a near-duplicate of one, among the negatives of its query.",
        needed=lambda settings: settings.mines,
    ),
    Guard("evaluation", trained_on_no_held_out_question, "No dev or test question was trained on."),
)


def checks_of(pipeline: Pipeline) -> list[dg.AssetChecksDefinition]:
    """The checks of one pipeline's assets; the gate comes last."""
    needed = (guard for guard in GUARDS if guard.needed(pipeline.settings))
    return [*(_check_of(pipeline, guard) for guard in needed), _gate_of(pipeline)]


def _check_of(pipeline: Pipeline, guard: Guard) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=[pipeline.settings.name, guard.asset],
        name=guard.find.__name__,
        description=guard.description,
        blocking=guard.blocking,
    )
    def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        with readable_errors():
            objections = guard.find(pipeline.for_run(context.run.run_id))
        return dg.AssetCheckResult(
            passed=not objections,
            severity=dg.AssetCheckSeverity.ERROR if guard.blocking else dg.AssetCheckSeverity.WARN,
            description="; ".join(objections[:5]) or None,
            metadata={"objections": len(objections)},
        )

    return check


def _gate_of(pipeline: Pipeline) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=[pipeline.settings.name, "evaluation"],
        name="gate",
        description="The candidate is better than the base models and the champion, and has unlearned nothing.",
        blocking=True,
    )
    def gate(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        from embed_pipeline.evaluation.gate import GateReport

        with readable_errors():
            evaluation = pipeline.for_run(context.run.run_id).store.current("evaluation")
        report = GateReport.model_validate(evaluation.report["gate"])
        smoke_test = "smoke test, the verdict does not count: " if pipeline.smoke_test else ""
        return dg.AssetCheckResult(
            passed=report.passed or pipeline.smoke_test,
            severity=dg.AssetCheckSeverity.ERROR,
            description=smoke_test + report.sentence,
            metadata={"evaluation": evaluation.version, **gate_metadata(report)},
        )

    return gate
