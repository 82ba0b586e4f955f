"""Batches of rows of like length, for losses that look at each row by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import BatchSampler

POOL_STEPS = 50  # sorted together: enough to save nearly all padding, few enough to leave every epoch other batches


class GroupedByLength(BatchSampler):
    """A batch is padded to its longest text, so rows of like length save what would be computed on padding: for each
    token of MedQuAD's passages, batches of 64 have 2.2, and grouped ones 1.14 (SciFact: 1.7 and 1.25).

    Rows are shuffled by seed and epoch, dealt into pools of POOL_STEPS steps, sorted by length within each, and cut
    into steps, whose order is drawn as well: the batches of a step, one for each process, are alike, so no process
    waits for another. The step of the longest rows comes first: where memory is too small, that shows at once. An
    incomplete step is left out. (The method of transformers' LengthGroupedSampler, whose rows need to be tokenized.)
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, batches_a_step: int, seed: int) -> None:
        """`lengths`: (rows,), of any unit."""
        self.lengths, self.batch_size, self.batches_a_step = lengths, batch_size, batches_a_step
        self.seed, self.epoch, self.drop_last = seed, 0, True

    def __len__(self) -> int:
        return self.batches_a_step * (len(self.lengths) // (self.batch_size * self.batches_a_step))

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        rows_a_step = self.batch_size * self.batches_a_step
        order = generator.permutation(len(self.lengths))
        steps: list[np.ndarray] = []
        for start in range(0, len(order), rows_a_step * POOL_STEPS):
            pool = order[start : start + rows_a_step * POOL_STEPS]
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            whole = len(pool) // rows_a_step * rows_a_step
            steps += np.split(pool[:whole], whole // rows_a_step) if whole else []
        shuffled = [steps[i] for i in generator.permutation(len(steps))]
        longest = int(np.argmax([self.lengths[step[0]] for step in shuffled])) if shuffled else 0
        for step in [*shuffled[longest : longest + 1], *shuffled[:longest], *shuffled[longest + 1 :]]:
            for batch in np.split(step, self.batches_a_step):
                yield batch.tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def lengths_of(rows: Dataset) -> np.ndarray:
    """(rows,) characters of what is padded: all texts of a row, of a list the longest. Characters, since the collator
    tokenizes; they order texts as tokens do, nearly."""
    lengths = np.zeros(len(rows), dtype=np.int64)
    for name in rows.column_names:
        start = 0
        for part in rows.select_columns(name).iter(batch_size=10_000):
            values = part[name]
            lengths[start : start + len(values)] += [_characters(value) for value in values]
            start += len(values)
    return lengths


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return max(map(len, value))
    return 0
