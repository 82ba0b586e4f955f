"""Embeddings that take less room: int8, binary, or cut to their first numbers; and how each is searched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

from embed_pipeline.errors import ModelError
from embed_pipeline.models.search import search

RANGES_FILE = "ranges.npy"
RESCORED = 4  # times as many candidates as are wanted; what sentence-transformers' own search takes


class VectorForm(Protocol):
    """How passages' embeddings are stored and searched by float32 questions."""

    def store(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, d) float32 unit rows -> what is kept of them."""

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """What is kept -> (n, d') float32: the embeddings as far as they are still known."""

    def asked(self, queries: np.ndarray) -> np.ndarray:
        """(n, d) float32 questions -> (n, d') as they are compared with restored passages."""

    def search(self, queries: np.ndarray, stored: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, d) questions -> indices (n, k) int64 and scores (n, k) float32, best first."""

    def bytes_per_vector(self, dimension: int) -> int: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Int8Vectors:
    """256 equal steps between the least and the largest value of each dimension in a calibration set."""

    ranges: np.ndarray  # (2, d) float32: least, largest

    @classmethod
    def calibrated(cls, embeddings: np.ndarray) -> Int8Vectors:
        """By (n, d) embeddings of texts such as will be stored; raises ModelError when there are fewer than 2."""
        if len(embeddings) < 2:
            raise ModelError(f"has {len(embeddings)} train passages to take its ranges from: at least 2 are needed")
        return cls(np.vstack([embeddings.min(axis=0), embeddings.max(axis=0)]).astype(np.float32))

    @classmethod
    def load(cls, folder: Path | str) -> Int8Vectors:
        return cls(np.load(Path(folder) / RANGES_FILE, allow_pickle=False))

    def save(self, folder: Path) -> None:
        np.save(folder / RANGES_FILE, self.ranges)

    def store(self, embeddings: np.ndarray) -> np.ndarray:
        """-> (n, d) int8; what lies outside of the ranges is cut to them."""
        return np.asarray(quantize_embeddings(embeddings, precision="int8", ranges=self.ranges))

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """-> (n, d) float32: the middle of each step."""
        steps = (self.ranges[1] - self.ranges[0]) / 255
        return (self.ranges[0] + (stored.astype(np.float32) + 128.5) * steps).astype(np.float32)

    def asked(self, queries: np.ndarray) -> np.ndarray:
        return queries

    def search(self, queries: np.ndarray, stored: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        return search(queries, self.restore(stored), top_k)

    def bytes_per_vector(self, dimension: int) -> int:
        return dimension


@dataclass(frozen=True)
class BinaryVectors:
    """The sign of every number, eight to a byte."""

    dimension: int

    def save(self, folder: Path) -> None:
        """There is nothing to keep but the number of dimensions, which the model says."""

    def store(self, embeddings: np.ndarray) -> np.ndarray:
        """-> (n, ceil(d / 8)) uint8."""
        return np.asarray(quantize_embeddings(embeddings, precision="ubinary"))

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """-> (n, d) float32 unit rows of equal numbers with the signs."""
        signs = np.unpackbits(stored, axis=1, count=self.dimension).astype(np.float32) * 2 - 1
        return signs / np.float32(np.sqrt(self.dimension))

    def asked(self, queries: np.ndarray) -> np.ndarray:
        return queries

    def search(self, queries: np.ndarray, stored: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Hamming distance to the questions' own bits finds `RESCORED` times as many, which the questions rescore.

        Yamada et al., ACL 2021 (arXiv 2106.00882): binary candidates, reranked by the float question.
        """
        passages = self.restore(stored)
        candidates, _ = search(self.restore(self.store(queries)), passages, RESCORED * top_k)
        scores = np.einsum("nd,nkd->nk", queries, passages[candidates]).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return np.take_along_axis(candidates, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def bytes_per_vector(self, dimension: int) -> int:
        return (dimension + 7) // 8


@dataclass(frozen=True)
class CutVectors:
    """The first numbers of every embedding, normalised again; what MatryoshkaLoss trains for (arXiv 2205.13147)."""

    dimensions: int

    def save(self, folder: Path) -> None:
        """There is nothing to keep but the number of dimensions."""

    def store(self, embeddings: np.ndarray) -> np.ndarray:
        """-> (n, dimensions) float32 unit rows."""
        cut = embeddings[:, : self.dimensions]
        return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.float32(1e-12))

    def restore(self, stored: np.ndarray) -> np.ndarray:
        return stored

    def asked(self, queries: np.ndarray) -> np.ndarray:
        return self.store(queries)

    def search(self, queries: np.ndarray, stored: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        return search(self.asked(queries), stored, top_k)

    def bytes_per_vector(self, dimension: int) -> int:
        return self.dimensions * 4


def least_cosine(form: VectorForm, embeddings: np.ndarray) -> float:
    """The smallest cosine between an embedding and what its stored form still knows of it."""
    known = form.restore(form.store(embeddings)).astype(np.float64)
    own = embeddings[:, : known.shape[1]]
    lengths = np.linalg.norm(known, axis=1) * np.linalg.norm(embeddings, axis=1)
    return float(((own * known).sum(axis=1) / np.maximum(lengths, 1e-12)).min())
