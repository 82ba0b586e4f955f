"""FlagEmbedding's rows, drawn in the same way whenever they are asked for."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import Dataset


class SeededRows(Dataset[Any]):
    """The library draws a row's positive and negatives from the global random numbers, when the row is fetched.

    What it draws would then depend on what was fetched before: a resumed training would see other groups. Here it
    depends on seed, epoch and row alone.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows, self.seed = rows, seed
        # Shared, since processes that load rows may outlive an epoch (dataloader_persistent_workers).
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        before = random.getstate()
        random.seed(f"{self.seed} {int(self.epoch)} {row}")
        try:
            return self.rows[row]
        finally:
            random.setstate(before)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
