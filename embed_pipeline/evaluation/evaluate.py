"""Base and fine-tuned models on test questions that nothing was trained on, over the whole corpus."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from embed_pipeline.errors import ArtifactError, ModelError
from embed_pipeline.evaluation.bm25 import K1, B, bm25_search
from embed_pipeline.evaluation.metrics import Qrels, per_query
from embed_pipeline.evaluation.report import write_report
from embed_pipeline.evaluation.results import (
    BASE_EMBEDDER,
    BASE_RERANKER,
    BM25,
    DETAILS_FILE,
    EMBEDDER,
    RERANKER,
    RERANKER_ALONE,
    SUMMARY_FILE,
    Comparison,
    Details,
    EvaluationReport,
    QueryChange,
    Values,
    compare,
)
from embed_pipeline.evaluation.systems import (
    DEPTH,
    Ranking,
    rank_with_embedder,
    read_serving,
    reordered,
    rerank,
)
from embed_pipeline.evaluation.verdict import headline, verdicts
from embed_pipeline.mining.report import ScoreSummary, excerpt, score_summary
from embed_pipeline.mining.retrieve import sample_rows
from embed_pipeline.models.collection import Collection, load_collection
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.folder import has_trained_head
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.settings import EncodingSettings, EvaluationSettings, Precision
from embed_pipeline.tables import PER_QUERY, PER_QUERY_FILE, RANKINGS, RANKINGS_FILE, write
from embed_pipeline.training.job import MODEL_FOLDER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparedModels:
    """The folders of what is compared. Without rerankers only the embedders and BM25 are."""

    base_embedder: Path  # model folder
    base_encoding: EncodingSettings  # laid over what that folder says; the fine-tuned one carries its own
    embedder: Path  # model folder
    base_reranker: Path | None = None  # model folder; an encoder without a head gets the one training began with
    base_reranker_max_length: int = 512  # tokens of a pair
    reranker: Path | None = None  # folder of a version: `model/` and `serving.json`
    # Whether Python code that comes with a model may run: of the base it holds for the fine-tuned one as well.
    trust_embedder_code: bool = False
    trust_reranker_code: bool = False


def evaluate(
    cleaned: Path,
    models: ComparedModels,
    settings: EvaluationSettings,
    seed: int,
    out: Path,
    *,
    encode_precision: Precision = "auto",
    cache_folder: Path | None = None,
    title: str = "Evaluation",
    versions: Mapping[str, str] | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Compare BM25, both embedders and both rerankers on the test split of a `cleaned_pairs` folder.

    Writes into `out`: `summary.json`, a list of {system, metric, value, gain, interval_low, interval_high,
    num_queries} with gains over the base embedder on the same queries; `details.json`; `per_query.parquet`;
    `rankings.parquet` (the first 100 of each query); `report.html`. `versions` (what was compared, made by what) is
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
    _check_folders(models)
    ranked = _Ranked(collection, models, settings, seed, encode_precision, cache_folder, progress)
    ranked.by_bm25()
    ranked.by_embedders()
    ranked.by_rerankers()
    rankings = {system: ranking.top(DEPTH) for system, ranking in ranked.rankings.items()}
    values = _measure(collection, rankings)
    write(_per_query_table(values), PER_QUERY, out / PER_QUERY_FILE)
    tables = [ranking.table(system, collection) for system, ranking in rankings.items()]
    write(pa.concat_tables(tables), RANKINGS, out / RANKINGS_FILE)
    summary = compare(
        values, [system for system in rankings if system != RERANKER_ALONE], BASE_EMBEDDER, settings, seed
    )
    details = _details(ranked, rankings, values, summary, title, dict(versions or {}))
    _write_json(out / SUMMARY_FILE, [row.model_dump(mode="json") for row in summary])
    _write_json(out / DETAILS_FILE, details.model_dump(mode="json"))
    write_report(out)
    logger.info("%s", details.headline)
    return EvaluationReport(summary=summary, details=details)


def _check_folders(models: ComparedModels) -> None:
    """Before any work: a missing model is found in a moment, not after half an hour."""
    wanted = {
        "base embedder": models.base_embedder,
        "fine-tuned embedder": models.embedder,
        "base reranker": models.base_reranker,
        "fine-tuned reranker": models.reranker / MODEL_FOLDER if models.reranker else None,
    }
    for what, folder in wanted.items():
        if folder is not None and not (folder / "config.json").is_file():
            raise ModelError(f"the {what} is not at {folder}: expected a Hugging Face model folder with a config.json")
    if models.reranker is not None:
        read_serving(models.reranker)


@dataclass
class _Ranked:
    """Every system's ranking, made one after the other so that one model is in memory at a time."""

    collection: Collection
    models: ComparedModels
    settings: EvaluationSettings
    seed: int
    precision: Precision
    cache_folder: Path | None
    progress: bool

    def __post_init__(self) -> None:
        self.depth = max(DEPTH, self.settings.rerank_top_k)
        self.sampled = sample_rows(len(self.collection.query_ids), self.settings.rerank_queries, self.seed)
        self.rankings: dict[str, Ranking] = {}
        self.milliseconds: dict[str, float] = {}
        self.scores: dict[str, ScoreSummary] = {}
        self.embedder_weight: float | None = None
        self.dev_by_weight: dict[str, float] = {}

    def by_bm25(self) -> None:
        queries = self.collection.queries
        started = time.perf_counter()
        found = bm25_search(queries, self.collection.texts, self.depth, progress=self.progress)
        self.milliseconds[BM25] = (time.perf_counter() - started) * 1_000 / len(queries)
        self.rankings[BM25] = Ranking(np.arange(len(queries)), *found)

    def by_embedders(self) -> None:
        folders = {
            BASE_EMBEDDER: (self.models.base_embedder, self.models.base_encoding),
            EMBEDDER: (self.models.embedder, None),
        }
        for system, (folder, encoding) in folders.items():
            logger.info("encoding %d passages with the %s", len(self.collection.texts), system.replace("_", " "))
            embedder = Embedder(
                folder,
                encoding,
                precision=self.precision,
                trust_remote_code=self.models.trust_embedder_code,
                cache_folder=self.cache_folder,
            )
            embedded = rank_with_embedder(self.collection, embedder, self.depth, progress=self.progress)
            self.rankings[system] = embedded.ranking
            self.milliseconds[system] = embedded.milliseconds_per_query
            self.scores[system] = score_summary(
                {"positive": embedded.positive_scores, "best other passage": embedded.best_other_scores}
            )

    def by_rerankers(self) -> None:
        candidates = self.rankings[EMBEDDER].of_rows(self.sampled)
        if self.models.base_reranker is not None:
            torch.manual_seed(self.seed)  # the head that training began with, where the base has none
            length = self.models.base_reranker_max_length
            logits = self._rerank(BASE_RERANKER, candidates, self.models.base_reranker, length)
            self.rankings[BASE_RERANKER] = reordered(candidates, logits, 0.0)
        if self.models.reranker is not None:
            self.embedder_weight, self.dev_by_weight = read_serving(self.models.reranker)
            logits = self._rerank(RERANKER, candidates, self.models.reranker / MODEL_FOLDER, None)
            self.rankings[RERANKER] = reordered(candidates, logits, self.embedder_weight)
            if self.embedder_weight > 0:
                self.rankings[RERANKER_ALONE] = reordered(candidates, logits, 0.0)

    def _rerank(self, system: str, candidates: Ranking, folder: Path, max_length: int | None) -> np.ndarray:
        top_k = self.settings.rerank_top_k
        logger.info("%s: scoring %d passages for each of %d queries", system, top_k, len(self.sampled))
        reranker = Reranker(
            folder, max_length=max_length, precision=self.precision, trust_remote_code=self.models.trust_reranker_code
        )
        logits, seconds = rerank(self.collection, candidates, top_k, reranker, progress=self.progress)
        self.milliseconds[system] = seconds * 1_000 / len(self.sampled)
        return logits


