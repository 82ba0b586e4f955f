"""Candidates for promotion: real tiny models, each with weights of its own, published as a pipeline publishes them."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from embed_pipeline.artifacts import Artifact, Made, PipelineStore, Recipe, RunIds
from embed_pipeline.champions import read_history
from embed_pipeline.evaluation.gate import GateReport
from embed_pipeline.evaluation.parity import write_parity
from embed_pipeline.evaluation.results import EVALUATORS_FILE
from embed_pipeline.fitting import FittedEmbedderSettings, FittedRerankerSettings, FittedSettings
from embed_pipeline.model_files import JOB_FILE, MODEL_FOLDER, SERVING_FILE
from embed_pipeline.models.collection import load_collection
from embed_pipeline.settings import TrackingSettings
from embed_pipeline.tables import QUERIES_FILE
from embed_pipeline.tracking.promotion import Promoted, promote
from embed_pipeline.tracking.registry import Candidate
from embed_pipeline.tracking.runs import TrackedRun, tracked_run
from embed_pipeline.training.job import EmbedderJob, RerankerJob
from tests.cleaned_folder import write_cleaned

WORDS = ("river", "stone", "cloud", "engine", "paper", "window", "garden")
QUESTIONS = [f"where is the {word} of the castle" for word in WORDS]
ANSWERS = [f"{question[13:]} lies behind the gate, next to the well" for question in QUESTIONS]
LONG = " ".join(["a very long question about a copper lantern in the valley"] * 20)


FITTED: dict[str, Any] = {"learning_rate": 2e-5, "batch_size": 16, "train_group_size": 5}


@dataclass(frozen=True)
class Workshop:
    """Makes candidates of the pipeline `support`; `embedder` and `reranker` are the folders they start from."""

    store: PipelineStore
    embedder: Path
    reranker: Path
    trusted: bool = False

    def candidate(
        self,
        seed: int,
        *,
        outcome: str = "promote",
        reference: str | None = None,
        merged: bool = False,
        alone: bool = False,
    ) -> Candidate:
        """One whose weights, and so whose versions, depend on the seed; `alone`: without a reranker."""
        recipe = partial(Recipe, settings={}, seed=seed, code_version="1")
        produce = partial(self.store.produce, content=None)
        cleaned = self.store.produce(
            "cleaned_pairs",
            Recipe(inputs={}, settings={}, seed=0, code_version="1"),
            [],
            _clean,
            content=[QUERIES_FILE],
        ).artifact
        embedder = produce(
            "embedder",
            recipe(inputs={"cleaned_pairs": cleaned.content}),
            [cleaned],
            lambda out: self._train(out, EmbedderJob, FittedEmbedderSettings, self.embedder, seed),
        ).artifact
        if merged:
            embedder = produce(
                "merged_embedder",
                recipe(inputs={"embedder": embedder.content}),
                [cleaned, embedder],
                partial(_merge, embedder),
            ).artifact
        reranker = None
        if not alone:
            reranker = produce(
                "reranker",
                recipe(inputs={embedder.manifest.asset: embedder.content}),
                [cleaned, embedder],
                lambda out: self._train(out, RerankerJob, FittedRerankerSettings, self.reranker, seed),
            ).artifact
        evaluation = produce(
            "evaluation",
            Recipe(
                inputs={embedder.manifest.asset: embedder.content, "champion": str(reference)},
                settings={"outcome": outcome, "alone": alone},
                seed=seed,
                code_version="1",
            ),
            [cleaned, embedder, *([reranker] if reranker else [])],
            lambda out: self._evaluate(out, cleaned, embedder, reranker, outcome, reference),
        ).artifact
        return Candidate(embedder, reranker, evaluation)

    @property
    def serving(self) -> str | None:
        """The key of the champion."""
        champion = read_history(self.store).champion
        return champion.key if champion else None

    def next(self, seed: int, *, outcome: str = "promote", alone: bool = False) -> Candidate:
        """One that was compared with who serves now."""
        return self.candidate(seed, outcome=outcome, reference=self.serving, alone=alone)

    def tracked(self) -> AbstractContextManager[TrackedRun]:
        return tracked_run(TrackingSettings(system_metrics=False), self.store, "champion", None)

    def promote(self, candidate: Candidate, *, smoke_test: bool = False) -> Promoted:
        return promote(self.store, candidate, self.tracked, by="test", smoke_test=smoke_test)

    def _train(
        self,
        out: Path,
        job: type[EmbedderJob] | type[RerankerJob],
        settings: type[FittedSettings],
        base: Path,
        seed: int,
    ) -> Made:
        shutil.copytree(base, out / MODEL_FOLDER)
        weights = out / MODEL_FOLDER / "model.safetensors"
        generator = np.random.default_rng(seed)
        changed = {k: v + generator.normal(0, 0.1, v.shape).astype(v.dtype) for k, v in load_file(weights).items()}
        weights.unlink()
        save_file(changed, weights, metadata={"format": "pt"})
        (out / MODEL_FOLDER / "README.md").write_text("# a model\n")
        (out / SERVING_FILE).write_text(json.dumps({"embedder_weight": 0.4}))
        of_kind = {"random_negatives": 0} if job is RerankerJob else {}
        more = {"dev_candidates": Path("candidates.parquet")} if job is RerankerJob else {}
        described = job(
            settings=settings.model_validate(
                {"base_model": {"path": str(base), "trust_remote_code": self.trusted}, **FITTED, **of_kind}
            ),
            seed=seed,
            base_model=base,
            trust_remote_code=self.trusted,
            source_name=self.store.pipeline,
            cleaned_pairs=Path(),
            hard_negatives=Path(),
            output=out,
            **more,
        )
        described.write(out / JOB_FILE)
        return Made({}, RunIds(dagster="a-dagster-run", mlflow="a-training-run"))

    def _evaluate(
        self,
        out: Path,
        cleaned: Artifact,
        embedder: Artifact,
        reranker: Artifact | None,
        outcome: str,
        reference: str | None,
    ) -> Made:
        write_parity(
            load_collection(cleaned.path, ("test",)),
            embedder.path / MODEL_FOLDER,
            reranker.path / MODEL_FOLDER if reranker else None,
            out,
            trust_embedder_code=self.trusted,
            trust_reranker_code=self.trusted,
        )
        (out / EVALUATORS_FILE).write_text(json.dumps([_figure("embedder"), _figure("reranker")]))
        gate = GateReport.model_validate(
            {
                "outcome": outcome,
                "sentence": f"nDCG@10 0.412 → 0.471: {outcome}",
                "reasons": [],
                "judgements": [],
                "guards": [],
                "min_queries": 1,
            }
        )
        figures = {"interval_low": 0.1, "interval_high": 0.3, "p_value": 0.01, "num_queries": 8}
        summary = [
            {"system": system, "metric": "ndcg_at_10", "value": 0.5 + number / 8, "gain": 0.25, **figures}
            for number, system in enumerate(("embedder", "reranker") if reranker else ("embedder",))
        ]
        report = {
            "gate": gate.model_dump(mode="json"),
            "reference": reference,
            "summary": summary,
            "metric": "ndcg_at_10",
        }
        return Made(report, RunIds())


def _figure(model: str) -> dict[str, Any]:
    told = {"interval_low": 0.05, "interval_high": 0.15, "items": 40, "champion": None}
    return {
        **{"model": model, "source": "sts", "metric": "spearman", "main": True},
        **{"base": 0.25, "trained": 0.375 if model == "embedder" else 0.5, "change": 0.125, **told},
    }


def _merge(embedder: Artifact, out: Path) -> Made:
    shutil.copytree(embedder.path / MODEL_FOLDER, out / MODEL_FOLDER)
    return Made({}, RunIds())


def _clean(out: Path) -> Made:
    questions = [*QUESTIONS, LONG]
    write_cleaned(
        out,
        [(f"q{i}", text) for i, text in enumerate(questions)],
        [(f"p{i}", text) for i, text in enumerate([*ANSWERS, LONG * 2])],
        [(f"q{i}", f"p{i}", 1.0) for i in range(len(questions))],
        split="test",
    )
    return Made({}, RunIds())
