"""Base, fine-tuned and champion's embedder on test pairs whose likeness people have scored. Nothing is searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from embed_pipeline.evaluation.beside import Beside
from embed_pipeline.evaluation.compared import ComparedModels, check_folders, measuring
from embed_pipeline.evaluation.comparison import BASE_EMBEDDER, CHAMPION_EMBEDDER, EMBEDDER, Comparison
from embed_pipeline.evaluation.evaluate import write_results
from embed_pipeline.evaluation.evaluators import EmbedderEvaluators
from embed_pipeline.evaluation.gate import judge
from embed_pipeline.evaluation.guard_sets import GuardSet, Part
from embed_pipeline.evaluation.history import THIS, HistoryPoint, point_of
from embed_pipeline.evaluation.parity import write_parity
from embed_pipeline.evaluation.results import (
    Details,
    EvaluationReport,
    PairChange,
)
from embed_pipeline.evaluation.similarities import Similarities, compare_similarities
from embed_pipeline.evaluation.verdict import headline_of_pairs
from embed_pipeline.mining.report import excerpt
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.ranks import ALONE, Ranks
from embed_pipeline.settings import EncodingSettings, EvaluationSettings, GateSettings, Precision
from embed_pipeline.tables import SIMILARITIES, SIMILARITIES_FILE, write

_WHAT = {
    BASE_EMBEDDER: "the embedder before fine-tuning",
    EMBEDDER: "the embedder after fine-tuning",
    CHAMPION_EMBEDDER: "the embedder that serves today",
}


def evaluate_pairs(
    cleaned: Path,
    models: ComparedModels,
    settings: EvaluationSettings,
    seed: int,
    out: Path,
    *,
    gate: GateSettings,
    guards: Sequence[GuardSet] = (),
    guard_part: Part = "all",
    evaluators: EmbedderEvaluators | None = None,
    history: Sequence[HistoryPoint] = (),
    encode_precision: Precision = "auto",
    ranks: Ranks = ALONE,
    title: str = "Evaluation",
    versions: Mapping[str, str] | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Compare base, fine-tuned and champion's embedder on the test pairs of a scored source's `cleaned_pairs` folder.

    The main metric is Spearman's rank correlation of the cosines with people's scores, which does not ask that a
    cosine be on their scale (Reimers, Beyer and Gurevych, COLING 2016); Pearson's is told as well. `models` has no
    reranker: there is nothing to rerank.

    Writes into `out` what `evaluate` does, with `similarities.parquet` in place of `per_query.parquet` and
    `rankings.parquet`. Raises ArtifactError where the split allows no rank correlation, ModelError where a model is
    missing, gives NaN, or takes all pairs for equally alike.
    """
    pairs = Similarities.of_test(cleaned)
    check_folders(models)
    beside = Beside(settings, seed, guards, guard_part, evaluators)
    embedders: dict[str, tuple[Path, EncodingSettings | None]] = {
        BASE_EMBEDDER: (models.base_embedder, models.base_encoding),
        EMBEDDER: (models.embedder, None),
    }

    def measure(system: str, folder: Path, encoding: EncodingSettings | None) -> None:
        embedder = Embedder(
            folder,
            encoding,
            precision=encode_precision,
            trust_remote_code=models.trust_embedder_code,
            ranks=ranks,
        )
        pairs.measure(system, embedder, progress=progress)
        beside.measure(system, embedder)

    if models.champion is not None:  # first: where it no longer loads, there is nothing to compare with
        with measuring(models.champion):
            measure(CHAMPION_EMBEDDER, models.champion.embedder, None)
    for system, (folder, encoding) in embedders.items():
        measure(system, folder, encoding)
    write(pairs.table(), SIMILARITIES, out / SIMILARITIES_FILE)
    systems = [system for system in _WHAT if system in pairs]
    summary = compare_similarities(pairs, systems, BASE_EMBEDDER, settings, seed)
    seen = models.champion.seen if models.champion else frozenset()
    verdict = judge(pairs, gate, settings, seed, seen_by_champion=seen, guards=beside.guard_results())
    over_champion: list[Comparison] = []
    if models.champion is not None:
        over_champion = compare_similarities(pairs, [EMBEDDER], CHAMPION_EMBEDDER, settings, seed, without=seen)
    changes = _changes(pairs)
    claim, figures = headline_of_pairs(summary, settings.confidence)
    made_from = dict(versions or {})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    this = point_of(THIS, now, made_from.get("cleaned_pairs", ""), summary, gate.metric, verdict.outcome)
    details = Details(
        kind="scored",
        title=title,
        gate=verdict,
        claim=claim,
        figures=figures,
        systems={system: _WHAT[system] for system in systems},
        notes=_notes(len(pairs.ids), len(seen)),
        queries=len(pairs.ids),
        over_champion=over_champion,
        seen_by_champion=len(seen),
        history=[*history, this],
        pairs_better=sorted((c for c in changes if c.change > 0), key=lambda c: -c.change)[: settings.examples],
        pairs_worse=sorted((c for c in changes if c.change < 0), key=lambda c: c.change)[: settings.examples],
        sources=beside.source_figures(),
        queries_better=sum(change.change > 0 for change in changes),
        queries_worse=sum(change.change < 0 for change in changes),
        seed=seed,
        bootstrap_samples=settings.bootstrap_samples,
        confidence=settings.confidence,
        versions=made_from,
    )
    write_parity(
        pairs.pairs,
        models.embedder,
        None,
        out,
        trust_embedder_code=models.trust_embedder_code,
        trust_reranker_code=False,
    )
    return write_results(out, summary, details)


def _notes(pairs: int, seen: int) -> list[str]:
    notes = ["Sentences are encoded as they stand, without a prompt, as they are in training."]
    if seen:
        notes.append(f"{seen:,} test pairs are left out wherever the champion is compared: it was trained on them.")
    if pairs < 100:
        notes.append(f"{pairs:,} test pairs are few: the intervals are wide, and rougher than they look.")
    return notes


def _changes(pairs: Similarities) -> list[PairChange]:
    """How much nearer each pair came to the place among all pairs that people give it."""
    before, after = pairs.by_system[BASE_EMBEDDER], pairs.by_system[EMBEDDER]
    wanted, was, now = (_places(values) for values in (pairs.expected, before, after))
    change = np.abs(was - wanted) - np.abs(now - wanted)
    return [
        PairChange(
            sentence1=excerpt(first),
            sentence2=excerpt(second),
            score=float(pairs.expected[row]),
            before=float(before[row]),
            after=float(after[row]),
            change=float(change[row]),
        )
        for row, (first, second) in enumerate(pairs.pairs)
    ]


def _places(values: np.ndarray) -> np.ndarray:
    """Mean ranks as shares of all, 0 for the least."""
    from scipy.stats import rankdata

    ranks: np.ndarray = rankdata(values)
    return (ranks - 1.0) / max(1, len(values) - 1)
