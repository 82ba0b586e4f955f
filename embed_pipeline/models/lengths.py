"""How many tokens the texts of cleaned pairs have for a model, read without torch."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from embed_pipeline.models.folder import own_lengths, own_prompts
from embed_pipeline.tables import EXAMPLES_FILE, PASSAGES_FILE, QUERIES_FILE, connect, count_split, passage_text

_TOKENIZER_FILE = "tokenizer.json"
_LONGEST = 8  # texts that are tokenized to know how long the longest is
_SAMPLE = 1_000  # texts of a kind: the share that is cut is then known to 0.7 %
_SHARE = 0.95
_MULTIPLE = 8  # of which matrix units like their sides
_SHORTEST = 32  # below, nothing is saved
_CHARACTERS = 20  # of a token at most, so that a book is not tokenized to see that it is too long


@dataclass(frozen=True)
class FittedLengths:
    """Maximum lengths that cut one text in twenty, and the shares that they really cut."""

    query: int
    passage: int
    queries_cut: float
    passages_cut: float

    def sentence(self) -> str:
        return (
            f"maximum lengths by the texts: queries {self.query} tokens ({100 * self.queries_cut:.1f} % are cut), "
            f"passages {self.passage} ({100 * self.passages_cut:.1f} % are cut)"
        )


@functools.lru_cache(maxsize=16)
def fitted_lengths(
    cleaned: Path, folder: Path, query_prompt: str | None, passage_prompt: str | None
) -> FittedLengths | None:
    """The 95th percentile of the tokens of train queries and of passages, special ones and prompts included.

    Rounded up to a multiple of 8, at least 32, at most the lengths that the model in `folder` has itself. Sentences of
    a source without queries are measured as both. 1,000 texts of each are looked at, chosen by the hash of their ids:
    the same tables give the same answer. None where the model's tokenizer cannot be read without its own code, or the
    model does not say its lengths. A prompt of None is the model's own.
    """
    tokenizer, limits, prompts = _tokenizer(folder), own_lengths(folder), own_prompts(folder)
    if tokenizer is None or limits[0] is None or limits[1] is None:
        return None
    queries, passages = _sample(cleaned)
    if not queries or not passages:
        return None
    before_query = prompts[0] if query_prompt is None else query_prompt
    before_passage = prompts[1] if passage_prompt is None else passage_prompt
    of_queries = _tokens(tokenizer, [before_query + text for text in queries], limits[0] + 1)
    of_passages = _tokens(tokenizer, [before_passage + text for text in passages], limits[1] + 1)
    query, passage = _fitted(of_queries, limits[0]), _fitted(of_passages, limits[1])
    return FittedLengths(query, passage, float((of_queries > query).mean()), float((of_passages > passage).mean()))


def _fitted(tokens: np.ndarray, limit: int) -> int:
    percentile = math.ceil(float(np.quantile(tokens, _SHARE)) / _MULTIPLE) * _MULTIPLE
    return min(limit, max(_SHORTEST, percentile))


def _sample(cleaned: Path) -> tuple[list[str], list[str]]:
    """Train queries and passages; or the sentences of train as both."""
    with connect() as database:
        if (cleaned / QUERIES_FILE).is_file():
            queries = _rows(database, cleaned / QUERIES_FILE, "query, NULL", "query_id", "WHERE split = 'train'")
            passages = _rows(database, cleaned / PASSAGES_FILE, "text, title", "passage_id", "")
            return [text for text, _ in queries], [passage_text(title, text) for text, title in passages]
        examples = _rows(
            database, cleaned / EXAMPLES_FILE, "sentence1, sentence2", "example_id", "WHERE split = 'train'"
        )
        sentences = [text for pair in examples for text in pair if text is not None]
        return sentences, sentences


def _rows(
    database: duckdb.DuckDBPyConnection, table: Path, columns: str, key: str, condition: str
) -> list[tuple[str, str | None]]:
    return database.execute(
        f"SELECT {columns} FROM stored($table) {condition} ORDER BY md5({key}), {key} LIMIT {_SAMPLE}",
        {"table": str(table)},
    ).fetchall()


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
    with connect() as database:
        queries, passages = ({"table": str(cleaned / name)} for name in (QUERIES_FILE, PASSAGES_FILE))
        texts = database.execute(
            f"SELECT query FROM stored($table) WHERE split = 'train' ORDER BY length(query) DESC LIMIT {_LONGEST}",
            queries,
        ).fetchall()
        rank = 3 * pq.read_metadata(cleaned / PASSAGES_FILE).num_rows // max(3, count_split(cleaned, "train"))
        long = database.execute(
            f"SELECT title, text FROM stored($table) ORDER BY length(text) DESC LIMIT {_LONGEST} OFFSET {rank}",
            passages,
        ).fetchall()
    if not texts or not long:
        return None
    of_queries = _tokens(tokenizer, [text for (text,) in texts], query_limit)
    of_passages = _tokens(tokenizer, [passage_text(title, text) for title, text in long], passage_limit)
    return LongestTexts(int(of_queries.max()), int(np.median(of_passages)))


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
