"""Guard sets against forgetting: what the base embedder was good at, and how much of it the candidate has lost.

Every guard set is cut into two halves by the seed. Where model merging chooses a coefficient, it looks at the choosing
half, so the verdict on the other, judging half is that of data nobody tuned on.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PlainSerializer

from embed_pipeline.errors import SourceError
from embed_pipeline.evaluation.guard_files import RetrievalFiles, ScoredFile, read_pairs, read_retrieval
from embed_pipeline.settings import EvaluationSettings, GuardSettings

if TYPE_CHECKING:
    from embed_pipeline.mining.mine import EncodesTexts

logger = logging.getLogger(__name__)

Part = Literal["all", "choosing", "judging"]
# JSON knows no NaN, and pydantic would write null.
MaybeNaN = Annotated[float, PlainSerializer(lambda value: value if math.isfinite(value) else "NaN", when_used="json")]
METRIC_LABELS = {"beir": "nDCG@10", "scored": "Spearman"}
_TOLERANCE = 1e-12  # a mean that was summed in another order is the same mean


@dataclass(frozen=True)
class GuardScore:
    """One embedder on one part of a guard set."""

    value: float  # NaN where it cannot be computed, e.g. when every pair has the same similarity
    per_item: np.ndarray  # (items,) nDCG@10 of each query, or the cosine similarity of each pair
    items: int
    expected: np.ndarray | None = None  # scored: (items,) the similarity that people gave each pair


class GuardResult(BaseModel):
    """What became of one guard set. Figures that are no number are NaN, in JSON "NaN"."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["beir", "scored"]
    metric: str
    items: int  # queries or pairs
    base: MaybeNaN
    candidate: MaybeNaN
    champion: MaybeNaN | None
    change: MaybeNaN  # candidate - base
    interval_low: float | None  # of the change, by paired bootstrap
    interval_high: float | None
    max_loss: float
    passed: bool
    sentence: str


class GuardSet(ABC):
    """A guard set in memory."""

    settings: GuardSettings

    @abstractmethod
    def measure(self, embedder: EncodesTexts, part: Part) -> GuardScore:
        """The embedder on all items, or on one of the two halves."""


@dataclass(frozen=True)
class RetrievalGuard(GuardSet):
    """nDCG@10 of exact search over the set's whole corpus (or the sample that `max_passages` asks for)."""

    settings: GuardSettings
    files: RetrievalFiles  # in the order of the ids
    halves: dict[Part, np.ndarray]  # rows of the queries

    def measure(self, embedder: EncodesTexts, part: Part) -> GuardScore:
        from embed_pipeline.evaluation.retrieval import ndcg_at_10_of

        ids = list(self.files.queries)
        asked = {ids[row]: self.files.queries[ids[row]] for row in self.halves[part]}
        logger.info("guard set %s: %d queries, %d passages", self.settings.name, len(asked), len(self.files.passages))
        qrels = {query: self.files.qrels[query] for query in asked}
        of_queries = ndcg_at_10_of(embedder, asked, self.files.passages, qrels, progress=True)
        per_item = np.array([of_queries[query] for query in asked])
        return GuardScore(fmean(per_item.tolist()), per_item, len(asked))


@dataclass(frozen=True)
class ScoredGuard(GuardSet):
    """Spearman's rank correlation of the pairs' cosine similarities with the scores that people gave them.

    The task is symmetric, so both sentences are encoded alike: as passages. For most models that is the text as it
    stands, as published figures are made; a model that wants a prefix before every text gets the one it has.
    """

    settings: GuardSettings
    file: ScoredFile
    halves: dict[Part, np.ndarray]  # rows of the pairs

    def measure(self, embedder: EncodesTexts, part: Part) -> GuardScore:
        from embed_pipeline.evaluation.correlation import spearman

        rows = self.halves[part]
        pairs = [(self.file.first[row], self.file.second[row]) for row in rows]
        texts = sorted({text for pair in pairs for text in pair})  # many stand in several pairs
        logger.info("guard set %s: %d pairs of %d sentences", self.settings.name, len(pairs), len(texts))
        row_of = {text: row for row, text in enumerate(texts)}
        embeddings = embedder.encode_passages(texts, progress=True).astype(np.float64)
        left, right = (embeddings[[row_of[pair[side]] for pair in pairs]] for side in (0, 1))
        # Beyond float32's precision there is nothing to rank: equal texts are equally alike, on every machine.
        similarity = np.round((left * right).sum(axis=1), 6)
        expected = self.file.scores[rows]
        return GuardScore(spearman(similarity, expected), similarity, len(pairs), expected)


