"""The gate: may the candidate take the champion's place? A verdict with its figures, from per-query values alone.

The candidate is what would serve: the fine-tuned reranker over the fine-tuned embedder, or the embedder alone where the
pipeline has no reranker. What it has to beat is the base models and, where there is one, the champion, all measured on
the same questions, or on the same pairs of sentences. It passes if

- what would serve is better in the primary metric than each of them: by the minimum gain, with a bootstrap interval
  above 0 and a permutation test that agrees;
- neither the embedder nor the reranker, each for itself, loses more than is allowed;
- no guard metric and no guard set loses more than is allowed;
- there are enough questions to tell.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from embed_pipeline.evaluation.comparison import (
    BASE_EMBEDDER,
    BASE_PAIR,
    CHAMPION_EMBEDDER,
    CHAMPION_PAIR,
    EMBEDDER,
    RERANKER,
    Comparison,
    Values,
    compare,
)
from embed_pipeline.evaluation.guard_sets import GuardResult
from embed_pipeline.evaluation.similarities import Similarities, compare_similarities
from embed_pipeline.evaluation.verdict import METRIC_NAMES, SYSTEM_NAMES, signed
from embed_pipeline.settings import EvaluationSettings, GateSettings

Outcome = Literal["promote", "refuse", "too_few"]
_TOLERANCE = 1e-12  # a mean that was summed in another order is the same mean


class Judgement(BaseModel):
    """One demand of the gate, and what was found."""

    model_config = ConfigDict(frozen=True)

    found: Comparison  # the candidate's system, and its gain over `against`
    against: str
    demand: Literal["better", "not worse"]
    allowed: float  # better: the smallest gain; not worse: the largest loss
    met: bool

    @property
    def figures(self) -> str:
        """nDCG@10 0.412 → 0.471, +0.059 [+0.041, +0.078]"""
        row = self.found
        return (
            f"{METRIC_NAMES[row.metric]} {row.baseline_value:.3f} → {row.value:.3f}, {signed(row.gain)} "
            f"[{signed(row.interval_low)}, {signed(row.interval_high)}]"
        )

    @property
    def sentence(self) -> str:
        system, against = (SYSTEM_NAMES[name].lower() for name in (self.found.system, self.against))
        if self.met:
            fulfilled = "is better than" if self.demand == "better" else "is not worse than"
            return f"the {system} {fulfilled} the {against}: {self.figures}"
        if self.demand == "better":
            wanted = f"a gain of at least {self.allowed:.3f}" if self.found.gain < self.allowed else "more than chance"
            return f"the {system} is not shown to be better than the {against} ({wanted} is needed): {self.figures}"
        return f"the {system} loses more than the {self.allowed:.3f} allowed against the {against}: {self.figures}"


class GateReport(BaseModel):
    """The verdict on a candidate."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    sentence: str  # the verdict with its main figures
    reasons: list[str]  # why it did not pass; empty if it did
    judgements: list[Judgement]
    guards: list[GuardResult]
    min_queries: int

    @property
    def passed(self) -> bool:
        return self.outcome == "promote"


@dataclass(frozen=True)
class _Reference:
    """What the candidate has to beat: an embedder, what serves with it, and the queries that cannot be compared."""

    embedder: str
    serving: str
    without: Collection[str]


def judge(
    values: Values | Similarities,
    settings: GateSettings,
    evaluation: EvaluationSettings,
    seed: int,
    *,
    seen_by_champion: Collection[str] = (),
    guards: Sequence[GuardResult] = (),
    collapsed: Sequence[str] = (),
) -> GateReport:
    """The verdict on the systems EMBEDDER and, where it is there, RERANKER of `values`.

    A candidate without a reranker is compared with the pair that serves, if a pair does. Queries in `seen_by_champion`
    (it was trained on them) are left out where the champion is compared. `collapsed` tells of models of the candidate
    that give every passage the same score: a refusal, though ties may have a good figure by chance. A figure that is
    not a number is a refusal, whatever the others say.
    """
    if not isinstance(values, Similarities) and (broken := _not_a_number(values)):
        return _refused([broken], [], guards, settings)
    judgements = list(_judgements(values, settings, evaluation, seed, seen_by_champion))
    fewest = min(judged.found.num_queries for judged in judgements)
    of_champion = (CHAMPION_EMBEDDER, CHAMPION_PAIR)
    if CHAMPION_EMBEDDER in values and all(judged.against not in of_champion for judged in judgements):
        fewest = 0  # the champion was trained on every question
    unmet = [*collapsed, *(judged.sentence for judged in judgements if not judged.met)]
    if any(found.against == CHAMPION_PAIR and found.found.system == EMBEDDER and not found.met for found in judgements):
        unmet.append(
            "what serves has a reranker and the candidate has none. Where that is meant, take the champion out of "
            "service with `embed-pipeline retire`, and evaluate again"
        )
    unmet += [guard.sentence for guard in guards if not guard.passed]
    main = judgements[0].figures
    if fewest < settings.min_queries:
        items = "pairs" if isinstance(values, Similarities) else "questions"
        needed = f"{fewest} test {items} are too few to tell: gate.min_queries asks for {settings.min_queries}"
        return GateReport(
            outcome="too_few",
            sentence=f"{main}; not promoted: {needed}",
            reasons=[needed, *unmet],
            judgements=judgements,
            guards=list(guards),
            min_queries=settings.min_queries,
        )
    if unmet:
        return _refused(unmet, judgements, guards, settings)
    return GateReport(
        outcome="promote",
        sentence=f"{main} over the {SYSTEM_NAMES[judgements[0].against].lower()}; to be promoted",
        reasons=[],
        judgements=judgements,
        guards=list(guards),
        min_queries=settings.min_queries,
    )


