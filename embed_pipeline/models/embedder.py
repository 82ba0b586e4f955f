"""A bi-encoder as every stage uses it: one folder in, one float32 matrix out, memory-mapped where it is cached."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from embed_pipeline.errors import ModelError
from embed_pipeline.models.blocks import BATCH_SIZE, batch_size_of
from embed_pipeline.models.folder import PASSAGE_PROMPT_NAMES, usable_length
from embed_pipeline.models.job import EncodingJob, Task
from embed_pipeline.models.padding import set_padding
from embed_pipeline.models.precision import ResolvedPrecision, autocast, default_device, resolve_precision
from embed_pipeline.models.ranks import ALONE, Ranks, model_digest, set_aside, texts_digest
from embed_pipeline.settings import EncodingSettings, Precision

logger = logging.getLogger(__name__)

_WHAT = {"query": "queries", "document": "passages", "sentence": "sentences"}
# Of an embedding to itself in float32: rounding costs MiniLM 0.0001, and at 0.01 near neighbours change places.
LEAST_COSINE = 0.99
_COMPARED = 8  # texts


def load_sentence_transformer(
    folder: Path,
    encoding: EncodingSettings | None = None,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Load a model folder and lay `encoding` over what the folder itself says.

    Prompts, pooling and both maximum lengths are set on the model, and it ends by normalising, so saving it saves all
    of this, and any later load without `encoding` encodes the same way. Raises ModelError when more tokens are asked
    for than the model can take.
    """
    encoding = encoding or EncodingSettings()
    _check_lengths(folder, encoding)
    model = SentenceTransformer(
        str(folder), device=device or default_device(), trust_remote_code=trust_remote_code, local_files_only=True
    )
    if isinstance(model[0], Transformer):  # else a model of static embeddings, or of several encoders
        set_padding(model.tokenizer, model[0].auto_model, folder)
    if encoding.query_prompt is not None:
        model.prompts["query"] = encoding.query_prompt
    if encoding.passage_prompt is not None:
        for name in PASSAGE_PROMPT_NAMES:
            model.prompts.pop(name, None)
        model.prompts["document"] = encoding.passage_prompt
    if encoding.pooling is not None:
        _set_pooling(model, encoding.pooling)
    # Everything here ranks by cosine, so that is what a model is trained for, and what its folder has to say.
    if not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())
    transformer: Any = model[0]  # its text lengths are not among the attributes that nn.Module declares
    if encoding.query_max_length is not None:
        transformer.query_length = encoding.query_max_length
    if encoding.passage_max_length is not None:
        transformer.document_length = encoding.passage_max_length
    if encoding.query_max_length is not None or encoding.passage_max_length is not None:
        # max_seq_length is what a user sees who encodes without saying whether it is a query.
        model.max_seq_length = max(encoding.query_max_length or 0, encoding.passage_max_length or 0)
    return model


def encoding_of(model: SentenceTransformer) -> EncodingSettings:
    """What `load_sentence_transformer` ended up with, every field filled in."""
    transformer = model[0]
    pooling = next((module.pooling_mode for module in model if isinstance(module, Pooling)), "mean")
    if not isinstance(pooling, str):
        pooling = pooling[0]
    passage_prompt = next((model.prompts[name] for name in PASSAGE_PROMPT_NAMES if model.prompts.get(name)), "")
    return EncodingSettings(
        query_prompt=model.prompts.get("query") or "",
        passage_prompt=passage_prompt,
        query_max_length=getattr(transformer, "query_length", None) or model.max_seq_length,
        passage_max_length=getattr(transformer, "document_length", None) or model.max_seq_length,
        pooling=pooling,
        normalize=True,
    )


