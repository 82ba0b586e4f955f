"""A cleaned_pairs folder from rows, and models whose answers are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from embed_pipeline.tables import (
    EXAMPLES,
    EXAMPLES_FILE,
    PASSAGES,
    PASSAGES_FILE,
    QRELS,
    QRELS_FILE,
    QUERIES,
    QUERIES_FILE,
    WITHHELD,
    WITHHELD_FILE,
    write,
)


class GivenEmbedder:
    """Texts are row numbers into given vectors."""

    precision = "float32"

    def __init__(self, queries: np.ndarray, passages: np.ndarray) -> None:
        self.queries, self.passages = queries, passages

    def encode_queries(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        return self.queries[[int(text.removeprefix("q")) for text in texts]]

    def encode_passages(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        return self.passages[[int(text.removeprefix("p")) for text in texts]]


class GivenReranker:
    """The score of a pair is what `logit` says of its two texts."""

    def __init__(self, logit: Callable[[str, str], float]) -> None:
        self.logit = logit
        self.seen: list[tuple[str, str]] = []

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = True) -> np.ndarray:
        self.seen += pairs
        return np.array([self.logit(query, passage) for query, passage in pairs], dtype=np.float32)


def unit_rows(vectors: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    matrix = np.asarray(vectors, dtype=np.float64)
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)


def write_cleaned(
    folder: Path,
    queries: Sequence[tuple[str, str]],
    passages: Sequence[tuple[str, str]],
    qrels: Sequence[tuple[str, str, float]],
    *,
    clusters: Sequence[int] | None = None,
    split: str = "train",
    withheld: Sequence[tuple[str, str]] = (),
) -> Path:
    """(id, text) rows of queries and passages, (query id, passage id, relevance) judgements, withheld pairs of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(passages)
    query_rows = {
        "query_id": [id for id, _ in queries],
        "query": [text for _, text in queries],
        "split": [split] * len(queries),
        "group_id": [id for id, _ in queries],
    }
    passage_rows = {
        "passage_id": [id for id, _ in passages],
        "title": pa.nulls(count, pa.string()),
        "text": [text for _, text in passages],
        "document_id": pa.nulls(count, pa.string()),
        "cluster_id": [f"c{c}" for c in (clusters if clusters is not None else range(count))],
    }
    names = ("query_id", "passage_id", "relevance")
    qrel_rows = {name: [row[i] for row in qrels] for i, name in enumerate(names)}
    qrel_rows["teacher_score"] = [None] * len(qrels)
    write(pa.table(query_rows, schema=QUERIES), QUERIES, folder / QUERIES_FILE)
    write(pa.table(passage_rows, schema=PASSAGES), PASSAGES, folder / PASSAGES_FILE)
    write(pa.table(qrel_rows, schema=QRELS), QRELS, folder / QRELS_FILE)
    pairs = [{"query_id": query_id, "passage_id": passage_id} for query_id, passage_id in withheld]
    write(pa.Table.from_pylist(pairs, schema=WITHHELD), WITHHELD, folder / WITHHELD_FILE)
    return folder


def write_examples(
    folder: Path,
    rows: Sequence[tuple[str, str | None, float | None, str | None]],
    *,
    splits: Sequence[str] = ("test",),
) -> Path:
    """(sentence1, sentence2, score, label) rows of an example kind, all of them in each of `splits`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("sentence1", "sentence2", "score", "label")
    examples = [
        {"example_id": f"{split}{i:04}", "split": split, "group_id": str(i), **dict(zip(names, row, strict=True))}
        for split in splits
        for i, row in enumerate(rows)
    ]
    write(pa.Table.from_pylist(examples, schema=EXAMPLES), EXAMPLES, folder / EXAMPLES_FILE)
    return folder
