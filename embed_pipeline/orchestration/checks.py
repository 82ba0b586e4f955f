"""Guards of every hand-over: blocking where a bad artifact would cost GPU hours or trust, else a warning to look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import dagster as dg

from embed_pipeline.orchestration.reporting import readable_errors
from embed_pipeline.settings import MiningSettings
from embed_pipeline.stages import Pipeline, trained_together
from embed_pipeline.tables import HARD_NEGATIVES_FILE, RAW_FILE


def splits_do_not_leak_and_rows_add_up(pipeline: Pipeline) -> list[str]:
    from embed_pipeline.cleaning.verify import verify

    cleaned = pipeline.store.current("cleaned_pairs")
    raw = pipeline.store.get("raw_pairs", cleaned.input("raw_pairs"))
    return verify(cleaned.path, raw.path / RAW_FILE)


def no_positive_among_negatives(pipeline: Pipeline) -> list[str]:
    from embed_pipeline.mining.verify import verify

    negatives = pipeline.store.current("hard_negatives")
    cleaned = pipeline.store.get("cleaned_pairs", negatives.input("cleaned_pairs"))
    # What they were mined with: a run may have changed the YAML's settings.
    mining = MiningSettings.model_validate(negatives.manifest.recipe.settings["mining"])
    return verify(negatives.path, cleaned.path, mining)


def trained_on_no_held_out_question(pipeline: Pipeline) -> list[str]:
    from embed_pipeline.evaluation.held_out import held_out_queries_among

    cleaned, embedder, reranker = trained_together(pipeline)
    negatives = pipeline.store.get("hard_negatives", embedder.input("hard_negatives"))
    trained = {"embedder": negatives.path / HARD_NEGATIVES_FILE, "reranker": reranker.path / HARD_NEGATIVES_FILE}
    found = {model: held_out_queries_among(rows, cleaned.path) for model, rows in trained.items()}
    return [f"the {model} was trained on held-out queries {ids[:3]}" for model, ids in found.items() if ids]


def better_than_base(pipeline: Pipeline) -> list[str]:
    evaluation = pipeline.store.current("evaluation")
    rows = [row for row in evaluation.report["summary"] if row["metric"] == "ndcg_at_10"]
    embedder = next(row for row in rows if row["system"] == "embedder")
    return [] if embedder["interval_low"] > 0 else [evaluation.report["headline"]]


@dataclass(frozen=True)
class Guard:
    """`find` returns what it objects to; nothing means passed."""

    asset: str
    find: Callable[[Pipeline], list[str]]
    description: str
    blocking: bool = True


GUARDS = (
    Guard(
        "cleaned_pairs",
        splits_do_not_leak_and_rows_add_up,
        "No query, document or near-duplicate in two splits; every raw row is kept or rejected with one reason.",
    ),
    Guard(
        "hard_negatives",
        no_positive_among_negatives,
        "No positive, nor a near-duplicate of one, among the negatives of its query.",
    ),
    Guard("evaluation", trained_on_no_held_out_question, "No dev or test question was trained on."),
    Guard(
        "evaluation",
        better_than_base,
        "The embedder's gain in nDCG@10 over its base has an interval above zero.",
        blocking=False,
    ),
)


def checks_of(pipeline: Pipeline) -> list[dg.AssetChecksDefinition]:
    """The checks of one pipeline's assets."""
    return [_check_of(pipeline, guard) for guard in GUARDS]


def _check_of(pipeline: Pipeline, guard: Guard) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=[pipeline.settings.name, guard.asset],
        name=guard.find.__name__,
        description=guard.description,
        blocking=guard.blocking,
    )
    def check() -> dg.AssetCheckResult:
        with readable_errors():
            objections = guard.find(pipeline)
        return dg.AssetCheckResult(
            passed=not objections,
            severity=dg.AssetCheckSeverity.ERROR if guard.blocking else dg.AssetCheckSeverity.WARN,
            description="; ".join(objections[:5]) or None,
            metadata={"objections": len(objections)},
        )

    return check
