"""A teacher's scores of queries and passages: a cross-encoder's logits, or what the rows came with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embed_pipeline.errors import ModelError
from embed_pipeline.models.collection import Collection
from embed_pipeline.settings import CrossEncoderSettings
from embed_pipeline.tables import QRELS_FILE


class ScoresPairs(Protocol):
    """What mining needs of `models.reranker.Reranker`."""

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = True) -> np.ndarray: ...


@dataclass
class TeacherScores:
    """Scores of (query row, passage row) pairs, as far as they are known."""

    passages: int
    _keys: list[np.ndarray] = field(default_factory=list)
    _scores: list[np.ndarray] = field(default_factory=list)

    def add(self, query: np.ndarray, passage: np.ndarray, scores: np.ndarray) -> None:
        self._keys.append(query * np.int64(self.passages) + passage)
        self._scores.append(scores.astype(np.float32))

    def of(self, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        """(p,) float32, NaN where a pair has none."""
        found = np.full(len(query), np.nan, dtype=np.float32)
        if not self._keys:
            return found
        # All that is known so far becomes one part, in the order that searches need.
        keys, scores = np.concatenate(self._keys), np.concatenate(self._scores)
        order = np.argsort(keys, kind="stable")
        self._keys, self._scores = [keys[order]], [scores[order]]
        wanted = query * np.int64(self.passages) + passage
        at = np.minimum(np.searchsorted(self._keys[0], wanted), max(0, len(keys) - 1))
        known = self._keys[0][at] == wanted if len(keys) else np.zeros(len(wanted), dtype=bool)
        found[known] = self._scores[0][at[known]]
        return found


def delivered_scores(cleaned: Path, collection: Collection) -> TeacherScores:
    """The scores that judgements came with."""
    qrels = pq.read_table(cleaned / QRELS_FILE, columns=["query_id", "passage_id", "teacher_score"], partitioning=None)
    qrels = qrels.filter(pc.is_valid(qrels["teacher_score"]))
    query = pc.index_in(qrels["query_id"], pa.array(collection.query_ids, pa.string()))
    passage = pc.index_in(qrels["passage_id"], pa.array(collection.passage_ids, pa.string()))
    there = pc.and_(pc.is_valid(query), pc.is_valid(passage))
    scores = TeacherScores(len(collection.texts))
    query_rows, passage_rows = (column.filter(there).to_numpy().astype(np.int64) for column in (query, passage))
    scores.add(query_rows, passage_rows, qrels["teacher_score"].filter(there).to_numpy())
    return scores


class CrossEncoderTeacher:
    """Scores each pair once. Called as a veto, it refuses what it takes for an answer."""

    def __init__(self, collection: Collection, model: ScoresPairs, settings: CrossEncoderSettings, progress: bool):
        self.collection, self.model, self.settings, self.progress = collection, model, settings, progress
        self.known = TeacherScores(len(collection.texts))
        self._best: np.ndarray | None = None

    def __call__(self, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        """True where sigmoid(score) exceeds `max_score_ratio` times that of the query's best positive.

        The best, not the lowest as for the embedder's threshold: a positive the cross-encoder does not understand would
        otherwise refuse everything.
        """
        assert self.settings.max_score_ratio is not None
        if self._best is None:
            positive_query, positive_passage = self.collection.positives()
            self._best = np.full(len(self.collection.query_ids), -np.inf)
            np.maximum.at(self._best, positive_query, _sigmoid(self.of(positive_query, positive_passage)))
        # A selection asks once for a pair, so nothing has to be looked up.
        return _sigmoid(self._score(query, passage)) > self.settings.max_score_ratio * self._best[query]

    def of(self, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        """(query rows, passage rows), each (p,) -> (p,) float32 logits; raises ModelError where one is not finite."""
        found = self.known.of(query, passage)
        missing = np.flatnonzero(np.isnan(found))
        if len(missing):
            found[missing] = self._score(query[missing], passage[missing])
        return found

    def _score(self, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
        pairs = [
            (self.collection.queries[q], self.collection.texts[p])
            for q, p in zip(query.tolist(), passage.tolist(), strict=True)
        ]
        scores = self.model.score(pairs, progress=self.progress)
        if not np.isfinite(scores).all():
            raise ModelError(
                "mining.cross_encoder.model gives scores that are not finite. Set encode_precision: float32, or take "
                "another model"
            )
        self.known.add(query, passage, scores)
        return scores


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # 1 / (1 + exp(-x)) without overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))
