"""A small search problem in the tables' own schemas, and jobs on it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from embed_pipeline import tables
from embed_pipeline.launch.local import run_local
from embed_pipeline.launch.torchrun import torchrun_command
from embed_pipeline.tracking.journal import Journal, journals
from embed_pipeline.tracking.metrics import JOURNAL_VARIABLE
from embed_pipeline.training.job import TrainingJob

TOPICS = ["river", "engine", "garden", "violin", "harbor", "market", "planet", "winter"]
WORDS = ["old", "new", "blue", "deep", "loud", "slow", "warm", "cold", "tall", "thin", "rich", "wild", "calm", "dark"]
QUERY_WITHOUT_NEGATIVES = "q0"
QUERY_WITH_TWO_POSITIVES = "q1"


@dataclass(frozen=True)
class Problem:
    """64 queries (48 train, 16 dev), 200 passages; a query's answer holds the two words that it asks for."""

    cleaned_pairs: Path
    hard_negatives: Path
    dev_candidates: Path


def write_problem(folder: Path) -> Problem:
    generator = np.random.default_rng(7)
    combinations = [(topic, word) for topic in TOPICS for word in WORDS]
    combinations = [combinations[i] for i in generator.permutation(len(combinations))]
    passages = [f"the {word} {topic} stands number {i}" for i, (topic, word) in enumerate(combinations)]
    passages += [f"nothing much about item {i}" for i in range(200 - len(passages))]
    queries = [f"where is the {topic} that is {word}" for topic, word in combinations[:64]]
    table = pa.table(
        {
            "query_id": [f"q{i}" for i in range(64)],
            "query": queries,
            "split": ["train"] * 48 + ["dev"] * 16,
            "group_id": [f"g{i}" for i in range(64)],
        }
    )
    tables.write(table, tables.QUERIES, folder / tables.QUERIES_FILE)
    ids = [f"p{i}" for i in range(200)]
    table = pa.table(
        {
            "passage_id": ids,
            "title": pa.nulls(200, pa.string()),
            "text": passages,
            "document_id": pa.nulls(200, pa.string()),
            "cluster_id": ids,
        }
    )
    tables.write(table, tables.PASSAGES, folder / tables.PASSAGES_FILE)
    judged = [(f"q{i}", f"p{i}") for i in range(64)] + [(QUERY_WITH_TWO_POSITIVES, "p70")]
    table = pa.table(
        {
            "query_id": [q for q, _ in judged],
            "passage_id": [p for _, p in judged],
            "relevance": [1.0] * len(judged),
            "teacher_score": pa.nulls(len(judged), pa.float64()),
        }
    )
    tables.write(table, tables.QRELS, folder / tables.QRELS_FILE)
    tables.write(tables.WITHHELD.empty_table(), tables.WITHHELD, folder / tables.WITHHELD_FILE)
    _write_negatives(folder, generator)
    _write_candidates(folder, generator)
    _write_extra_sources(folder, generator)
    return Problem(folder, folder, folder / tables.CANDIDATES_FILE)


def _write_negatives(folder: Path, generator: np.random.Generator) -> None:
    rows = []
    for i in range(48):
        positives = [f"p{i}", "p70"] if f"q{i}" == QUERY_WITH_TWO_POSITIVES else [f"p{i}"]
        others = [f"p{j}" for j in generator.permutation(112) if f"p{j}" not in positives]
        negatives = [] if f"q{i}" == QUERY_WITHOUT_NEGATIVES else others[: 1 + i % 4]
        rows.append(
            {
                "query_id": f"q{i}",
                "positive_ids": positives,
                "negative_ids": negatives,
                "positive_scores": [0.9] * len(positives),
                "negative_scores": [0.5] * len(negatives),
                "negative_origins": ["mined"] * len(negatives),
                "positive_teacher_scores": [4.0] * len(positives),
                "negative_teacher_scores": [-1.0 - 0.5 * j for j in range(len(negatives))],
            }
        )
    table = pa.Table.from_pylist(rows, schema=tables.HARD_NEGATIVES)
    tables.write(table, tables.HARD_NEGATIVES, folder / tables.HARD_NEGATIVES_FILE)


