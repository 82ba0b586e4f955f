"""Cleaned pairs -> hard negatives: encode once, search exactly, select, and keep account of what was refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from embed_pipeline.errors import ArtifactError
from embed_pipeline.mining.report import MiningReport, MiningTimes, examples_of, score_summary
from embed_pipeline.mining.select import ORIGINS, REASONS, Candidates, Selection, select
from embed_pipeline.mining.teacher import CrossEncoderTeacher, ScoresPairs, TeacherScores, delivered_scores
from embed_pipeline.models.collection import Collection, load_collection
from embed_pipeline.models.ranks import ALONE, Ranks
from embed_pipeline.models.search import pair_scores
from embed_pipeline.settings import MiningSettings
from embed_pipeline.tables import HARD_NEGATIVES, HARD_NEGATIVES_FILE, REFUSED, REFUSED_FILE, write

logger = logging.getLogger(__name__)

# A query whose whole window was refused would bring up to top_k rows; its best-ranked tell the story.
REFUSED_ROWS_PER_QUERY = 30


class EncodesTexts(Protocol):
    """What mining needs of `models.embedder.Embedder`."""

    @property
    def precision(self) -> str: ...

    def encode_queries(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray: ...
    def encode_passages(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray: ...


def mine(
    cleaned: Path,
    embedder: EncodesTexts,
    settings: MiningSettings,
    seed: int,
    out: Path,
    *,
    splits: Sequence[str] = ("train",),
    cross_encoder: ScoresPairs | None = None,
    keep_scored: bool = False,
    ranks: Ranks = ALONE,
    progress: bool = True,
) -> MiningReport:
    """Mine hard negatives for every query of `splits` that has a positive; see `select.select` for the rules.

    Writes `hard_negatives.parquet` (one row a query, in the order of the queries table; negatives given, then mined,
    then random, each from the highest score) and `refused.parquet` (up to 30 rows a query) into `out`. Candidates are
    all passages, whatever split their own queries are in: a passage is not a question, and a test passage as a
    negative teaches nothing about its question.

    Positives and the negatives taken carry a teacher's scores: the logits of `cross_encoder`, else what the judgements
    came with; a query of which a text has none carries none. Without a cross-encoder, `keep_scored` lets queries whose
    positives and given negatives all came with scores keep to these, since no other negative would have one.

    Raises ArtifactError when `cleaned` is incomplete or holds no such query, ModelError when an embedding is not
    finite, ValueError when `cross_encoder` and `settings.cross_encoder` are not given together.
    """
    if (cross_encoder is None) != (settings.cross_encoder is None):
        raise ValueError("`cross_encoder` (the model) and `settings.cross_encoder` (its limits) go together")
    collection = load_collection(cleaned, splits)
    if not len(collection.query_ids):
        raise ArtifactError(
            f"{cleaned} holds no query of split {' or '.join(splits)} with a relevant passage, so there is nothing to "
            f"mine for ({collection.without_positive} have none). See its `rejected` table, and `cleaning.split`"
        )
    logger.info("encoding %d passages and %d queries", len(collection.texts), len(collection.queries))
    started = time.perf_counter()
    passages = embedder.encode_passages(collection.texts, progress=progress)
    queries = embedder.encode_queries(collection.queries, progress=progress)
    encoded = time.perf_counter()
    indices, scores = ranks.search(queries, passages, settings.top_k, progress=progress)
    searched = time.perf_counter()
    logger.info("selecting negatives among the top %d of %d queries", settings.top_k, len(collection.queries))
    teacher: CrossEncoderTeacher | TeacherScores
    veto = closed = None
    if cross_encoder is not None and settings.cross_encoder is not None:
        teacher = CrossEncoderTeacher(collection, cross_encoder, settings.cross_encoder, progress)
        veto = teacher if settings.cross_encoder.max_score_ratio is not None else None
    else:
        teacher = delivered_scores(cleaned, collection)
        closed = _all_scored(collection, teacher) if keep_scored else None
    selection = select(
        Candidates(
            indices,
            scores,
            collection.query_ids,
            collection.clusters,
            collection.positives(),
            collection.negatives(),
            collection.withheld,
        ),
        settings,
        seed,
        lambda query, passage: pair_scores(queries, passages, query, passage),
        veto,
        closed=closed,
    )
    positive_query, positive_passage = collection.positives()
    positive_scores = pair_scores(queries, passages, positive_query, positive_passage)
    selected = time.perf_counter()
    taught = (teacher.of(positive_query, positive_passage), teacher.of(selection.query, selection.passage))
    write(_hard_negatives(collection, selection, positive_scores, taught), HARD_NEGATIVES, out / HARD_NEGATIVES_FILE)
    write(_refused(collection, selection), REFUSED, out / REFUSED_FILE)
    times = MiningTimes(encode=encoded - started, search=searched - encoded, select=selected - searched)
    report = _report(collection, selection, positive_scores, settings, embedder.precision, times)
    logger.info("%s", report.sentence())
    return report


def _all_scored(collection: Collection, teacher: TeacherScores) -> np.ndarray:
    """(n,) bool: queries with a given negative whose positives and given negatives all have a score."""
    closed = np.zeros(len(collection.query_ids), dtype=bool)
    closed[collection.negatives()[0]] = True
    closed[collection.judged_query[np.isnan(teacher.of(collection.judged_query, collection.judged_passage))]] = False
    return closed


def _hard_negatives(
    collection: Collection,
    selection: Selection,
    positive_scores: np.ndarray,
    taught: tuple[np.ndarray, np.ndarray],
) -> pa.Table:
    count = len(collection.query_ids)
    positive_query, positive_passage = collection.positives()
    ids = pa.array(collection.passage_ids, pa.string())
    positives = _offsets(positive_query, count)
    negatives = _offsets(selection.query, count)
    untaught = np.zeros(count, dtype=bool)
    for query, scores in zip((positive_query, selection.query), taught, strict=True):
        untaught[query[np.isnan(scores)]] = True
    teacher = {
        f"{what}_teacher_scores": pa.ListArray.from_arrays(offsets, pa.array(scores), mask=pa.array(untaught))
        for what, offsets, scores in zip(("positive", "negative"), (positives, negatives), taught, strict=True)
    }
    columns = {
        "query_id": pa.array(collection.query_ids, pa.string()),
        "positive_ids": pa.ListArray.from_arrays(positives, ids.take(pa.array(positive_passage))),
        "negative_ids": pa.ListArray.from_arrays(negatives, ids.take(pa.array(selection.passage))),
        "positive_scores": pa.ListArray.from_arrays(positives, pa.array(positive_scores, pa.float32())),
        "negative_scores": pa.ListArray.from_arrays(negatives, pa.array(selection.score, pa.float32())),
        "negative_origins": pa.ListArray.from_arrays(
            negatives, pa.array(np.array(ORIGINS, dtype=object)[selection.origin], pa.string())
        ),
    }
    return pa.table({**columns, **teacher})


def _refused(collection: Collection, selection: Selection) -> pa.Table:
    query = selection.refused_query
    shown = np.arange(len(query)) - np.searchsorted(query, query) < REFUSED_ROWS_PER_QUERY
    return pa.table(
        {
            "query_id": pa.array(collection.query_ids[query[shown]], pa.string()),
            "passage_id": pa.array(collection.passage_ids[selection.refused_passage[shown]], pa.string()),
            "rank": pa.array(selection.refused_rank[shown], pa.int32()),
            "score": pa.array(selection.refused_score[shown], pa.float32()),
            "reason": pa.array(np.array(REASONS, dtype=object)[selection.refused_reason[shown]], pa.string()),
        }
    )


def _report(
    collection: Collection,
    selection: Selection,
    positive_scores: np.ndarray,
    settings: MiningSettings,
    precision: str,
    times: MiningTimes,
) -> MiningReport:
    found = np.bincount(selection.query, minlength=len(collection.query_ids))
    origins = np.bincount(selection.origin, minlength=len(ORIGINS)).tolist()
    reasons = np.bincount(selection.refused_reason, minlength=len(REASONS)).tolist()
    return MiningReport(
        queries=len(collection.query_ids),
        queries_without_positive=collection.without_positive,
        passages=len(collection.texts),
        num_negatives=settings.num_negatives,
        taken=dict(zip(ORIGINS, origins, strict=True)),
        refused=dict(zip(REASONS, reasons, strict=True)),
        queries_with_fewer=int((found < settings.num_negatives).sum()),
        queries_with_none=int((found == 0).sum()),
        scores=score_summary(
            {"positive": positive_scores, "negative": selection.score, "refused": selection.refused_score}
        ),
        seconds=times,
        passages_per_second=len(collection.texts) / max(times.encode, 1e-9),
        precision=precision,
        examples=examples_of(collection, selection, positive_scores),
    )


def _offsets(rows: np.ndarray, count: int) -> pa.Array:
    return pa.array(np.searchsorted(rows, np.arange(count + 1)), pa.int32())
