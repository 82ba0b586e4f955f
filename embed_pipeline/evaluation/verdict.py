"""The figures in plain words."""

from __future__ import annotations

from collections.abc import Iterable

from embed_pipeline.evaluation.comparison import (
    BASE_EMBEDDER,
    BASE_PAIR,
    BASE_RERANKER,
    BM25,
    CHAMPION_EMBEDDER,
    CHAMPION_PAIR,
    EMBEDDER,
    RERANKER,
    RERANKER_ALONE,
    Comparison,
)

MINUS = "\N{MINUS SIGN}"
METRIC_NAMES = {
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_1": "Recall@1",
    "recall_at_5": "Recall@5",
    "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
    "hit_rate_at_1": "Hit rate@1",
    "hit_rate_at_5": "Hit rate@5",
    "hit_rate_at_10": "Hit rate@10",
    "map_at_100": "MAP@100",
    "spearman": "Spearman",
    "pearson": "Pearson",
}
SYSTEM_NAMES = {  # in the order in which they are shown
    BM25: "Keyword search (BM25)",
    BASE_EMBEDDER: "Base embedder",
    CHAMPION_EMBEDDER: "Champion's embedder",
    EMBEDDER: "Fine-tuned embedder",
    BASE_RERANKER: "Base reranker",
    BASE_PAIR: "Base embedder and base reranker",
    CHAMPION_PAIR: "Champion (embedder and reranker)",
    RERANKER: "Fine-tuned reranker",
    RERANKER_ALONE: "Fine-tuned reranker, its score alone",
}


def row_of(rows: Iterable[Comparison], system: str, metric: str) -> Comparison | None:
    return next((row for row in rows if (row.system, row.metric) == (system, metric)), None)


def signed(value: float) -> str:
    """+0.072, with a true minus sign; what rounds to nothing has no sign."""
    rounded = f"{abs(value):.3f}"
    return rounded if float(rounded) == 0 else f"{'+' if value > 0 else MINUS}{rounded}"


def percent(value: float) -> str:
    """62 %, with a space that does not break."""
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def interval(row: Comparison, confidence: float) -> str:
    return f"{percent(confidence)} interval {signed(row.interval_low)} to {signed(row.interval_high)}"


def headline_of_pairs(summary: list[Comparison], confidence: float) -> tuple[str, str]:
    """The same for an embedder of scored pairs."""
    spearman, pearson = _needed(summary, EMBEDDER, "spearman"), _needed(summary, EMBEDDER, "pearson")
    figures = (
        f"Spearman {signed(spearman.gain)} ({interval(spearman, confidence)}), Pearson {signed(pearson.gain)} "
        f"({interval(pearson, confidence)})"
    )
    told = f"Spearman {spearman.value:.3f} on {spearman.num_queries:,} test pairs, before {spearman.baseline_value:.3f}"
    if spearman.verdict == "better":
        return f"The fine-tuned embedder orders pairs more as people do: {told}", figures
    if spearman.verdict == "worse":
        return f"Fine-tuning made the embedder worse at telling what is alike: {told}", figures
    return f"Fine-tuning made no difference that the test can tell: {told}", figures


def headline(summary: list[Comparison], confidence: float) -> tuple[str, str]:
    """What to say of the fine-tuned embedder, and the figures that bear it out."""
    ndcg, first = _needed(summary, EMBEDDER, "ndcg_at_10"), _needed(summary, EMBEDDER, "hit_rate_at_1")
    figures = f"nDCG@10 {signed(ndcg.gain)} ({interval(ndcg, confidence)})"
    after, before = percent(first.value), percent(first.value - first.gain)
    finds = f"finds a right passage first for {after} of {ndcg.num_queries:,} test questions, before {before}"
    if ndcg.verdict == "better":
        return f"The fine-tuned embedder {finds}", figures
    if ndcg.verdict == "worse":
        return f"Fine-tuning made the embedder worse: it {finds}", figures
    return f"Fine-tuning made no difference that the test can tell: the embedder {finds}", figures


def verdicts(
    over_embedder: list[Comparison],
    over_base_reranker: list[Comparison],
    confidence: float,
    *,
    untrained_head: bool,
) -> dict[str, str]:
    """A sentence for each of the other systems about which there is something to say."""
    told = {}
    fine_tuned = row_of(over_embedder, RERANKER, "ndcg_at_10")
    if fine_tuned is not None:
        told[RERANKER] = _reranker_sentence(RERANKER, fine_tuned, confidence)
        changed = next((row for row in over_base_reranker if row.metric == "ndcg_at_10"), None)
        if changed is not None:
            told[RERANKER] += (
                f" By its own score alone it has nDCG@10 {changed.value:.3f}, {signed(changed.gain)} "
                f"({interval(changed, confidence)}) over the base reranker."
            )
    base = row_of(over_embedder, BASE_RERANKER, "ndcg_at_10")
    if base is not None and untrained_head:
        told[BASE_RERANKER] = (
            "The base reranker is an encoder with an untrained head, so its order is chance: it shows where training "
            f"began, not what a ready-made reranker would do (nDCG@10 {base.value:.3f})."
        )
    elif base is not None:
        told[BASE_RERANKER] = _reranker_sentence(BASE_RERANKER, base, confidence)
    keyword = row_of(over_embedder, BM25, "ndcg_at_10")
    if keyword is not None and keyword.verdict != "worse":
        stands = "ranks better than" if keyword.verdict == "better" else "cannot be told apart from"
        told[BM25] = (
            f"Keyword search {stands} the fine-tuned embedder on these questions: nDCG@10 {signed(keyword.gain)} "
            f"({interval(keyword, confidence)}). It costs no model, so it is worth a look."
        )
    return told


def _reranker_sentence(system: str, row: Comparison, confidence: float) -> str:
    name = SYSTEM_NAMES[system].lower()
    figures = (
        f"nDCG@10 {signed(row.gain)} ({interval(row, confidence)}) over the fine-tuned embedder on the same "
        f"{row.num_queries:,} questions."
    )
    if row.verdict == "better":
        return f"The {name} improves the ranking further: {figures}"
    if row.verdict == "worse":
        return f"The {name} makes the ranking worse, so leave it out: {figures}"
    return f"Whether the {name} improves the ranking remains undecided: {figures}"


def _needed(summary: list[Comparison], system: str, metric: str) -> Comparison:
    row = row_of(summary, system, metric)
    assert row is not None
    return row