def _details(
    ranked: _Ranked,
    rankings: Mapping[str, Ranking],
    values: Values,
    summary: list[Comparison],
    title: str,
    versions: dict[str, str],
) -> Details:
    collection, settings = ranked.collection, ranked.settings
    against = [system for system in rankings if system not in (BASE_EMBEDDER, EMBEDDER)]
    over_embedder = compare(values, against, EMBEDDER, settings, ranked.seed)
    base_reranker = ranked.models.base_reranker
    untrained = base_reranker is not None and not has_trained_head(base_reranker)
    over_base_reranker = _over_base_reranker(values, settings, ranked.seed)
    changes = _changes(collection, rankings, values)
    claim, figures = headline(summary, settings.confidence)
    return Details(
        title=title,
        claim=claim,
        figures=figures,
        verdicts=verdicts(over_embedder, over_base_reranker, settings.confidence, untrained_head=untrained),
        systems=_descriptions(list(rankings), settings, ranked.embedder_weight, untrained),
        notes=_notes(collection, settings, len(ranked.sampled), ranked.embedder_weight),
        passages=len(collection.texts),
        queries=len(collection.query_ids),
        queries_without_positive=collection.without_positive,
        reranked_queries=len(ranked.sampled),
        rerank_top_k=settings.rerank_top_k,
        embedder_weight=ranked.embedder_weight,
        dev_ndcg_at_10_by_weight=ranked.dev_by_weight,
        over_embedder=over_embedder,
        over_base_reranker=over_base_reranker,
        milliseconds_per_query=ranked.milliseconds,
        scores=ranked.scores,
        better=sorted((c for c in changes if c.change > 0), key=lambda c: -c.change)[: settings.examples],
        worse=sorted((c for c in changes if c.change < 0), key=lambda c: c.change)[: settings.examples],
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
        RERANKER_ALONE: f"the reranker after fine-tuning: reorders {window} by its own score alone",
    }
    return {system: told[system] for system in systems}


def _notes(collection: Collection, settings: EvaluationSettings, sampled: int, weight: float | None) -> list[str]:
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


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
