"""What is compared, and every system's ranking of the test questions, made one model at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embed_pipeline.errors import ModelError
from embed_pipeline.evaluation.beside import Beside
from embed_pipeline.evaluation.bm25 import bm25_search
from embed_pipeline.evaluation.comparison import (
    BASE_EMBEDDER,
    BASE_PAIR,
    BASE_RERANKER,
    BM25,
    CHAMPION_EMBEDDER,
    CHAMPION_PAIR,
    EMBEDDER,
    RERANKER,
    RERANKER_ALONE,
)
from embed_pipeline.evaluation.systems import (
    DEPTH,
    Embedded,
    Ranking,
    rank_with_embedder,
    read_serving,
    reordered,
    rerank,
)
from embed_pipeline.evaluation.verdict import SYSTEM_NAMES
from embed_pipeline.mining.report import ScoreSummary, score_summary
from embed_pipeline.mining.retrieve import sample_rows
from embed_pipeline.model_files import MODEL_FOLDER
from embed_pipeline.models.collapse import is_collapsed, told
from embed_pipeline.models.collection import Collection
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.folder import has_trained_head
from embed_pipeline.models.ranks import Ranks
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.settings import EncodingSettings, EvaluationSettings, Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparedModels:
    """The folders of what is compared. Without rerankers only the embedders and BM25 are."""

    base_embedder: Path  # model folder
    base_encoding: EncodingSettings  # laid over what that folder says; the fine-tuned one carries its own
    embedder: Path  # model folder
    base_reranker: Path | None = None  # model folder; an encoder without a head gets the one training began with
    base_reranker_max_length: int = 512  # tokens of a pair
    reranker: Path | None = None  # folder of a version: `model/` and `serving.json`
    champion: ChampionModels | None = None
    # Whether Python code that comes with a model may run: of the base it holds for the fine-tuned one as well.
    trust_embedder_code: bool = False
    trust_reranker_code: bool = False


@dataclass(frozen=True)
class ChampionModels:
    """What serves today, to be measured again on the same questions."""

    title: str  # for messages
    embedder: Path  # model folder
    reranker: Path | None  # folder of a version
    seen: frozenset[str]  # test queries that it was trained on, or whose answers it was


def check_folders(models: ComparedModels) -> None:
    """Before any work: a missing model is found in a moment, not after half an hour."""
    wanted = {
        "base embedder": models.base_embedder,
        "fine-tuned embedder": models.embedder,
        "base reranker": models.base_reranker,
        "fine-tuned reranker": models.reranker / MODEL_FOLDER if models.reranker else None,
    }
    for what, folder in wanted.items():
        if folder is not None and not (folder / "config.json").is_file():
            raise ModelError(f"the {what} is not at {folder}: expected a Hugging Face model folder with a config.json")
    if models.reranker is not None:
        read_serving(models.reranker)


@contextmanager
def measuring(champion: ChampionModels) -> Iterator[None]:
    """Whatever fails in the body says that the champion cannot be compared with. Raises ModelError."""
    try:
        yield
    except Exception as error:  # anything that a broken or outdated model may raise
        raise ModelError(
            f"the champion ({champion.title}) can no longer be measured: {error}. Nothing is promoted unseen: "
            "mend its folder, or go back with `embed-pipeline rollback`, or take it out of service with "
            "`embed-pipeline retire`, and materialize evaluation again"
        ) from error


@dataclass
class Rankings:
    """Every system's ranking, made one after the other so that one model is in memory at a time."""

    collection: Collection
    models: ComparedModels
    settings: EvaluationSettings
    seed: int
    precision: Precision
    ranks: Ranks
    progress: bool
    beside: Beside

    def __post_init__(self) -> None:
        self.depth = max(DEPTH, self.settings.rerank_top_k)
        self.sampled = sample_rows(len(self.collection.query_ids), self.settings.rerank_queries, self.seed)
        self.rankings: dict[str, Ranking] = {}
        self.milliseconds: dict[str, float] = {}
        self.scores: dict[str, ScoreSummary] = {}
        self.embedder_weight: float | None = None
        self.dev_by_weight: dict[str, float] = {}
        self.collapsed: list[str] = []  # a sentence for each of the candidate's models

    def by_champion(self) -> None:
        champion = self.models.champion
        if champion is None:
            return
        with measuring(champion):
            embedded = self._embed(CHAMPION_EMBEDDER, champion.embedder, None)
            if champion.reranker is None:
                return
            weight, _ = read_serving(champion.reranker)
            candidates = self.rankings[CHAMPION_EMBEDDER].of_rows(self.sampled)
            logits = self._rerank(CHAMPION_PAIR, candidates, champion.reranker / MODEL_FOLDER, None)
        self.rankings[CHAMPION_PAIR] = reordered(candidates, logits, weight)
        self.milliseconds[CHAMPION_PAIR] += embedded.milliseconds_per_query

    def by_bm25(self) -> None:
        queries = self.collection.queries
        started = time.perf_counter()
        found = bm25_search(queries, self.collection.texts, self.depth, progress=self.progress)
        self.milliseconds[BM25] = (time.perf_counter() - started) * 1_000 / len(queries)
        self.rankings[BM25] = Ranking(np.arange(len(queries)), *found)

    def by_embedders(self) -> None:
        folders = {
            BASE_EMBEDDER: (self.models.base_embedder, self.models.base_encoding),
            EMBEDDER: (self.models.embedder, None),
        }
        for system, (folder, encoding) in folders.items():
            embedded = self._embed(system, folder, encoding)
            if system == EMBEDDER and is_collapsed(embedded.ranking.scores):
                self.collapsed.append(told("the fine-tuned embedder"))
            self.scores[system] = score_summary(
                {"positive": embedded.positive_scores, "best other passage": embedded.best_other_scores}
            )

    def _embed(self, system: str, folder: Path, encoding: EncodingSettings | None) -> Embedded:
        logger.info("encoding %d passages with the %s", len(self.collection.texts), SYSTEM_NAMES[system].lower())
        embedder = Embedder(
            folder,
            encoding,
            precision=self.precision,
            trust_remote_code=self.models.trust_embedder_code,
            ranks=self.ranks,
        )
        embedded = rank_with_embedder(self.collection, embedder, self.depth, progress=self.progress)
        self.rankings[system] = embedded.ranking
        self.milliseconds[system] = embedded.milliseconds_per_query
        self.beside.measure(system, embedder)
        return embedded

    def by_rerankers(self) -> None:
        candidates = self.rankings[EMBEDDER].of_rows(self.sampled)
        if self.models.base_reranker is not None:
            length = self.models.base_reranker_max_length
            # The head that training began with, where the base has none.
            logits = self._rerank(BASE_RERANKER, candidates, self.models.base_reranker, length, self.seed)
            self.rankings[BASE_RERANKER] = reordered(candidates, logits, 0.0)
            self.milliseconds[BASE_RERANKER] += self.milliseconds[EMBEDDER]
            if has_trained_head(self.models.base_reranker):
                of_base = self.rankings[BASE_EMBEDDER].of_rows(self.sampled)
                logits = self._rerank(BASE_PAIR, of_base, self.models.base_reranker, length)
                self.rankings[BASE_PAIR] = reordered(of_base, logits, 0.0)
                self.milliseconds[BASE_PAIR] += self.milliseconds[BASE_EMBEDDER]
        if self.models.reranker is not None:
            self.embedder_weight, self.dev_by_weight = read_serving(self.models.reranker)
            logits = self._rerank(RERANKER, candidates, self.models.reranker / MODEL_FOLDER, None)
            if is_collapsed(logits):
                self.collapsed.append(told("the fine-tuned reranker"))
            self.rankings[RERANKER] = reordered(candidates, logits, self.embedder_weight)
            self.milliseconds[RERANKER] += self.milliseconds[EMBEDDER]
            if self.embedder_weight > 0:
                self.rankings[RERANKER_ALONE] = reordered(candidates, logits, 0.0)

    def _rerank(
        self, system: str, candidates: Ranking, folder: Path, max_length: int | None, seed: int | None = None
    ) -> np.ndarray:
        top_k = self.settings.rerank_top_k
        name = SYSTEM_NAMES[system].lower()
        logger.info("%s: scoring %d passages for each of %d queries", name, top_k, len(self.sampled))
        reranker = Reranker(
            folder,
            max_length=max_length,
            precision=self.precision,
            trust_remote_code=self.models.trust_reranker_code,
            ranks=self.ranks,
            seed=seed,
        )
        reranked = rerank(self.collection, candidates, top_k, reranker, progress=self.progress)
        if system != BASE_PAIR:  # the base reranker once more, over other passages
            self.beside.measure_reranker(system, reranker)
        self.milliseconds[system] = reranked.milliseconds_per_query
        return reranked.logits
