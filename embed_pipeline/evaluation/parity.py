"""What the evaluated models give for a few texts: whatever is loaded later must give the same, to 1e-5.

The figures are taken in float32, whatever arithmetic the evaluation used. By them a registered copy, a folder on
another machine, or last month's champion is told from a model that is not the evaluated one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from embed_pipeline.errors import ArtifactError, ModelError
from embed_pipeline.mining.report import excerpt

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from embed_pipeline.models.collection import Collection

PARITY_FILE = "parity.json"
TOLERANCE = 1e-5
SAMPLE = 8

Score = Callable[[Sequence[tuple[str, str]]], np.ndarray]
"""(n,) pairs of (query, passage text) -> (n,) raw scores."""


class Parity(BaseModel):
    """A few test questions, an answer to each, and what the evaluated models made of them."""

    model_config = ConfigDict(frozen=True)

    queries: list[str]
    passages: list[str]  # one for each query
    query_embeddings: list[list[float]]  # float32, unit rows
    passage_embeddings: list[list[float]]
    scores: list[float]  # the reranker's raw ones, of each query with its passage; empty where there is none

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(zip(self.queries, self.passages, strict=True))

    def check_embedder(self, model: SentenceTransformer, what: str) -> float:
        """The largest difference in any coordinate; raises ModelError when it is above the tolerance."""
        return max(
            _compare(encode(model, self.queries, "query"), self.query_embeddings, self.queries, f"{what}, query"),
            _compare(encode(model, self.passages, "document"), self.passage_embeddings, self.passages, f"{what}, text"),
        )

    def check_reranker(self, score: Score, what: str) -> float:
        """The largest difference of a score, as a share of the largest score where that is above 1; may raise."""
        found, expected = np.asarray(score(self.pairs), dtype=np.float64), np.asarray(self.scores)
        scale = max(1.0, float(np.abs(expected).max()))
        texts = [f"{query} / {passage}" for query, passage in self.pairs]
        return _compare(found[:, None] / scale, expected[:, None] / scale, texts, f"{what}, pair")


def write_parity(
    texts: Collection | Sequence[tuple[str, str]],
    embedder: Path,
    reranker: Path | None,
    out: Path,
    *,
    trust_embedder_code: bool,
    trust_reranker_code: bool,
) -> None:
    """Write `parity.json` into `out`: the models in the folders `embedder` and `reranker` on a few test questions.

    `texts` are questions with their answers, or pairs of sentences. Among those taken are the longest question and the
    longest answer, so that a lost maximum length shows.
    """
    from embed_pipeline.models.embedder import load_sentence_transformer

    queries, passages = _sample(texts if isinstance(texts, Sequence) else _answered(texts))
    model = load_sentence_transformer(embedder, trust_remote_code=trust_embedder_code)
    scores: list[float] = []
    if reranker is not None:
        from embed_pipeline.models.reranker import Reranker

        cross_encoder = Reranker(reranker, precision="float32", trust_remote_code=trust_reranker_code, batch_size=1)
        scores = _exactly(cross_encoder.score(list(zip(queries, passages, strict=True)), progress=False))
    parity = Parity(
        queries=queries,
        passages=passages,
        query_embeddings=_exactly(encode(model, queries, "query")),
        passage_embeddings=_exactly(encode(model, passages, "document")),
        scores=scores,
    )
    (out / PARITY_FILE).write_text(parity.model_dump_json() + "\n", encoding="utf-8")


def read_parity(evaluation: Path) -> Parity:
    """Of an evaluation's folder; raises ArtifactError when it holds none."""
    path = evaluation / PARITY_FILE
    try:
        return Parity.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}), so nobody can tell whether a model is the evaluated one. Materialize "
            "evaluation again"
        ) from error


def encode(model: SentenceTransformer, texts: Sequence[str], task: str) -> np.ndarray:
    """(n, dimension) float32, one text at a time: no padding, so the neighbours in a batch change nothing."""
    encode = model.encode_query if task == "query" else model.encode_document
    embeddings = encode(list(texts), batch_size=1, show_progress_bar=False)
    return np.asarray(embeddings, dtype=np.float32)


def _answered(collection: Collection) -> list[tuple[str, str]]:
    """Every test question with a passage judged relevant."""
    query, passage = collection.positives()
    rows, at = np.unique(query, return_index=True)
    return [(collection.queries[row], collection.texts[passage[first]]) for row, first in zip(rows, at, strict=True)]


def _sample(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The first pairs, and the longest text of each side."""
    first, rest = list(pairs[: SAMPLE - 2]), list(pairs[SAMPLE - 2 :])
    for part in (0, 1):
        if rest:
            longest = max(range(len(rest)), key=lambda i: len(rest[i][part]))
            first.append(rest.pop(longest))
    queries, passages = zip(*first, strict=True)
    return list(queries), list(passages)


def _compare(found: np.ndarray, expected: Sequence[Sequence[float]] | np.ndarray, texts: list[str], what: str) -> float:
    wanted = np.asarray(expected, dtype=np.float64)
    if found.shape != wanted.shape:
        raise ModelError(f"{what}: expected figures of shape {wanted.shape}, found {found.shape}: it is another model")
    by_text = np.abs(found.astype(np.float64) - wanted).max(axis=1)
    at = int(np.argmax(np.where(np.isfinite(by_text), by_text, np.inf)))
    largest = float(by_text[at])
    if not largest <= TOLERANCE:
        raise ModelError(
            f"{what} '{excerpt(texts[at], 60)}': differs by {largest:.2g} from what was evaluated, more than the "
            f"{TOLERANCE:g} allowed: these are not the weights, prompts or lengths that the gate judged"
        )
    return largest


def _exactly(numbers: np.ndarray) -> list[Any]:
    """Nine digits are a float32 exactly."""
    if numbers.ndim > 1:
        return [_exactly(row) for row in numbers]
    return [float(f"{number:.9g}") for number in numbers.tolist()]
