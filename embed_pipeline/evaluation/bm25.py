"""Keyword search: what one has without any model."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import bm25s
import numpy as np
import regex
from tqdm.auto import tqdm

K1, B = 1.5, 0.75
"""The usual values (Robertson and Zaragoza 2009), bm25s' defaults."""

# Scripts that are written without spaces between words.
_UNSPACED = "".join(
    rf"\p{{Script={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese", "Balinese")
)
# The prolonged sound mark of kana, and kana marks, belong to no script of their own. A grapheme is a letter with its
# vowel signs: in Thai, a sign alone says nothing. Underscores and hyphens part words, as in identifiers.
_RUN = regex.compile(
    rf"[{_UNSPACED}\u30fc\uff70][{_UNSPACED}\u30fc\uff70\p{{M}}]*|[\p{{L}}\p{{M}}\p{{N}}--[{_UNSPACED}]]+", regex.V1
)
_STARTS_UNSPACED = regex.compile(rf"[{_UNSPACED}\u30fc\uff70]", regex.V1)


def tokens(text: str) -> list[str]:
    """The terms of a text in any language.

    Words, case-folded and NFKC-normalised; where a script has no spaces, every character (with its signs) and every
    pair of neighbours instead, the common baseline for Chinese and Japanese retrieval (Kwok, SIGIR 1997). No stemming
    and no stop words: the pipeline does not know which language its texts are in, and BM25's inverse document
    frequency takes most of the weight off frequent words by itself.
    """
    found: list[str] = []
    for run in _RUN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if _STARTS_UNSPACED.match(run):
            characters = regex.findall(r"\X", run)
            found += characters
            found += [left + right for left, right in pairwise(characters)]
        else:
            found.append(run)
    return found


def bm25_search(
    queries: Sequence[str], passages: Sequence[str], top_k: int, *, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) queries, (m,) passages -> passage rows (n, k) int64 and scores (n, k) float32, best first.

    Only passages that share a term with the query are found; the rest of a row is -1, with score 0. Equal scores are
    ordered by passage row. Scores are Lucene's BM25 by bm25s.
    """
    k = min(top_k, len(passages))
    indices = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.zeros((len(queries), k), dtype=np.float32)
    terms = [tokens(text) for text in tqdm(passages, "BM25 index", disable=not progress, unit="passage")]
    if not any(terms):
        return indices, scores
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(terms, show_progress=False)
    for row, query in enumerate(tqdm(queries, "BM25 search", disable=not progress, unit="query")):
        known = [term for term in tokens(query) if term in index.vocab_dict]
        if not known:
            continue
        of_all = index.get_scores(known)
        found = np.flatnonzero(of_all > 0)
        if len(found) > k:
            # All that reach the k-th score, so that ties at the boundary are settled below and not by chance.
            found = found[of_all[found] >= np.partition(of_all[found], -k)[-k]]
        found = found[np.lexsort((found, -of_all[found]))][:k]
        indices[row, : len(found)] = found
        scores[row, : len(found)] = of_all[found]
    return indices, scores
