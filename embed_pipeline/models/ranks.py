"""In how many processes models encode, score and search, and where these find each other's results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from embed_pipeline.errors import ArtifactError
from embed_pipeline.launch.job import Job
from embed_pipeline.models.blocks import (
    BLOCK_SIZE,
    Texts,
    assemble,
    blocks_of,
    is_whole,
    lengths_of,
    missing_blocks,
    of_rows,
    write_block,
    write_texts,
)
from embed_pipeline.models.job import BlocksJob, InferenceJob, SearchJob
from embed_pipeline.models.precision import default_device
from embed_pipeline.models.search import merge_shares, read_shares, search
from embed_pipeline.models.source import weights_digest

logger = logging.getLogger(__name__)

# What a torchrun job takes before it does anything: imports, and a model on each device.
START_SECONDS = 30.0
# Products with a top-k, 384 dimensions: measured on 2 cores, and of a data centre's GPU a cautious guess.
PAIRS_PER_SECOND = {"cpu": 5e7, "gpu": 5e9}

Launch = Callable[[Job, Path, None], None]
"""Runs a job (its file is the second argument) to its end, in no MLflow run; raises TrainingError if it fails."""


@dataclass(frozen=True)
class Ranks:
    """How many processes there are for heavy work, and the folder that all of them see.

    The calling process does the work as rank 0 of 1 until a torchrun job (see `models.rank`) would save more than its
    start costs. The results are the same, down to the last bit: a block of texts is encoded in the same batches by
    whoever takes it, and searches are exact. (On a CPU a rank has fewer threads than a process alone; MiniLM's bits, at
    least, do not depend on their number.) Without a folder everything happens here and stays in memory.
    """

    folder: Path | None = None
    processes: int = 1
    launch: Launch | None = None

    def __post_init__(self) -> None:
        if self.processes > 1 and (self.folder is None or self.launch is None):
            raise ValueError("several processes need a folder that all of them see, and something to launch them")

    def compute(
        self,
        name: Callable[[], Path],
        texts: Texts,
        work: Callable[[Texts], np.ndarray],
        job: Callable[[Path, tuple[int, ...]], BlocksJob],
        *,
        what: str,
        progress: bool,
    ) -> np.ndarray:
        """What `work` makes of the texts, a row each: memory-mapped and read-only, or in memory without a folder.

        `name`, under the folder, is what it is found by if it was made before. `work` computes one block in this
        process, `job` describes several for other processes: it is given their folder and the blocks' numbers. What was
        killed goes on with the blocks that are missing. Two callers who want the same do it once. A file that is not
        what was written is set aside and made again.

        Raises ArtifactError where the storage does not give back what was just written.
        """
        if self.folder is None:
            with _timed(what, len(texts[0])):
                return self._in_memory(texts, work, what, progress)
        file = self.folder / name()
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file):
            if not is_whole(file):
                with _timed(what, len(texts[0])):
                    self._on_disk(file, texts, work, job, what, progress)
            return np.load(file, mmap_mode="r", allow_pickle=False)

    @staticmethod
    def _in_memory(texts: Texts, work: Callable[[Texts], np.ndarray], what: str, progress: bool) -> np.ndarray:
        blocks = blocks_of(lengths_of(texts), BLOCK_SIZE)
        with _bar(len(texts[0]), what, progress) as bar:
            for number, rows in enumerate(blocks):
                of_block = work(of_rows(texts, rows))
                if number == 0:
                    whole = np.empty((len(texts[0]), *of_block.shape[1:]), dtype=np.float32)
                whole[rows] = of_block
                bar.update(len(rows))
        return whole

    def _on_disk(
        self,
        file: Path,
        texts: Texts,
        work: Callable[[Texts], np.ndarray],
        job: Callable[[Path, tuple[int, ...]], BlocksJob],
        what: str,
        progress: bool,
    ) -> None:
        lengths = lengths_of(texts)
        blocks = blocks_of(lengths, BLOCK_SIZE)
        folder = file.with_suffix(f".blocks-of-{BLOCK_SIZE}")
        folder.mkdir(exist_ok=True)
        missing = missing_blocks(folder, len(blocks))
        if len(missing) < len(blocks):
            logger.info("%s: %d of %d blocks were there already", what, len(blocks) - len(missing), len(blocks))
        # In characters: the longest come first, and take longest.
        left = sum(_characters(lengths, blocks[block]) for block in missing)
        with _bar(len(lengths), what, progress) as bar:
            bar.update(len(lengths) - sum(len(blocks[block]) for block in missing))
            while missing:
                block = missing.pop(0)
                started = time.perf_counter()
                write_block(folder, block, work(of_rows(texts, blocks[block])))
                seconds = time.perf_counter() - started
                done = _characters(lengths, blocks[block])
                left -= done
                bar.update(len(blocks[block]))
                if missing and self._saves(seconds / done * left):
                    break
        if missing:
            logger.info("%s: the other %d blocks in %d processes", what, len(missing), self.processes)
            write_texts(folder, texts, blocks)
            self._launch(job(folder.absolute(), tuple(missing)))
        if missing := missing_blocks(folder, len(blocks)):
            raise ArtifactError(
                f"{what}: {len(missing)} of {len(blocks)} files in {folder} are not what was just written, so the "
                "disk or its file system is failing. Put EMBED_PIPELINE_STORE on another one",
                passing=True,
            )
        assemble(folder, blocks, file)
        shutil.rmtree(folder)

    def search(
        self, queries: np.ndarray, passages: np.ndarray, top_k: int, *, progress: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `models.search.search`, where it is worth it with a share of the passages in each process."""
        device = "cpu" if default_device() == "cpu" else "gpu"
        if not self._saves(len(queries) * len(passages) / PAIRS_PER_SECOND[device]):
            return search(queries, passages, top_k, progress=progress)
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="search-", dir=self.folder))
        try:
            job = SearchJob(
                queries=_file_of(queries, folder / "queries.npy"),
                passages=_file_of(passages, folder / "passages.npy"),
                top_k=top_k,
                folder=folder,
                world_size=self.processes,
            )
            logger.info(
                "searching %d passages for %d queries in %d processes", len(passages), len(queries), self.processes
            )
            self._launch(job)
            return merge_shares(read_shares(folder), top_k)
        finally:
            shutil.rmtree(folder)

    def _saves(self, seconds: float) -> bool:
        """Whether work that takes so long here is done sooner by a job."""
        return self.processes > 1 and seconds * (1 - 1 / self.processes) > START_SECONDS

    def _launch(self, job: InferenceJob) -> None:
        assert self.launch is not None
        self.launch(job, job.write(), None)