class Embedder:
    """Encodes queries and passages; rows are L2-normalised, so a dot product is the cosine similarity.

    With a folder in `ranks`, embeddings are memory-mapped from there, read-only: memory does not grow with them. A list
    of texts that was encoded before by the same weights, encoding and precision is found instead of encoded again, and
    one whose encoding was killed goes on where it was.

    The first block that is encoded in less than float32 is compared with float32 on a few of its texts. Encoding raises
    ModelError where an embedding has a cosine below LEAST_COSINE to its own in float32.
    """

    def __init__(
        self,
        folder: Path,
        encoding: EncodingSettings | None = None,
        *,
        precision: Precision = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks = ALONE,
        batch_size: int | None = None,
    ) -> None:
        self.device = device or default_device()
        self.precision = resolve_precision(precision, self.device)
        self.folder = folder
        self.ranks = ranks
        self.model = load_sentence_transformer(
            folder, encoding, device=self.device, trust_remote_code=trust_remote_code
        )
        self.model.eval()
        self.encoding = encoding_of(self.model)
        self.batch_size = batch_size or batch_size_of(self.device, self.encoding.passage_max_length)
        self._asked_encoding, self._trust_remote_code = encoding, trust_remote_code
        self._digest: str | None = None
        self._compared = self.precision == "float32"

    @classmethod
    def around(cls, model: SentenceTransformer, precision: ResolvedPrecision, ranks: Ranks = ALONE) -> Embedder:
        """The same around a model that is in memory already, such as one in training; without a cache."""
        embedder = cls.__new__(cls)
        embedder.device, embedder.precision = str(model.device), precision
        embedder.batch_size, embedder.ranks = BATCH_SIZE, ranks
        embedder.model, embedder.encoding = model, encoding_of(model)
        embedder._compared = True  # a training tells by its loss and its figures where arithmetic is too coarse
        return embedder

    def encode_queries(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        """(n,) texts -> (n, dimension) float32, unit rows."""
        return self._encode(texts, "query", progress)

    def encode_passages(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        """(n,) texts (see `tables.passage_text`) -> (n, dimension) float32, unit rows."""
        return self._encode(texts, "document", progress)

    def encode_sentences(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        """(n,) texts that are neither -> (n, dimension) float32, unit rows: without a prompt, up to the longer length.

        How pairs of sentences are compared, in training as well.
        """
        return self._encode(texts, "sentence", progress)

    def compute(self, texts: Sequence[str], task: Task) -> np.ndarray:
        """(n,) texts -> (n, dimension) float32, unit rows: here and now, past any cache."""
        return self._compute_in(self.precision, texts, task)

    def _compute_in(self, precision: ResolvedPrecision, texts: Sequence[str], task: Task) -> np.ndarray:
        encode: Any = {
            "query": self.model.encode_query,
            "document": self.model.encode_document,
            # A model may have a prompt for every text; none is asked for here.
            "sentence": functools.partial(self.model.encode, prompt=""),
        }[task]
        with autocast(precision, self.device):
            # SentenceTransformer.encode sorts by length itself, so short texts are not padded to long ones.
            embeddings = encode(
                list(texts), batch_size=self.batch_size, show_progress_bar=False, normalize_embeddings=True
            )
        return np.ascontiguousarray(embeddings, dtype=np.float32)

    def _encode(self, texts: Sequence[str], task: Task, progress: bool) -> np.ndarray:
        if not texts:
            return np.empty((0, self.model.get_embedding_dimension() or 0), dtype=np.float32)
        what = f"encoding {len(texts)} {_WHAT[task]} in {self.precision} on {self.device}"

        def job(folder: Path, blocks: tuple[int, ...]) -> EncodingJob:
            set_aside(self.model)
            return EncodingJob(
                folder=folder,
                world_size=self.ranks.processes,
                blocks=blocks,
                model=self.folder.absolute(),
                precision=self.precision,
                trust_remote_code=self._trust_remote_code,
                batch_size=self.batch_size,
                encoding=self._asked_encoding,
                task=task,
            )

        found = self.ranks.compute(
            lambda: self._cache_file(texts, task),
            (texts,),
            lambda columns: self._compute_block(columns[0], task),
            job,
            what=what,
            progress=progress,
        )
        self.model.to(self.device)
        return found

    def _compute_block(self, texts: Sequence[str], task: Task) -> np.ndarray:
        embeddings = self.compute(texts, task)
        if not self._compared:
            self._compare(texts, task, embeddings)
            self._compared = True
        return embeddings

    def _compare(self, texts: Sequence[str], task: Task, embeddings: np.ndarray) -> None:
        rows = np.linspace(0, len(texts) - 1, min(len(texts), _COMPARED)).astype(int)
        exact = self._compute_in("float32", [texts[row] for row in rows], task)
        # By the distance: a text without any token may be all zeros, which agree.
        lowest = 1 - float(np.square(exact - embeddings[rows]).sum(axis=1).max()) / 2
        logger.info("%s agrees with float32: lowest cosine %.5f on %d texts", self.precision, lowest, len(rows))
        if lowest < LEAST_COSINE:
            raise ModelError(
                f"{self.precision} is too coarse for the model in {self.folder}: an embedding has cosine {lowest:.3f} "
                f"to the same in float32, expected at least {LEAST_COSINE}. Set `encode_precision: float32`"
            )

    def _cache_file(self, texts: Sequence[str], task: Task) -> Path:
        if self._digest is None:
            told = f"{self.encoding.model_dump_json()}{self.precision}{self.device}{self.batch_size}"
            self._digest = model_digest(self.folder, told)
        return Path(self._digest, f"{texts_digest(task, (texts,))}.npy")


def _set_pooling(model: SentenceTransformer, pooling: str) -> None:
    for name, module in model.named_children():
        if isinstance(module, Pooling):
            model._modules[name] = Pooling(module.embedding_dimension, pooling_mode=pooling)
            return
    raise ValueError("the base model has no pooling module to change")


def _check_lengths(folder: Path, encoding: EncodingSettings) -> None:
    limit = usable_length(folder)
    for key in ("query_max_length", "passage_max_length"):
        asked = getattr(encoding, key)
        if limit is not None and asked is not None and asked > limit:
            raise ModelError(
                f"encoding.{key} asks for {asked} tokens, but the model in {folder} can take {limit}. Lower it to "
                f"{limit} or less, or choose a base model that takes longer texts"
            )
