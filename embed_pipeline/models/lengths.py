"""How many tokens the texts of cleaned pairs have for a model, read without torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
from tokenizers import Tokenizer

from embed_pipeline.tables import PASSAGES_FILE, QUERIES_FILE, passage_text

_TOKENIZER_FILE = "tokenizer.json"
_LONGEST = 8  # texts that are tokenized to know how long the longest is
_CHARACTERS = 20  # of a token at most, so that a book is not tokenized to see that it is too long


@dataclass(frozen=True)
class LongestTexts:
    """Tokens, special ones included, that the longest texts of a training have at least."""

    query: int
    passage: int


def longest_texts(cleaned: Path, folder: Path, query_limit: int, passage_limit: int) -> LongestTexts | None:
    """Of the train queries, and of passages as they are drawn for them, each cut at its limit.

    Which passages will be negatives is not known yet. The longest of n that are drawn from a corpus is above its
    quantile 1 - 3 / n in 95 of 100 cases, so that quantile is told. `folder`: the model's; None where it holds no
    tokenizer that can be read without the model's own code.
    """
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        return None
    with duckdb.connect() as database:
        queries = f"read_parquet('{_quoted(cleaned / QUERIES_FILE)}', hive_partitioning=false)"
        passages = f"read_parquet('{_quoted(cleaned / PASSAGES_FILE)}', hive_partitioning=false)"
        texts = database.execute(
            f"SELECT query FROM {queries} WHERE split = 'train' ORDER BY length(query) DESC LIMIT {_LONGEST}"
        ).fetchall()
        count = _count(database, f"{queries} WHERE split = 'train'")
        rank = 3 * _count(database, passages) // max(3, count)
        long = database.execute(
            f"SELECT title, text FROM {passages} ORDER BY length(text) DESC LIMIT {_LONGEST} OFFSET {rank}"
        ).fetchall()
    if not texts or not long:
        return None
    of_queries = _tokens(tokenizer, [text for (text,) in texts], query_limit)
    of_passages = _tokens(tokenizer, [passage_text(title, text) for title, text in long], passage_limit)
    return LongestTexts(int(of_queries.max()), int(np.median(of_passages)))


def _count(database: duckdb.DuckDBPyConnection, rows: str) -> int:
    found = database.execute(f"SELECT count(*) FROM {rows}").fetchone()
    assert found is not None
    return int(found[0])


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> np.ndarray:
    """(n,) texts -> (n,) numbers of tokens, `limit` at most."""
    most = limit * _CHARACTERS
    found = tokenizer.encode_batch([text[:most] for text in texts])
    return np.array([min(limit, len(one.ids)) for one in found], dtype=np.int64)


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Tokenizer | None:
    """The model's own, without its truncation and padding."""
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
        return None
    told = json.loads(path.read_text())
    return Tokenizer.from_str(json.dumps({**told, "truncation": None, "padding": None}))


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
