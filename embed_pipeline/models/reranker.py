"""A cross-encoder as every stage uses it: (query, passage) pairs in, one raw score a pair out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer

from embed_pipeline.models.blocks import BATCH_SIZE, Texts, batch_size_of
from embed_pipeline.models.folder import usable_length, writes_text
from embed_pipeline.models.job import ScoringJob
from embed_pipeline.models.padding import set_padding
from embed_pipeline.models.precision import ResolvedPrecision, autocast, default_device, resolve_precision
from embed_pipeline.models.ranks import ALONE, Ranks, model_digest, set_aside, texts_digest
from embed_pipeline.settings import Precision

logger = logging.getLogger(__name__)


def load_cross_encoder_folder(folder: Path, *, device: str, trust_remote_code: bool = False) -> CrossEncoder:
    """Load a model folder as a cross-encoder of one score a pair, with a padding token.

    An encoder, or a decoder that writes text, gets a fresh head from torch's current seed; a folder that says itself
    how it scores is left as it is.
    """
    if writes_text(folder):
        # The library would score such a model by its logits of "yes" and "no", for which it needs a prompt.
        shared = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        transformer = Transformer(
            str(folder),
            transformer_task="sequence-classification",
            model_kwargs=shared,
            processor_kwargs=shared,
            config_kwargs={**shared, "num_labels": 1},
        )
        model = CrossEncoder(modules=[transformer], device=device, trust_remote_code=trust_remote_code)
    else:
        model = CrossEncoder(
            str(folder), num_labels=1, device=device, trust_remote_code=trust_remote_code, local_files_only=True
        )
    set_padding(model.tokenizer, model[0].auto_model, folder)
    return model


class Reranker:
    """Scores pairs; higher is more relevant. Scores are logits: comparable within a query, not between models.

    A model that brings no head gets one by `seed`. With a folder in `ranks`, pairs that the same model scored before
    are found there, and what was killed goes on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_length: int | None = None,
        precision: Precision = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks = ALONE,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.device = device or default_device()
        self.precision = resolve_precision(precision, self.device)
        self.folder, self.ranks, self.seed = folder, ranks, seed
        limit = usable_length(folder)
        if max_length is not None and limit is not None and max_length > limit:
            logger.warning(
                "pairs are cut to %d tokens, not %d: the model in %s takes no more", limit, max_length, folder
            )
            max_length = limit
        self.max_length, self._trust_remote_code = max_length, trust_remote_code
        if seed is not None:
            torch.manual_seed(seed)
        self.model = load_cross_encoder_folder(folder, device=self.device, trust_remote_code=trust_remote_code)
        if max_length is not None:
            self.model.max_seq_length = max_length
        self.batch_size = batch_size or batch_size_of(self.device, self.model.max_seq_length)
        self.model.eval()
        self._digest: str | None = None

    @classmethod
    def around(cls, model: CrossEncoder, precision: ResolvedPrecision, ranks: Ranks = ALONE) -> Reranker:
        """The same around a model that is in memory already, such as one in training."""
        reranker = cls.__new__(cls)
        reranker.device, reranker.precision = str(model.device), precision
        reranker.batch_size, reranker.ranks, reranker.model = BATCH_SIZE, ranks, model
        return reranker

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = True) -> np.ndarray:
        """(n,) pairs of (query, passage text) -> (n,) float32 logits, in the order given."""
        if not pairs:
            return np.empty(0, dtype=np.float32)

        def job(folder: Path, blocks: tuple[int, ...]) -> ScoringJob:
            set_aside(self.model)
            return ScoringJob(
                folder=folder,
                world_size=self.ranks.processes,
                blocks=blocks,
                model=self.folder.absolute(),
                precision=self.precision,
                trust_remote_code=self._trust_remote_code,
                batch_size=self.batch_size,
                max_length=self.max_length,
                seed=self.seed,
            )

        texts = ([query for query, _ in pairs], [passage for _, passage in pairs])
        found = self.ranks.compute(
            lambda: self._cache_file(texts),
            texts,
            lambda columns: self.compute(*columns),
            job,
            what=f"scoring {len(pairs)} pairs in {self.precision} on {self.device}",
            progress=progress,
        )
        self.model.to(self.device)
        return found

    def compute(self, queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
        """Pairs -> (n,) float32 logits: here and now, past any cache."""
        # CrossEncoder.predict batches in the order given: sorting by length first saves most of the padding.
        pairs = list(zip(queries, passages, strict=True))
        order = np.argsort([-(len(query) + len(passage)) for query, passage in pairs], kind="stable")
        with autocast(self.precision, self.device):
            scores = self.model.predict(
                [pairs[i] for i in order],
                batch_size=self.batch_size,
                show_progress_bar=False,
                activation_fn=torch.nn.Identity(),
            )
        scattered = np.empty(len(pairs), dtype=np.float32)
        scattered[order] = np.asarray(scores, dtype=np.float32).reshape(-1)
        return scattered

    def _cache_file(self, texts: Texts) -> Path:
        if self._digest is None:
            told = f"{self.max_length}{self.seed}{self.precision}{self.device}{self.batch_size}"
            self._digest = model_digest(self.folder, told)
        return Path(self._digest, f"{texts_digest('pair', texts)}.npy")
