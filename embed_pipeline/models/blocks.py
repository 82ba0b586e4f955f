"""Work on many texts in fixed blocks, each of whose results lies on disk as soon as it is there.

What a block holds depends on the texts alone, so its rows are computed in the same batches by whichever process takes
it, and what was done before a kill need not be done again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

BATCH_SIZE = 64  # texts that a model is given at once
# Texts of a block: a few batches, so that a kill costs seconds and the processes end together.
BLOCK_SIZE = 8 * BATCH_SIZE
TEXTS_FILE = "texts.arrow"

Texts = tuple[Sequence[str], ...]
"""Columns of equal length: one of texts, or a query and a passage for each pair."""


def lengths_of(texts: Texts) -> np.ndarray:
    """(n,) characters of each text, or of a pair's two."""
    lengths = np.zeros(len(texts[0]), dtype=np.int64)
    for column in texts:
        lengths += np.fromiter(map(len, column), np.int64, len(column))
    return lengths


def blocks_of(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """(n,) lengths -> row numbers (b,) of each block of at most `size`, the longest texts first.

    Sorted over all texts, not within a block, so that blocks cost no padding; and what does not fit into memory fails
    at once, not after hours.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def of_rows(texts: Texts, rows: np.ndarray) -> Texts:
    return tuple([column[row] for row in rows.tolist()] for column in texts)


def block_file(folder: Path, block: int) -> Path:
    return folder / f"{block}.npy"


def write_block(folder: Path, block: int, result: np.ndarray) -> None:
    """One block's rows in float32: whole or not at all, also after a power cut."""
    partial = folder / f"{block}.{os.getpid()}.partial"
    with partial.open("wb") as file:
        np.save(file, np.asarray(result, dtype=np.float32))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(block_file(folder, block))


def missing_blocks(folder: Path, count: int) -> list[int]:
    """Which of `count` blocks are not there yet."""
    there = {path.name for path in folder.glob("*.npy")}
    return [block for block in range(count) if block_file(folder, block).name not in there]


def assemble(folder: Path, blocks: Sequence[np.ndarray], file: Path) -> None:
    """All blocks' rows -> one (n, ...) float32 array in the order of the texts, at `file` in one rename.

    One process at a time. Raises ValueError where there is no block: then nothing tells how long a row is.
    """
    if not blocks:
        raise ValueError("nothing to assemble")
    rows = sum(map(len, blocks))
    first = np.load(block_file(folder, 0), mmap_mode="r")
    partial = file.with_name(f".{file.name}.partial")  # what a kill leaves is overwritten, not left lying
    whole = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(rows, *first.shape[1:]))
    for block, of_block in enumerate(blocks):
        whole[of_block] = np.load(block_file(folder, block))
    whole.flush()
    partial.replace(file)


def write_texts(folder: Path, texts: Texts, blocks: Sequence[np.ndarray]) -> Path:
    """The texts as a file of which a process reads only its own blocks."""
    schema = pa.schema([(str(column), pa.large_string()) for column in range(len(texts))])
    path = folder / TEXTS_FILE
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in blocks:
            columns = [pa.array(column, pa.large_string()) for column in of_rows(texts, rows)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return path


def read_block(path: Path, block: int) -> Texts:
    """One block of what `write_texts` wrote."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(block)
        return tuple(column.to_pylist() for column in batch.columns)
