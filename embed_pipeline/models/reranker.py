"""A cross-encoder as every stage uses it: (query, passage) pairs in, one raw score a pair out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from embed_pipeline.models.folder import usable_length
from embed_pipeline.models.precision import ResolvedPrecision, autocast, default_device, resolve_precision
from embed_pipeline.settings import Precision

logger = logging.getLogger(__name__)


class Reranker:
    """Scores pairs; higher is more relevant. Scores are logits: comparable within a query, not between models."""

    def __init__(
        self,
        folder: Path,
        *,
        max_length: int | None = None,
        precision: Precision = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.device = device or default_device()
        self.precision = resolve_precision(precision, self.device)
        self.batch_size = batch_size
        limit = usable_length(folder)
        if max_length is not None and limit is not None and max_length > limit:
            logger.warning(
                "pairs are cut to %d tokens, not %d: the model in %s takes no more", limit, max_length, folder
            )
            max_length = limit
        self.model = CrossEncoder(
            str(folder),
            num_labels=1,
            max_length=max_length,
            device=self.device,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
        self.model.eval()

    @classmethod
    def around(cls, model: CrossEncoder, precision: ResolvedPrecision) -> Reranker:
        """The same around a model that is in memory already, such as one in training."""
        reranker = cls.__new__(cls)
        reranker.device, reranker.precision = str(model.device), precision
        reranker.batch_size, reranker.model = 64, model
        return reranker

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = True) -> np.ndarray:
        """(n,) pairs of (query, passage text) -> (n,) float32 logits, in the order given."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        # CrossEncoder.predict batches in the order given: sorting by length first saves most of the padding.
        order = np.argsort([-(len(query) + len(passage)) for query, passage in pairs], kind="stable")
        with autocast(self.precision, self.device):
            scores = self.model.predict(
                [pairs[i] for i in order],
                batch_size=self.batch_size,
                show_progress_bar=progress,
                activation_fn=torch.nn.Identity(),
            )
        scattered = np.empty(len(pairs), dtype=np.float32)
        scattered[order] = np.asarray(scores, dtype=np.float32).reshape(-1)
        return scattered