def _write_candidates(folder: Path, generator: np.random.Generator) -> None:
    rows = []
    for i in range(48, 64):
        others = [f"p{j}" for j in generator.permutation(112) if j != i][:11]
        # The last dev query's answer was not retrieved.
        candidates = others if i == 63 else [*others[: i % 5], f"p{i}", *others[i % 5 :]]
        rows += [
            {"query_id": f"q{i}", "rank": rank, "passage_id": id, "score": 0.9 - 0.05 * rank}
            for rank, id in enumerate(candidates)
        ]
    table = pa.Table.from_pylist(rows, schema=tables.CANDIDATES)
    tables.write(table, tables.CANDIDATES, folder / tables.CANDIDATES_FILE)


def _write_extra_sources(folder: Path, generator: np.random.Generator) -> None:
    """`faq` is the own source once more; the others are one of each example kind."""
    faq = tables.extra_folder(folder, "faq")
    faq.mkdir(parents=True)
    for name in (tables.QUERIES_FILE, tables.PASSAGES_FILE, tables.QRELS_FILE, tables.WITHHELD_FILE):
        (faq / name).symlink_to(folder / name)
    (faq / tables.HARD_NEGATIVES_FILE).symlink_to(folder / tables.HARD_NEGATIVES_FILE)
    sentences = [f"a {word} {topic}" for topic in TOPICS for word in WORDS]
    pairs = [(sentences[i], sentences[j]) for i, j in generator.integers(0, len(sentences), (72, 2)).tolist()]
    # Alike is what shares its topic.
    alike = [float(first.split()[2] == second.split()[2]) for first, second in pairs]
    alike[:12] = [1.0] * 12
    pairs[:12] = [(f"a {word} river", f"the {word} river") for word in WORDS[:12]]
    graded = [
        0.5 * value + 0.5 * float(a.split()[1] == b.split()[1]) for value, (a, b) in zip(alike, pairs, strict=True)
    ]
    kinds: dict[str, tuple[list[str | None], list[float | None], list[str | None]]] = {
        "sts": ([b for _, b in pairs], list(graded), [None] * 72),
        "duplicates": ([b for _, b in pairs], list(alike), ["yes" if value else "no" for value in alike]),
        "entailment": ([b for _, b in pairs], [None] * 72, [str(i // 3 % 3) for i in range(72)]),
        "topics": ([None] * 72, [None] * 72, [pair[0].split()[2] for pair in pairs]),
        "translated": ([f"{b} in other words" for _, b in pairs], [None] * 72, [None] * 72),
    }
    for name, (second, scores, labels) in kinds.items():
        extra = tables.extra_folder(folder, name)
        extra.mkdir()
        table = pa.table(
            {
                "example_id": [f"e{i:02}" for i in range(72)],
                "sentence1": [pair[0] for pair in pairs],
                "sentence2": pa.array(second, pa.string()),
                "score": pa.array(scores, pa.float64()),
                "label": pa.array(labels, pa.string()),
                "split": ["dev" if i % 3 == 2 else "train" for i in range(72)],
                "group_id": [f"g{i}" for i in range(72)],
            }
        )
        tables.write(table, tables.EXAMPLES, extra / tables.EXAMPLES_FILE)


@dataclass(frozen=True)
class Trained:
    job: TrainingJob
    output: Path
    summary: dict[str, Any]
    log: list[dict[str, float]]

    @property
    def model(self) -> Path:
        return self.output / "model"

    @property
    def told_mlflow(self) -> list[dict[str, Any]]:
        """What every rank of the last launch noted for MLflow, together."""
        return [entry for entry, _ in journals(self.output.parent)[-1].read() if "metrics" in entry]


def read_output(job: TrainingJob) -> Trained:
    log = [json.loads(line) for line in (job.output / "training_log.jsonl").read_text().splitlines()]
    return Trained(job, job.output, json.loads((job.output / "summary.json").read_text()), log)


def launch(job: TrainingJob, folder: Path) -> None:
    job_file = job.write(folder / "job.json")
    env = {JOURNAL_VARIABLE: str(Journal.new(folder, "training", {}).path)}  # as if MLflow were to be told
    run_local(torchrun_command(job.entry_point, job_file, job.world_size), env=env, error_file=folder / "error.json")


def processes_of(job: TrainingJob) -> list[psutil.Process]:
    """All that work for this job on this machine, whoever started them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(job.output) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