def _refused(
    reasons: list[str], judgements: list[Judgement], guards: Sequence[GuardResult], settings: GateSettings
) -> GateReport:
    main = f"{judgements[0].figures}; " if judgements else ""
    return GateReport(
        outcome="refuse",
        sentence=f"{main}refused: {reasons[0]}",
        reasons=reasons,
        judgements=judgements,
        guards=list(guards),
        min_queries=settings.min_queries,
    )


def _judgements(
    values: Values | Similarities,
    settings: GateSettings,
    evaluation: EvaluationSettings,
    seed: int,
    seen: Collection[str],
) -> Iterator[Judgement]:
    """The demand that matters most first: the pair against what serves today."""
    serving = RERANKER if RERANKER in values else EMBEDDER
    own_loss = settings.max_loss.get(settings.metric, 0.0)
    guarded = {metric: loss for metric, loss in settings.max_loss.items() if metric != settings.metric}
    for reference in _references(values, seen):
        of_pair = _compared(values, serving, reference.serving, evaluation, seed, reference.without)
        if settings.metric in of_pair:
            yield _judged(of_pair[settings.metric], reference.serving, "better", settings.min_gain, evaluation)
        of_embedder = _compared(values, EMBEDDER, reference.embedder, evaluation, seed, reference.without)
        if serving != EMBEDDER and settings.metric in of_embedder:
            yield _judged(of_embedder[settings.metric], reference.embedder, "not worse", own_loss, evaluation)
        for metric, loss in guarded.items():
            pairs = [(of_pair, reference.serving), (of_embedder, reference.embedder)]
            for rows, against in pairs if serving != EMBEDDER else pairs[:1]:
                if metric in rows:
                    yield _judged(rows[metric], against, "not worse", loss, evaluation)
    if serving == RERANKER:
        own = _compared(values, RERANKER, EMBEDDER, evaluation, seed, ())
        yield _judged(own[settings.metric], EMBEDDER, "not worse", own_loss, evaluation)


def _references(values: Values | Similarities, seen: Collection[str]) -> Iterator[_Reference]:
    if CHAMPION_EMBEDDER in values:
        yield _Reference(
            CHAMPION_EMBEDDER, CHAMPION_PAIR if CHAMPION_PAIR in values else CHAMPION_EMBEDDER, frozenset(seen)
        )
    yield _Reference(BASE_EMBEDDER, BASE_PAIR if BASE_PAIR in values else BASE_EMBEDDER, frozenset())


def _compared(
    values: Values | Similarities,
    system: str,
    against: str,
    evaluation: EvaluationSettings,
    seed: int,
    without: Collection[str],
) -> dict[str, Comparison]:
    if isinstance(values, Similarities):
        rows = compare_similarities(values, [system], against, evaluation, seed, without=without, metrics=["spearman"])
    else:
        rows = compare(values, [system], against, evaluation, seed, without=without)
    return {row.metric: row for row in rows}


def _judged(
    found: Comparison,
    against: str,
    demand: Literal["better", "not worse"],
    allowed: float,
    evaluation: EvaluationSettings,
) -> Judgement:
    if demand == "better":
        chance = found.interval_low <= 0 or found.p_value > 1 - evaluation.confidence
        met = found.gain >= allowed - _TOLERANCE and not chance
    else:
        met = found.gain >= -allowed - _TOLERANCE
    return Judgement(found=found, against=against, demand=demand, allowed=allowed, met=met)


def _not_a_number(values: Values) -> str | None:
    for system, of_system in values.items():
        for metric, of_queries in of_system.items():
            broken = [query for query, value in of_queries.items() if not math.isfinite(value)]
            if broken:
                return (
                    f"{METRIC_NAMES[metric]} of the {SYSTEM_NAMES[system].lower()} is not a number for "
                    f"{len(broken)} of {len(of_queries)} questions (first: {broken[0]})"
                )
    return None
