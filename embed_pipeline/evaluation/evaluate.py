"""Base and fine-tuned models on test questions that nothing was trained on, over the whole corpus."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from embed_pipeline.errors import ArtifactError
from embed_pipeline.evaluation.beside import Beside
from embed_pipeline.evaluation.bm25 import K1, B
from embed_pipeline.evaluation.compared import ComparedModels, Rankings, check_folders
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
    Values,
    compare,
)
from embed_pipeline.evaluation.evaluators import EmbedderEvaluators, RerankerEvaluators
from embed_pipeline.evaluation.gate import GateReport, judge
from embed_pipeline.evaluation.guard_sets import GuardSet, Part
from embed_pipeline.evaluation.history import THIS, HistoryPoint, point_of
from embed_pipeline.evaluation.metrics import Qrels, per_query
from embed_pipeline.evaluation.parity import write_parity
from embed_pipeline.evaluation.report import write_report
from embed_pipeline.evaluation.results import (
    DETAILS_FILE,
    EVALUATORS_FILE,
    SUMMARY_FILE,
    Details,
    EvaluationReport,
    QueryChange,
)
from embed_pipeline.evaluation.systems import (
    DEPTH,
    Ranking,
)
from embed_pipeline.evaluation.verdict import SYSTEM_NAMES, headline, verdicts
from embed_pipeline.mining.report import excerpt
from embed_pipeline.model_files import MODEL_FOLDER
from embed_pipeline.models.collection import Collection, load_collection
from embed_pipeline.models.folder import has_trained_head
from embed_pipeline.models.ranks import ALONE, Ranks
from embed_pipeline.settings import EvaluationSettings, GateSettings, Precision
from embed_pipeline.tables import PER_QUERY, PER_QUERY_FILE, RANKINGS, RANKINGS_FILE, write

logger = logging.getLogger(__name__)


def evaluate(
    cleaned: Path,
    models: ComparedModels,
    settings: EvaluationSettings,
    seed: int,
    out: Path,
    *,
    gate: GateSettings | None = None,
    guards: Sequence[GuardSet] = (),
    guard_part: Part = "all",
    evaluators: EmbedderEvaluators | None = None,
    reranker_evaluators: RerankerEvaluators | None = None,
    history: Sequence[HistoryPoint] = (),
    encode_precision: Precision = "auto",
    ranks: Ranks = ALONE,
    title: str = "Evaluation",
    versions: Mapping[str, str] | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Compare BM25, base and fine-tuned models and the champion on the test split of a `cleaned_pairs` folder.

    The verdict of the `gate` on the fine-tuned models is part of the result; embedders are measured on `guard_part` of
    the guard sets too, and both kinds of model by the library's evaluators. `history` are the evaluations before.

    Writes into `out`: `summary.json`, a list of {system, metric, value, gain, interval_low, interval_high,
    num_queries} with gains over the base embedder on the same queries; `details.json`; `per_query.parquet`;
    `rankings.parquet` (the first 100 of each query); `parity.json` (what the models give for a few texts, to compare a
    registered copy with); `evaluators.json`; `report.html`. `versions` (what was compared, made by what) is
    shown in the report. Test queries without a relevant passage are left out and counted.

    Raises ArtifactError when the split has no query to measure on, ModelError when a model is missing or gives NaN.
    """
    collection = load_collection(cleaned, ("test",))
    if not len(collection.query_ids):
        raise ArtifactError(
            f"{cleaned} holds no query of split test with a relevant passage, so nothing can be measured "
            f"({collection.without_positive} test queries have no relevant passage). Raise `cleaning.split.test`, or "
            "mend the split and relevance columns"
        )
    check_folders(models)
    gate = gate or GateSettings()
    beside = Beside(settings, seed, guards, guard_part, evaluators, reranker_evaluators)
    ranked = Rankings(collection, models, settings, seed, encode_precision, ranks, progress, beside)
    ranked.by_champion()  # first: where it no longer loads, there is nothing to compare with
    ranked.by_bm25()
    ranked.by_embedders()
    ranked.by_rerankers()
    rankings = {system: ranked.rankings[system].top(DEPTH) for system in SYSTEM_NAMES if system in ranked.rankings}
    values = _measure(collection, rankings)
    write(_per_query_table(values), PER_QUERY, out / PER_QUERY_FILE)
    tables = [ranking.table(system, collection) for system, ranking in rankings.items()]
    write(pa.concat_tables(tables), RANKINGS, out / RANKINGS_FILE)
    summary = compare(
        values, [system for system in rankings if system != RERANKER_ALONE], BASE_EMBEDDER, settings, seed
    )
    verdict = judge(
        values,
        gate,
        settings,
        seed,
        seen_by_champion=models.champion.seen if models.champion else (),
        guards=beside.guard_results(),
        collapsed=ranked.collapsed,
    )
    for sentence in ranked.collapsed:
        logger.warning("%s", sentence)
    made_from = dict(versions or {})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    this = point_of(THIS, now, made_from.get("cleaned_pairs", ""), summary, gate.metric, verdict.outcome)
    details = _details(ranked, rankings, values, summary, verdict, [*history, this], title, made_from)
    write_parity(
        collection,
        models.embedder,
        models.reranker / MODEL_FOLDER if models.reranker else None,
        out,
        trust_embedder_code=models.trust_embedder_code,
        trust_reranker_code=models.trust_reranker_code,
    )
    return write_results(out, summary, details)


