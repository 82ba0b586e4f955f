"""What a form costs: the metric on the test split against the original's, how far embeddings moved, and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embed_pipeline.errors import ArtifactError
from embed_pipeline.evaluation.correlation import spearman
from embed_pipeline.evaluation.figure import Figure
from embed_pipeline.evaluation.metrics import ndcg_at_10
from embed_pipeline.exporting.vectors import VectorForm
from embed_pipeline.mining.retrieve import sample_rows
from embed_pipeline.models.collection import load_collection
from embed_pipeline.models.search import search
from embed_pipeline.settings import ExportSettings
from embed_pipeline.tables import EXAMPLES_FILE

_TOP_K = 10
_TIMED_TEXTS = 256
_CALIBRATION_TEXTS = 10_000


class Encodes(Protocol):
    """The original, or one of its forms."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray: ...
    def encode_passages(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Encoded:
    """Unit rows: questions and all passages, or both sides of the pairs."""

    left: np.ndarray
    right: np.ndarray

    def least_cosine(self, other: Encoded) -> float:
        """The smallest cosine between any embedding here and its counterpart."""
        sides = ((self.left, other.left), (self.right, other.right))
        return min(float((mine.astype(np.float64) * theirs).sum(axis=1).min()) for mine, theirs in sides)


class TestSplit(Protocol):
    """The questions or pairs of the test split."""

    metric: str
    items: int
    passages: int | None
    timed: list[str]  # texts that are encoded against the clock

    def encode(self, embedder: Encodes) -> Encoded: ...

    def calibration(self, embedder: Encodes, encoded: Encoded) -> np.ndarray:
        """Embeddings of train texts (n, d)."""

    def measure(self, encoded: Encoded, form: VectorForm | None = None) -> Figure:
        """The metric where the right side is kept in `form`; None: as float32."""


def load_test_split(cleaned: Path, settings: ExportSettings, seed: int, *, scored: bool) -> TestSplit:
    """The test split of a `cleaned_pairs` folder, or a seeded sample of its questions (`settings.queries`).

    Raises ArtifactError when it holds no question to measure on.
    """
    return ScoredTest(cleaned, settings.queries, seed) if scored else RetrievalTest(cleaned, settings.queries, seed)


class RetrievalTest:
    """Questions over the whole corpus, by nDCG@10."""

    metric: str = "ndcg_at_10"
    passages: int | None

    def __init__(self, cleaned: Path, queries: int | None, seed: int) -> None:
        self._collection = load_collection(cleaned, ("test",))
        _refuse_nothing(len(self._collection.query_ids), cleaned)
        self._rows = sample_rows(len(self._collection.query_ids), queries, seed)
        self._qrels = self._collection.qrels(self._rows)
        # Every split's collection holds the same passages in the same order.
        self._trained = np.unique(load_collection(cleaned, ("train",)).positives()[1])
        texts = self._collection.texts
        self.items, self.passages = len(self._rows), len(texts)
        self.timed = [texts[row] for row in sample_rows(len(texts), _TIMED_TEXTS, seed)]

    def encode(self, embedder: Encodes) -> Encoded:
        queries = [self._collection.queries[row] for row in self._rows]
        return Encoded(embedder.encode_queries(queries), embedder.encode_passages(self._collection.texts))

    def calibration(self, embedder: Encodes, encoded: Encoded) -> np.ndarray:
        return encoded.right[self._trained]

    def measure(self, encoded: Encoded, form: VectorForm | None = None) -> Figure:
        if form is None:
            indices, _ = search(encoded.left, encoded.right, _TOP_K)
        else:
            indices, _ = form.search(encoded.left, form.store(encoded.right), _TOP_K)
        ids = self._collection.passage_ids
        run = {
            str(self._collection.query_ids[row]): {str(ids[i]): float(_TOP_K - rank) for rank, i in enumerate(found)}
            for row, found in zip(self._rows, indices.tolist(), strict=True)
        }
        by_query = ndcg_at_10(self._qrels, run)
        per_item = np.array([by_query[str(self._collection.query_ids[row])] for row in self._rows])
        return Figure(float(per_item.mean()), per_item)


class ScoredTest:
    """Scored pairs, by Spearman's rank correlation of cosine and score; both sides are encoded as passages."""

    metric: str = "spearman"
    passages: int | None = None

    def __init__(self, cleaned: Path, pairs: int | None, seed: int) -> None:
        examples = pq.read_table(
            cleaned / EXAMPLES_FILE, columns=["sentence1", "sentence2", "score", "split"], partitioning=None
        )
        train, test = (examples.filter(pc.equal(examples["split"], split)) for split in ("train", "test"))
        _refuse_nothing(test.num_rows, cleaned)
        test = test.take(sample_rows(test.num_rows, pairs, seed))
        self._left, self._right = test["sentence1"].to_pylist(), test["sentence2"].to_pylist()
        self._expected = test["score"].to_numpy()
        train = train.take(sample_rows(train.num_rows, _CALIBRATION_TEXTS, seed))
        self._trained = train["sentence2"].to_pylist()
        self.items = test.num_rows
        texts = list(dict.fromkeys([*self._left, *self._right]))
        self.timed = [texts[row] for row in sample_rows(len(texts), _TIMED_TEXTS, seed)]

    def encode(self, embedder: Encodes) -> Encoded:
        return Encoded(embedder.encode_passages(self._left), embedder.encode_passages(self._right))

    def calibration(self, embedder: Encodes, encoded: Encoded) -> np.ndarray:
        return embedder.encode_passages(self._trained)

    def measure(self, encoded: Encoded, form: VectorForm | None = None) -> Figure:
        left, right = encoded.left, encoded.right
        if form is not None:
            left, right = form.asked(left), form.restore(form.store(right))
        similarity = (left.astype(np.float64) * right).sum(axis=1)
        similarity /= np.maximum(np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1), 1e-12)
        return Figure(spearman(similarity, self._expected), similarity, self._expected)


def texts_per_second(encode: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    """The better of two rounds over `texts`, after a first few that warm up."""
    encode(texts[:32])
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        encode(texts)
        seconds.append(time.perf_counter() - started)
    return len(texts) / min(seconds)


def _refuse_nothing(items: int, cleaned: Path) -> None:
    if not items:
        raise ArtifactError(
            f"{cleaned} holds nothing in split test to measure exports on. Raise `cleaning.split.test`, or mend the "
            "split column"
        )