def set_aside(model: torch.nn.Module) -> None:
    """Leave the GPU's memory to the rank that is about to use it; `model.to(device)` brings it back."""
    if torch.cuda.is_available():
        model.to("cpu")
        torch.cuda.empty_cache()


ALONE = Ranks()
"""One process, and nothing on disk."""


def model_digest(folder: Path, told: str) -> str:
    """Stands for everything that decides what a model makes of a text: its files, the libraries, and what is `told`."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "sentence-transformers")]
    return hashlib.sha256(f"{weights_digest(folder)}{told}{versions}".encode()).hexdigest()[:16]


def texts_digest(task: str, texts: Texts) -> str:
    digest = hashlib.sha256(task.encode())
    for column in texts:
        for text in column:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()[:32]


def _characters(lengths: np.ndarray, rows: np.ndarray) -> int:
    return int(lengths[rows].sum()) + len(rows)  # an empty text is work as well


@contextmanager
def _timed(what: str, texts: int) -> Iterator[None]:
    logger.info("%s", what)
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    logger.info("done in %.1f s, %.0f a second", seconds, texts / max(seconds, 1e-9))


def _bar(texts: int, what: str, progress: bool) -> tqdm:
    return tqdm(total=texts, desc=what, unit=" texts", disable=not progress)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time reads or makes `file`. The lock ends with its process, however that ends."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process has %s: waiting for it", file.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _file_of(matrix: np.ndarray, otherwise: Path) -> Path:
    """The .npy file that `matrix` is memory-mapped from, whole; else one that is written for it."""
    if isinstance(matrix, np.memmap) and matrix.flags.c_contiguous and matrix.filename is not None:
        file = Path(matrix.filename)
        if np.load(file, mmap_mode="r", allow_pickle=False).shape == matrix.shape:
            return file
    np.save(otherwise, matrix)
    return otherwise