def _details(
    ranked: Rankings,
    rankings: Mapping[str, Ranking],
    values: Values,
    summary: list[Comparison],
    gate: GateReport,
    history: list[HistoryPoint],
    title: str,
    versions: dict[str, str],
) -> Details:
    collection, settings = ranked.collection, ranked.settings
    against = [system for system in (BM25, BASE_RERANKER, RERANKER, RERANKER_ALONE) if system in rankings]
    over_embedder = compare(values, against, EMBEDDER, settings, ranked.seed)
    base_reranker = ranked.models.base_reranker
    untrained = base_reranker is not None and not has_trained_head(base_reranker)
    over_base_reranker = _over_base_reranker(values, settings, ranked.seed)
    changes = _changes(collection, rankings, values)
    claim, figures = headline(summary, settings.confidence)
    return Details(
        kind="retrieval",
        title=title,
        gate=gate,
        claim=claim,
        figures=figures,
        verdicts=verdicts(over_embedder, over_base_reranker, settings.confidence, untrained_head=untrained),
        systems=_descriptions(list(rankings), settings, ranked.embedder_weight, untrained),
        notes=_notes(
            collection,
            settings,
            len(ranked.sampled),
            ranked.embedder_weight,
            len(ranked.models.champion.seen) if ranked.models.champion else 0,
        ),
        passages=len(collection.texts),
        queries=len(collection.query_ids),
        queries_without_positive=collection.without_positive,
        reranked_queries=len(ranked.sampled),
        rerank_top_k=settings.rerank_top_k,
        embedder_weight=ranked.embedder_weight,
        dev_ndcg_at_10_by_weight=ranked.dev_by_weight,
        over_embedder=over_embedder,
        over_base_reranker=over_base_reranker,
        over_champion=_over_champion(values, ranked),
        seen_by_champion=len(ranked.models.champion.seen) if ranked.models.champion else 0,
        history=history,
        milliseconds_per_query=ranked.milliseconds,
        scores=ranked.scores,
        better=sorted((c for c in changes if c.change > 0), key=lambda c: -c.change)[: settings.examples],
        worse=sorted((c for c in changes if c.change < 0), key=lambda c: c.change)[: settings.examples],
        sources=ranked.beside.source_figures(),
        queries_better=sum(change.change > 0 for change in changes),
        queries_worse=sum(change.change < 0 for change in changes),
        seed=ranked.seed,
        bootstrap_samples=settings.bootstrap_samples,
        confidence=settings.confidence,
        versions=versions,
    )


def _measure(collection: Collection, rankings: Mapping[str, Ranking]) -> Values:
    qrels: Qrels = collection.qrels()
    values = {}
    for system, ranking in rankings.items():
        measured = {str(collection.query_ids[row]): qrels[collection.query_ids[row]] for row in ranking.rows}
        values[system] = per_query(measured, ranking.run(collection))
    return values


def _over_base_reranker(values: Values, settings: EvaluationSettings, seed: int) -> list[Comparison]:
    """What training the reranker changed: its own score against its base's, without the embedder's share in either."""
    own = RERANKER_ALONE if RERANKER_ALONE in values else RERANKER
    if own not in values or BASE_RERANKER not in values:
        return []
    return compare(values, [own], BASE_RERANKER, settings, seed)


def _over_champion(values: Values, ranked: Rankings) -> list[Comparison]:
    champion = ranked.models.champion
    if champion is None:
        return []
    pair = CHAMPION_PAIR if CHAMPION_PAIR in values else CHAMPION_EMBEDDER
    return [
        row
        for system, against in {EMBEDDER: CHAMPION_EMBEDDER, RERANKER: pair}.items()
        if system in values
        for row in compare(values, [system], against, ranked.settings, ranked.seed, without=champion.seen)
    ]


def _per_query_table(values: Values) -> pa.Table:
    rows = [
        (system, query_id, metric, value)
        for system, of_system in values.items()
        for metric, of_queries in of_system.items()
        for query_id, value in of_queries.items()
    ]
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(PER_QUERY.names, map(list, columns), strict=True)), schema=PER_QUERY)


