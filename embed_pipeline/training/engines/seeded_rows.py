"""FlagEmbedding's rows, drawn in the same way whenever they are asked for."""

from __future__ import annotations

import random
from typing import Any

from torch.utils.data import Dataset


class SeededRows(Dataset[Any]):
    """The library draws a row's positive and negatives from the global random numbers, when the row is fetched.

    What it draws would then depend on what was fetched before: a resumed training would see other groups. Here it
    depends on seed, epoch and row alone.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        before = random.getstate()
        random.seed(f"{self.seed} {self.epoch} {row}")
        try:
            return self.rows[row]
        finally:
            random.setstate(before)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