def load_guard(guard: GuardSettings, folder: Path, seed: int) -> GuardSet:
    """Read a guard set and cut it into its halves; `folder` is that of the YAML file.

    Raises ConfigurationError where its files are not there, SourceError naming the file and what is wrong with it.
    """
    draw = np.random.default_rng([seed, 4])
    if guard.kind == "scored":
        pairs = read_pairs(guard, folder)
        halves = _halves(len(pairs.scores), guard, draw, folder)
        if any(len(np.unique(pairs.scores[rows])) < 2 for rows in halves.values()):
            raise SourceError(
                f"{folder / guard.path}: one half of the {len(halves['all'])} pairs has one score only: a rank "
                "correlation needs pairs that are more and less alike. Give more pairs, or raise max_queries"
            )
        return ScoredGuard(guard, pairs, halves)
    files = read_retrieval(guard, folder)
    halves = _halves(len(files.queries), guard, draw, folder)
    return RetrievalGuard(guard, _sampled(files, halves["all"], guard.max_passages, draw), halves)


def loses_too_much(guard: GuardSettings, base: GuardScore, candidate: GuardScore) -> bool:
    """Whether the candidate is further below the base than the guard allows; a figure that is no number is."""
    return not candidate.value - base.value >= -guard.max_loss - _TOLERANCE


def judge_guard(
    guard: GuardSettings,
    base: GuardScore,
    candidate: GuardScore,
    champion: GuardScore | None,
    *,
    evaluation: EvaluationSettings,
    seed: int,
) -> GuardResult:
    """The candidate against the base on the same items; `evaluation` says how the interval is drawn.

    The champion is only told of: what may be lost is lost against the base.
    """
    change = candidate.value - base.value
    passed = not loses_too_much(guard, base, candidate)
    low, high = _interval(base, candidate, evaluation, seed) or (None, None)
    return GuardResult(
        name=guard.name,
        kind=guard.kind,
        metric=METRIC_LABELS[guard.kind],
        items=candidate.items,
        base=base.value,
        candidate=candidate.value,
        champion=champion.value if champion else None,
        change=change,
        interval_low=low,
        interval_high=high,
        max_loss=guard.max_loss,
        passed=passed,
        sentence=_sentence(guard, base.value, candidate.value, passed, (low, high)),
    )


def _interval(
    base: GuardScore, candidate: GuardScore, evaluation: EvaluationSettings, seed: int
) -> tuple[float, float] | None:
    from embed_pipeline.evaluation.figure import Figure, interval

    before, after = (Figure(score.value, score.per_item, score.expected) for score in (base, candidate))
    return interval(before, after, samples=evaluation.bootstrap_samples, confidence=evaluation.confidence, seed=seed)


def _sentence(
    guard: GuardSettings, base: float, candidate: float, passed: bool, interval: tuple[float | None, float | None]
) -> str:
    """scifact: nDCG@10 0.650 → 0.661, +0.011 [+0.002, +0.021], nothing lost"""
    from embed_pipeline.evaluation.verdict import signed

    figures = f"{guard.name}: {METRIC_LABELS[guard.kind]} {_figure(base)} → {_figure(candidate)}"
    change = candidate - base
    if not math.isfinite(change):
        return f"{figures}, so what was lost cannot be told"
    low, high = interval
    known = "" if low is None or high is None else f" [{signed(low)}, {signed(high)}]"
    allowed = f"the {guard.max_loss:.3f} it may lose"
    told = f"more than {allowed}" if not passed else "nothing lost" if change >= 0 else f"within {allowed}"
    return f"{figures}, {signed(change)}{known}, {told}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not a number"


def _halves(count: int, guard: GuardSettings, draw: np.random.Generator, folder: Path) -> dict[Part, np.ndarray]:
    """Row numbers, ascending, of at most `max_queries` of `count` items and of their two halves."""
    if count < 4:
        raise SourceError(
            f"{folder / guard.path}: {count} {'pairs' if guard.kind == 'scored' else 'queries'} to measure on are too "
            "few: expected at least 4, and hundreds for a loss to be told from chance"
        )
    drawn = draw.permutation(count)[: guard.max_queries]
    return {"all": np.sort(drawn), "choosing": np.sort(drawn[::2]), "judging": np.sort(drawn[1::2])}


def _sampled(
    files: RetrievalFiles, rows: np.ndarray, max_passages: int | None, draw: np.random.Generator
) -> RetrievalFiles:
    """In the order of the ids, so that equal scores are ranked alike everywhere; with the passages that are searched.

    Of a sample, everything that is judged for the queries in `rows` is part, relevant or not.
    """
    ids = sorted(files.passages)
    if max_passages is not None:
        queries = list(files.queries)
        judged = {passage for row in rows for passage in files.qrels[queries[row]]}
        others = [id for id in ids if id not in judged]
        wanted = max(0, max_passages - len(judged))
        ids = sorted(judged | {others[row] for row in draw.permutation(len(others))[:wanted]})
    return RetrievalFiles(files.queries, {id: files.passages[id] for id in ids}, files.qrels)
