"""Whether the weights that a training ends with still tell texts apart: no loss and no dev figure says so for sure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

from embed_pipeline.models.collapse import is_collapsed, told
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.training.process import Rank
from embed_pipeline.training.sources import TrainingSource

_QUERIES = 16  # what is looked at: spread evenly over the own source


def collapsed(model: SentenceTransformer | CrossEncoder, sources: Sequence[TrainingSource], rank: Rank) -> str | None:
    """A sentence where the model gives all texts of a sample the same answer. Rank 0 alone asks."""
    own = sources[0]
    if own.queries:
        rows = [(query.query, query.positives[0]) for query in own.queries]
    else:
        rows = [(example.sentence1, example.sentence2 or example.sentence1) for example in own.examples]
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), _QUERIES)).astype(int)]
    queries, passages = [query for query, _ in rows], list(dict.fromkeys(passage for _, passage in rows))
    if isinstance(model, CrossEncoder):
        pairs = [(query, passage) for query in queries for passage in passages]
        logits = Reranker.around(model, rank.precision).score(pairs, progress=False)
        return told("the reranker") if is_collapsed(logits.reshape(len(queries), -1)) else None
    assert isinstance(model, SentenceTransformer)
    embedder = Embedder.around(model, rank.precision)
    asked, found = (
        embedder.encode_sentences(queries, progress=False),
        embedder.encode_sentences(passages, progress=False),
    )
    return told("the embedder") if is_collapsed(asked @ found.T) else None
