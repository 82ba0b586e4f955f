"""Work on many texts in fixed blocks, each of whose results lies on disk as soon as it is there.

What a block holds depends on the texts alone, so its rows are computed in the same batches by whichever process takes
it, and what was done before a kill need not be done again.

Every file ends with the SHA-256 of what stands before it, which numpy does not look at: one that a disk changed or cut
short is told from what was written, set aside, and computed again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

logger = logging.getLogger(__name__)

BATCH_SIZE = 64  # texts that a model is given at once on a CPU, where more of them are not faster
_GPU_TOKENS, _GPU_BATCH_SIZE = 131_072, 256  # what a GPU is given at once, at most
# Texts of a block: a few batches, so that a kill costs seconds and the processes end together.
BLOCK_SIZE = 8 * BATCH_SIZE
TEXTS_FILE = "texts.arrow"
_SEAL_BYTES = hashlib.sha256().digest_size
_BYTES_PER_LOOK = 1 << 20

Texts = tuple[Sequence[str], ...]
"""Columns of equal length: one of texts, or a query and a passage for each pair."""


def batch_size_of(device: str, max_length: int | None) -> int:
    """How many texts of at most `max_length` tokens a model is given at once.

    64 texts of a few words leave a GPU waiting for its kernels to be started. 256 do not, and beyond 131,072 tokens a
    larger batch takes more memory without being faster: of texts of 8,192 tokens there are 16. Of an unknown length
    (None) there are 64.
    """
    if not device.startswith("cuda") or max_length is None:
        return BATCH_SIZE
    return max(1, min(_GPU_BATCH_SIZE, _GPU_TOKENS // max_length))


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
    content = io.BytesIO()
    np.save(content, np.asarray(result, dtype=np.float32), allow_pickle=False)
    partial = folder / f"{block}.{os.getpid()}.partial"
    with partial.open("wb") as file:
        file.write(content.getbuffer())
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(block_file(folder, block))


def missing_blocks(folder: Path, count: int) -> list[int]:
    """Which of `count` blocks are not there as they were written; what is there in their place is set aside."""
    return [block for block in range(count) if not is_whole(block_file(folder, block))]


def is_whole(file: Path) -> bool:
    """Whether a file is there as it was written. One that is not is set aside, under a name that ends with .damaged."""
    try:
        with file.open("rb") as opened:
            found, seal = _digest(opened, file.stat().st_size - _SEAL_BYTES), opened.read()
        problem = None if found == seal else "its checksum does not fit"
    except FileNotFoundError:
        return False
    except OSError as error:
        problem = str(error)
    if problem is None:
        return True
    aside = file.with_name(f"{file.name}.damaged")
    file.replace(aside)
    logger.warning("%s is not what was written (%s): it is set aside as %s", file, problem, aside.name)
    return False


def assemble(folder: Path, blocks: Sequence[np.ndarray], file: Path) -> None:
    """All blocks' rows -> one (n, ...) float32 array in the order of the texts, at `file` in one rename.

    One process at a time. Raises ValueError where there is no block: then nothing tells how long a row is.
    """
    if not blocks:
        raise ValueError("nothing to assemble")
    rows = sum(map(len, blocks))
    first = np.load(block_file(folder, 0), mmap_mode="r", allow_pickle=False)
    partial = file.with_name(f".{file.name}.partial")  # what a kill leaves is overwritten, not left lying
    whole = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(rows, *first.shape[1:]))
    for block, of_block in enumerate(blocks):
        whole[of_block] = np.load(block_file(folder, block), allow_pickle=False)
    whole.flush()
    with partial.open("r+b") as written:
        written.write(_digest(written, partial.stat().st_size))
        written.flush()
        os.fsync(written.fileno())
    partial.replace(file)


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the next `size` bytes; reads no further."""
    digest = hashlib.sha256()
    while size > 0 and (part := file.read(min(size, _BYTES_PER_LOOK))):
        digest.update(part)
        size -= len(part)
    return digest.digest()


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
