"""The fine-tuned embedder, or where it forgot too much, a model between it and its base.

model/            what goes on: the fine-tuned embedder's own files, or its weights interpolated with the base's
weights.sha256    the digest of model/: what later stages depend on
merging.json      a MergingReport: every coefficient that was tried, and what was decided
trade_off.svg     the same as a picture, where coefficients between base and fine-tuned were tried
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from embed_pipeline.evaluation.evaluators import EmbedderEvaluators, MeasuredSource, embedder_evaluators
from embed_pipeline.evaluation.guard_sets import GuardScore, GuardSet
from embed_pipeline.markdown import escaped, table
from embed_pipeline.merging.plot import trade_off_curve
from embed_pipeline.merging.trade_off import (
    CURVE_FILE,
    DIGEST_FILE,
    MERGING_FILE,
    MergingReport,
    Tried,
    decide,
    figures_of,
    info_of,
    trade_off_table,
)
from embed_pipeline.model_files import MODEL_FOLDER
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.interpolate import interpolate, save_as_trained
from embed_pipeline.models.ranks import ALONE, Ranks
from embed_pipeline.models.source import weights_digest
from embed_pipeline.settings import EncodingSettings, ForgettingSettings, Precision
from embed_pipeline.training.dev_set import EmbedderDevSet
from embed_pipeline.training.job import EmbedderJob

logger = logging.getLogger(__name__)

_CARD = "README.md"


@dataclass(frozen=True)
class Ancestry:
    """A fine-tuned embedder and the base it was trained from."""

    base: Path  # model folder
    base_encoding: EncodingSettings  # laid over what that folder says; the fine-tuned one carries its own
    fine_tuned: Path  # model folder
    trust_remote_code: bool = False


def merge(
    models: Ancestry,
    dev: EmbedderDevSet | DevPairs | None,
    guards: Sequence[GuardSet],
    settings: ForgettingSettings,
    out: Path,
    *,
    encode_precision: Precision = "auto",
    ranks: Ranks = ALONE,
) -> MergingReport:
    """Measure base and fine-tuned embedder on the choosing halves of the guards, and merge them if need be.

    Coefficients are tried only where the fine-tuned embedder loses more than a guard allows. They are chosen on dev
    questions and choosing halves alone: neither test questions nor judging halves are looked at. Writes what the
    module's text lists into `out`.

    Raises ModelError when the two models' tensors differ.
    """
    bench = _Bench(models, dev, guards, encode_precision, ranks)
    base_scores, base_dev = bench.measure(models.base, models.base_encoding)
    scores, fine_tuned_dev = bench.measure(models.fine_tuned)
    metric = dev.metric if isinstance(dev, DevPairs) else "ndcg_at_10"
    tried = [
        figures_of(0.0, base_dev, guards, base_scores, base_scores, metric),
        figures_of(1.0, fine_tuned_dev, guards, scores, base_scores, metric),
    ]
    # In the folder that is being made: it is on the disk where models are kept, and it is cleared with it.
    with tempfile.TemporaryDirectory(dir=out, prefix=".base-") as scratch:
        if not tried[-1].allowed:
            save_as_trained(
                models.base, models.base_encoding, Path(scratch) / "base", trust_remote_code=models.trust_remote_code
            )
            tried += _sweep(bench, Path(scratch), settings, base_scores)
        infos = [info_of(guard, scores[guard.settings.name]) for guard in guards]
        report = decide(
            tried, infos, settings, dev.size if isinstance(dev, DevPairs) else len(dev.queries) if dev else 0
        )
        if report.outcome == "merged":
            interpolate(Path(scratch) / "base", models.fine_tuned, report.coefficient, out / MODEL_FOLDER)
        else:
            _link(models.fine_tuned, out / MODEL_FOLDER)
    logger.info("%s", report.sentence)
    _write_card(models.fine_tuned / _CARD, report, out / MODEL_FOLDER / _CARD)
    (out / DIGEST_FILE).write_text(f"{weights_digest(out / MODEL_FOLDER)}\n")
    (out / MERGING_FILE).write_text(report.model_dump_json(indent=2) + "\n")
    if report.outcome != "kept":
        (out / CURVE_FILE).write_text(trade_off_curve(report), encoding="utf-8")
    return report


@dataclass(frozen=True)
class DevPairs:
    """The dev pairs of a scored source."""

    source: str
    evaluators: EmbedderEvaluators
    metric = "spearman"

    @classmethod
    def read(cls, job: EmbedderJob) -> DevPairs | None:
        """Those by which the training chose its best weights; None where it had none."""
        source = MeasuredSource(job.source_name, job.source_kind, job.cleaned_pairs)
        most = job.settings.dev_queries
        found = embedder_evaluators([source], "dev", seed=job.seed, max_queries=most, max_passages=None)
        return cls(job.source_name, found) if found is not None else None

    @property
    def size(self) -> int:
        expected = self.evaluators.parts[0].expected
        return 0 if expected is None else len(expected)

    def spearman(self, embedder: Embedder) -> float:
        return self.evaluators.measure(embedder)[f"{self.source}/{self.metric}"].value


@dataclass(frozen=True)
class _Bench:
    """What every model between the two is measured by; one model is in memory at a time."""

    models: Ancestry
    dev: EmbedderDevSet | DevPairs | None
    guards: Sequence[GuardSet]
    precision: Precision
    ranks: Ranks

    def measure(
        self, folder: Path, encoding: EncodingSettings | None = None
    ) -> tuple[dict[str, GuardScore], float | None]:
        """Score by guard, on the choosing halves, and the figure on dev."""
        embedder = Embedder(
            folder,
            encoding,
            precision=self.precision,
            trust_remote_code=self.models.trust_remote_code,
            ranks=self.ranks,
        )
        scores = {guard.settings.name: guard.measure(embedder, "choosing") for guard in self.guards}
        if isinstance(self.dev, DevPairs):
            return scores, self.dev.spearman(embedder)
        return scores, self.dev.ndcg_at_10(embedder).value if self.dev else None


def _sweep(
    bench: _Bench, scratch: Path, settings: ForgettingSettings, base_scores: dict[str, GuardScore]
) -> list[Tried]:
    tried = []
    for coefficient in tqdm(sorted(set(settings.coefficients)), "merging", unit="coefficient"):
        merged = scratch / "merged"
        interpolate(scratch / "base", bench.models.fine_tuned, coefficient, merged)
        scores, dev = bench.measure(merged)
        shutil.rmtree(merged)
        metric = bench.dev.metric if isinstance(bench.dev, DevPairs) else "ndcg_at_10"
        tried.append(figures_of(coefficient, dev, bench.guards, scores, base_scores, metric))
        logger.info("coefficient %s: %s", coefficient, tried[-1].model_dump_json())
    return tried


def _link(source: Path, target: Path) -> None:
    """The same files under another name: a published model is never written to."""
    shutil.copytree(source, target, copy_function=_link_or_copy, ignore=shutil.ignore_patterns(_CARD))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that knows no hard links
        shutil.copy2(source, target)


def _write_card(fine_tuned: Path, report: MergingReport, target: Path) -> None:
    told = f"{escaped(report.sentence)}\n\n{table(*trade_off_table(report))}"
    target.unlink(missing_ok=True)
    target.write_text(f"{fine_tuned.read_text()}\n## Merging with the base\n\n{told}\n")
