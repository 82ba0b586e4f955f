"""Guard sets written as people bring them, and an embedder that knows words only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]


class WordEmbedder:
    """Texts that share words are alike; `deaf_to` are words that it does not know (any more)."""

    precision = "float32"

    def __init__(self, deaf_to: Sequence[str] = ()) -> None:
        self.deaf_to = set(deaf_to)

    def encode_queries(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        return np.stack([self._encode(text) for text in texts])

    def encode_passages(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        return np.stack([self._encode(text) for text in texts])

    def _encode(self, text: str) -> np.ndarray:
        known = [word for word in text.lower().split() if word not in self.deaf_to]
        vectors = [np.random.default_rng(list(word.encode())).normal(size=64) for word in known]
        summed = np.sum(vectors, axis=0) if vectors else np.eye(64)[0]
        return (summed / np.linalg.norm(summed)).astype(np.float32)


def write_beir(folder: Path, corpus: Rows, queries: Rows, qrels: Rows) -> Path:
    """As parquet: rows of passage_id, text, title; query_id, text; query_id, passage_id, score, split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), folder / f"{name}.parquet")
    return folder


def write_beir_original(folder: Path, corpus: Rows, queries: Rows, qrels: Rows) -> Path:
    """The same rows in BEIR's own layout; one tsv a split."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    passages = [{"_id": r["passage_id"], "title": r.get("title"), "text": r["text"], "metadata": {}} for r in corpus]
    asked = [{"_id": r["query_id"], "text": r["text"]} for r in queries]
    for name, rows in (("corpus", passages), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for split in sorted({str(row["split"]) for row in qrels}):
        lines = [f"{r['query_id']}\t{r['passage_id']}\t{r['score']}" for r in qrels if r["split"] == split]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def write_pairs(path: Path, rows: Rows) -> Path:
    """Rows of sentence1, sentence2, score, split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def small_retrieval(count: int = 12) -> dict[str, list[dict[str, Any]]]:
    """One passage a query, which holds its word; half of the judgements are of split `test`, half of `train`."""
    words = [f"word{i}" for i in range(count)]
    return {
        "corpus": [
            {"passage_id": f"p{i}", "title": f"about {word}", "text": "it is here"} for i, word in enumerate(words)
        ],
        "queries": [{"query_id": f"q{i}", "text": f"where is {word}"} for i, word in enumerate(words)],
        "qrels": [
            {"query_id": f"q{i}", "passage_id": f"p{i}", "score": 1, "split": "test" if i % 2 == 0 else "train"}
            for i in range(count)
        ],
    }


def small_pairs(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences of six words; the score is how many they share."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = [f"w{j}" for j in draw.choice(200, size=12, replace=False)]
        shared = int(draw.integers(0, 7))
        rows.append(
            {
                "sentence1": " ".join(words[:6]),
                "sentence2": " ".join([*words[:shared], *words[6 : 12 - shared]]),
                "score": float(shared),
                "split": "test" if i % 4 else "train",
            }
        )
    return rows