def _descriptions(
    systems: list[str], settings: EvaluationSettings, weight: float | None, untrained: bool
) -> dict[str, str]:
    window = f"the fine-tuned embedder's first {settings.rerank_top_k} passages"
    head = ", with an untrained head" if untrained else ""
    share = (
        f"by the blend of its own score and the embedder's, which weighs {weight:.2f}"
        if weight
        else "by its own score alone"
    )
    told = {
        BM25: f"keyword search, Lucene's BM25 (k1 {K1}, b {B}), words or, for scripts without spaces, characters",
        BASE_EMBEDDER: "the embedder before fine-tuning",
        EMBEDDER: "the embedder after fine-tuning",
        BASE_RERANKER: f"the reranker before fine-tuning{head}: reorders {window} by its own score alone",
        RERANKER: f"the reranker after fine-tuning: reorders {window} {share}",
        BASE_PAIR: "both models before fine-tuning: the base reranker reorders the first "
        f"{settings.rerank_top_k} passages of the base embedder",
        CHAMPION_EMBEDDER: "the embedder that serves today",
        CHAMPION_PAIR: "what serves today: the champion's reranker reorders the first "
        f"{settings.rerank_top_k} passages of the champion's embedder",
        RERANKER_ALONE: f"the reranker after fine-tuning: reorders {window} by its own score alone",
    }
    return {system: told[system] for system in systems}


def _notes(
    collection: Collection, settings: EvaluationSettings, sampled: int, weight: float | None, seen: int
) -> list[str]:
    notes = []
    if collection.without_positive:
        notes.append(
            f"{collection.without_positive:,} test queries have no relevant passage and are left out: no metric is "
            "defined for them."
        )
    if sampled < len(collection.query_ids):
        notes.append(
            f"Rerankers were measured on a seeded sample of {sampled:,} of the {len(collection.query_ids):,} test "
            "questions, and every gain of theirs is over the other system on that same sample."
        )
    if seen:
        notes.append(
            f"{seen:,} test questions are left out wherever the champion is compared: it was trained on them, or on "
            "the passages that answer them."
        )
    if weight is not None:
        notes.append(
            f"In the final ranking the embedder's score has the weight {weight:.2f}, chosen on dev questions or given "
            "by the settings. The base reranker is ranked by its own score alone."
        )
    if len(collection.query_ids) < 100:
        notes.append(
            f"{len(collection.query_ids):,} test questions are few: the intervals are wide, and rougher than they look."
        )
    if settings.rerank_top_k < DEPTH:
        notes.append(
            f"Below rank {settings.rerank_top_k} a reranked list keeps the embedder's order, so Recall@100 is the "
            "embedder's."
        )
    return notes


def _changes(collection: Collection, rankings: Mapping[str, Ranking], values: Values) -> list[QueryChange]:
    """Every test query on which the two embedders differ in nDCG@10."""
    before, after = (values[system]["ndcg_at_10"] for system in (BASE_EMBEDDER, EMBEDDER))
    lists = rankings[BASE_EMBEDDER].passages, rankings[EMBEDDER].passages
    query, passage = collection.positives()
    bounds = np.searchsorted(query, np.arange(len(collection.query_ids) + 1))
    changes = []
    for row, query_id in enumerate(collection.query_ids):
        change = after[query_id] - before[query_id]
        if change == 0:
            continue
        relevant = passage[bounds[row] : bounds[row + 1]]
        ranks = [_first(found[row], relevant) for found in lists]
        best = lists[int(change > 0)][row]
        shown = next((p for p in best.tolist() if p in relevant), relevant[0])
        changes.append(
            QueryChange(
                query=collection.queries[row],
                positive=excerpt(collection.texts[shown]),
                change=change,
                rank_before=ranks[0],
                rank_after=ranks[1],
                first_before=excerpt(collection.texts[lists[0][row, 0]]),
                first_after=excerpt(collection.texts[lists[1][row, 0]]),
                first_before_relevant=ranks[0] == 1,
                first_after_relevant=ranks[1] == 1,
            )
        )
    return changes


def _first(found: np.ndarray, relevant: np.ndarray) -> int | None:
    at = np.flatnonzero(np.isin(found, relevant))
    return int(at[0]) + 1 if len(at) else None


def write_results(out: Path, summary: list[Comparison], details: Details) -> EvaluationReport:
    """What every evaluation leaves for people: figures, evaluators, the report; its verdict in the log."""
    _write_json(out / SUMMARY_FILE, [row.model_dump(mode="json") for row in summary])
    _write_json(out / DETAILS_FILE, details.model_dump(mode="json"))
    _write_json(out / EVALUATORS_FILE, [row.model_dump(mode="json") for row in details.sources])
    write_report(out)
    logger.info("%s", details.headline)
    logger.info("%s", details.gate.sentence)
    return EvaluationReport(summary=summary, details=details)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
