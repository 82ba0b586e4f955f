"""What models are measured by besides the pipeline's own test split: guard sets, and the library's evaluators."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from embed_pipeline.evaluation.comparison import (
    BASE_EMBEDDER,
    BASE_RERANKER,
    CHAMPION_EMBEDDER,
    CHAMPION_PAIR,
    EMBEDDER,
    RERANKER,
)
from embed_pipeline.evaluation.evaluators import EmbedderEvaluators, Figures, RerankerEvaluators
from embed_pipeline.evaluation.figure import interval
from embed_pipeline.evaluation.guard_sets import GuardResult, GuardScore, GuardSet, Part, judge_guard
from embed_pipeline.evaluation.results import MeasuredModel, SourceFigure
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.settings import EvaluationSettings

logger = logging.getLogger(__name__)


@dataclass
class Beside:
    """Measures one model after the other, then compares them."""

    settings: EvaluationSettings
    seed: int
    guards: Sequence[GuardSet] = ()
    guard_part: Part = "all"
    evaluators: EmbedderEvaluators | None = None
    reranker_evaluators: RerankerEvaluators | None = None
    guard_scores: dict[str, dict[str, GuardScore]] = field(default_factory=dict)  # system -> guard -> score
    figures: dict[str, Figures] = field(default_factory=dict)  # system -> figures

    def measure(self, system: str, embedder: Embedder) -> None:
        self.guard_scores[system] = {
            guard.settings.name: guard.measure(embedder, self.guard_part) for guard in self.guards
        }
        if self.evaluators is not None:
            logger.info("the evaluators of %d sources", len({part.source for part in self.evaluators.parts}))
            self.figures[system] = self.evaluators.measure(embedder)

    def measure_reranker(self, system: str, reranker: Reranker) -> None:
        if self.reranker_evaluators is not None:
            self.figures[system] = self.reranker_evaluators.measure(reranker)

    def guard_results(self) -> list[GuardResult]:
        return [
            judge_guard(
                guard.settings,
                self.guard_scores[BASE_EMBEDDER][guard.settings.name],
                self.guard_scores[EMBEDDER][guard.settings.name],
                self.guard_scores.get(CHAMPION_EMBEDDER, {}).get(guard.settings.name),
                evaluation=self.settings,
                seed=self.seed,
            )
            for guard in self.guards
        ]

    def source_figures(self) -> list[SourceFigure]:
        """Each figure that both the base and the fine-tuned model have, in the order of the evaluators."""
        rows = []
        if self.evaluators is not None:
            systems = (BASE_EMBEDDER, EMBEDDER, CHAMPION_EMBEDDER)
            rows += self._compared("embedder", systems, self.evaluators.main_metrics)
        if self.reranker_evaluators is not None:
            systems = (BASE_RERANKER, RERANKER, CHAMPION_PAIR)
            rows += self._compared("reranker", systems, self.reranker_evaluators.main_metrics)
        return rows

    def _compared(
        self, model: MeasuredModel, systems: tuple[str, str, str], main_metrics: Sequence[str]
    ) -> list[SourceFigure]:
        base, trained, champion = (self.figures.get(system, {}) for system in systems)
        main = set(main_metrics)
        rows = []
        for name, before in base.items():
            after = trained.get(name)
            if after is None:
                continue
            source, _, metric = name.rpartition("/")
            found = interval(
                before,
                after,
                samples=self.settings.bootstrap_samples,
                confidence=self.settings.confidence,
                seed=self.seed,
            )
            low, high = found or (None, None)
            rows.append(
                SourceFigure(
                    model=model,
                    source=source,
                    metric=metric,
                    main=name in main,
                    base=before.value,
                    trained=after.value,
                    champion=champion[name].value if name in champion else None,
                    change=after.value - before.value,
                    interval_low=low,
                    interval_high=high,
                    items=None if before.items is None else len(before.items),
                )
            )
        return rows
