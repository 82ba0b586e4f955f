"""Guards of every hand-over: blocking where a bad artifact would cost GPU hours or trust, else a warning to look."""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg

from embed_pipeline.orchestration.reporting import readable_errors
from embed_pipeline.stages import Pipeline, trained_together
from embed_pipeline.tables import HARD_NEGATIVES_FILE, QUERIES_FILE, RAW_FILE


def checks_of(pipeline: Pipeline) -> list[dg.AssetChecksDefinition]:
    """The checks of one pipeline's assets."""
    name, store = pipeline.settings.name, pipeline.store

    def check(
        asset: str, description: str, find: Callable[[], list[str]], *, blocking: bool = True
    ) -> dg.AssetChecksDefinition:
        """A check that passes when `find` finds nothing to object to."""
        check_name = find.__name__

        @dg.asset_check(asset=[name, asset], name=check_name, description=description, blocking=blocking)
        def guard() -> dg.AssetCheckResult:
            with readable_errors():
                objections = find()
            severity = dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN
            return dg.AssetCheckResult(
                passed=not objections,
                severity=severity,
                description="; ".join(objections[:5]) or None,
                metadata={"objections": len(objections)},
            )

        return guard

    def splits_do_not_leak_and_rows_add_up() -> list[str]:
        from embed_pipeline.cleaning.verify import verify

        cleaned = store.current("cleaned_pairs")
        raw = store.get("raw_pairs", cleaned.input("raw_pairs"))
        return verify(cleaned.path, raw.path / RAW_FILE)

    def no_positive_among_negatives() -> list[str]:
        from embed_pipeline.mining.verify import verify

        negatives = store.current("hard_negatives")
        cleaned = store.get("cleaned_pairs", negatives.input("cleaned_pairs"))
        return verify(negatives.path, cleaned.path, pipeline.settings.mining)

    def trained_on_no_test_question() -> list[str]:
        import duckdb

        cleaned, embedder, reranker = trained_together(pipeline)
        negatives = store.get("hard_negatives", embedder.input("hard_negatives"))
        trained = {"embedder": negatives.path / HARD_NEGATIVES_FILE, "reranker": reranker.path / HARD_NEGATIVES_FILE}
        held_out = f"SELECT query_id FROM read_parquet('{cleaned.path / QUERIES_FILE}') WHERE split <> 'train'"
        found = {
            model: duckdb.execute(
                f"SELECT query_id FROM read_parquet('{path}') WHERE query_id IN ({held_out})"
            ).fetchall()
            for model, path in trained.items()
        }
        return [f"{model} was trained on held-out query {rows[0][0]}" for model, rows in found.items() if rows]

    def better_than_base() -> list[str]:
        evaluation = store.current("evaluation")
        rows = [row for row in evaluation.report["summary"] if row["metric"] == "ndcg_at_10"]
        embedder = next(row for row in rows if row["system"] == "embedder")
        return [] if embedder["interval_low"] > 0 else [evaluation.report["headline"]]

    return [
        check(
            "cleaned_pairs",
            "No query, document or near-duplicate in two splits; every raw row is kept or rejected with one reason.",
            splits_do_not_leak_and_rows_add_up,
        ),
        check(
            "hard_negatives",
            "No positive, nor a near-duplicate of one, among the negatives of its query.",
            no_positive_among_negatives,
        ),
        check("evaluation", "No dev or test question was trained on.", trained_on_no_test_question),
        check(
            "evaluation",
            "The embedder's gain in nDCG@10 over its base has an interval above zero.",
            better_than_base,
            blocking=False,
        ),
    ]
