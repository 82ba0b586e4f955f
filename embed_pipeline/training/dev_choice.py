"""Which weights a training keeps: the last, unless earlier ones are better on dev by more than chance.

The best of several dev evaluations is partly the luckiest. With 136 questions, nDCG@10 of two states of one training
differs by .03 by chance, while a training whose learning rate falls to zero mostly improves up to its end. So whoever
picks the maximum of the dev figure throws away training; here an earlier state has to show that it is better.

Shown is what both tests of the gate say: the interval of the paired bootstrap leaves out 0, and the paired permutation
test has a p-value below the same level. Since the best of several states is compared, the level is divided by their
number (Bonferroni). Items are questions, or pairs of sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from embed_pipeline.evaluation.figure import Figure, interval, p_value

LEVEL = 0.05  # the chance of calling any difference real that is none
SAMPLES = 10_000
_SEED = 0  # of the draws: the same figures always give the same answer

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class State:
    """A training after so many steps, measured on dev."""

    step: int
    figure: Figure  # with its items

    def told(self) -> dict[str, Any]:
        """As JSON has it, to the last bit."""
        items, expected = self.figure.items, self.figure.expected
        return {
            "step": self.step,
            "value": self.figure.value,
            "items": None if items is None else items.tolist(),
            "expected": None if expected is None else expected.tolist(),
        }

    @classmethod
    def of(cls, told: dict[str, Any]) -> State:
        items, expected = (
            None if told[name] is None else np.array(told[name], dtype=np.float64) for name in ("items", "expected")
        )
        return cls(told["step"], Figure(told["value"], items, expected))


@dataclass(frozen=True)
class Difference:
    """How much more one state has than another, and whether that is more than chance."""

    value: float
    low: float
    high: float
    confidence: float  # of the interval
    p_value: float
    items: int

    @property
    def verdict(self) -> Verdict:
        if self.p_value >= 1.0 - self.confidence:
            return "undecided"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({100 * self.confidence:.3g} % interval {self.low:+.4f} to {self.high:+.4f})"


def difference(before: State, after: State, comparisons: int = 1) -> Difference:
    """`after` less `before`, at LEVEL divided by the number of comparisons of which this is one."""
    confidence = 1.0 - LEVEL / comparisons
    found = interval(before.figure, after.figure, samples=SAMPLES, confidence=confidence, seed=_SEED)
    low, high = found or (float("-inf"), float("inf"))
    p = p_value(before.figure, after.figure, samples=SAMPLES, seed=_SEED) if found else 1.0
    items = 0 if after.figure.items is None else len(after.figure.items)
    return Difference(after.figure.value - before.figure.value, low, high, confidence, p, items)


@dataclass(frozen=True)
class Choice:
    """Which weights are kept, and what dev says of them."""

    step: int
    value: float  # the dev figure of what is kept
    sentence: str  # why
    verdict: Verdict  # against the model before the training
    over_base: str  # the same as a sentence, with what so many items can tell


def choose(metric: str, before: State, best: State, last: State, comparisons: int) -> Choice:
    """`best` is the state with the highest figure, `last` the last one; they may be the same.

    `comparisons` is the number of states that `best` was picked from.
    """
    kept = last
    if best.step == last.step:
        sentence = f"the last weights are kept: no evaluation before step {last.step} had a higher dev {metric}"
    else:
        change = difference(last, best, comparisons)
        told = (
            f"dev {metric} is {best.figure.value:.4f} at step {best.step} and {last.figure.value:.4f} at the last, "
            f"step {last.step}: {change}"
        )
        if change.verdict == "better":
            kept = best
            sentence = f"the weights of step {best.step} are kept, which are better by more than chance: {told}"
        else:
            sentence = f"the last weights are kept, because the difference is no more than chance: {told}"
    gain = difference(before, kept)
    over_base = (
        f"dev {metric} went from {before.figure.value:.4f} to {kept.figure.value:.4f}, {gain}, which is "
        f"{_SAID[gain.verdict]}; {gain.items} dev {'pairs' if before.figure.expected is not None else 'questions'} "
        f"distinguish differences of about {(gain.high - gain.low) / 2:.3f}"
    )
    return Choice(kept.step, kept.figure.value, sentence, gain.verdict, over_base)


_SAID = {
    "better": "better than the base model by more than chance",
    "worse": "worse than the base model by more than chance",
    "undecided": "no more than chance",
}
