"""Batches as the trainer's own collator makes them, chosen by us: the longest that can occur, and usual ones.

Neither data loaders nor samplers are touched, so the training finds them as if nobody had asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from embed_pipeline.training.engines import Prepared
from embed_pipeline.training.engines.seeded_rows import SeededRows
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.sources import TrainingSource


@dataclass(frozen=True)
class SourceBatches:
    """Batches of one data set, with the loss that it is learnt by. Every rank gets the same ones."""

    name: str
    rows: int
    size: int  # rows of a batch of one process
    seed: int
    lengths: Mapping[str, np.ndarray]  # column -> (rows,) UTF-8 bytes of its text, of the longest where it has several
    classes: np.ndarray | None  # (rows,) where a batch has to hold rows of the same class
    has_margin: bool  # a gradient of zero may mean that nothing is left to learn
    caches: bool  # a step's memory does not grow with its rows
    collate: Callable[[Sequence[int], bool], Any]  # rows, whether their longest texts are asked for -> inputs
    text: Callable[[int], dict[str, Any]]  # of a row, by column

    def longest(self, size: int | None = None) -> Any:
        """Of each column the longest text, then the longest rows: a batch is padded to the longest of its texts."""
        total = sum(self.lengths.values(), np.zeros(self.rows, dtype=np.int64))
        by_column = sorted(self.lengths.values(), key=lambda lengths: -int(lengths.max()))
        order = [*(int(lengths.argmax()) for lengths in by_column), *np.argsort(-total, kind="stable").tolist()]
        return self.collate(self._take(list(dict.fromkeys(order)), size or self.size), True)

    def usual(self, number: int) -> Any:
        """A seeded sample of rows; another one for each `number`."""
        order = np.random.default_rng([self.seed, 7, number]).permutation(self.rows)
        return self.collate(self._take(order.tolist(), self.size), False)

    def shortest(self) -> tuple[dict[str, Any], Any]:
        """The texts of the shortest row, and a batch that begins with it: what is read of it is not cut."""
        total = sum(self.lengths.values(), np.zeros(self.rows, dtype=np.int64))
        rows = self._take(np.argsort(total, kind="stable").tolist(), self.size)
        return self.text(rows[0]), self.collate(rows, True)

    def _take(self, order: list[int], size: int) -> list[int]:
        if self.classes is None:
            return order[:size]
        # Losses over classes need two of them, and two rows of each.
        by_class: dict[Any, list[int]] = {}
        for row in order:
            by_class.setdefault(self.classes[row], []).append(row)
        several = [rows for rows in by_class.values() if len(rows) > 1][:2]
        chosen = [row for rows in several for row in rows[: max(2, size // 2)]]
        return list(dict.fromkeys([*chosen, *order]))[:size]


def batches_of(job: TrainingJob, prepared: Prepared[Any], sources: Sequence[TrainingSource]) -> list[SourceBatches]:
    """Those of every source that has a loss of its own; FlagEmbedding has one loss, over all sources at once."""
    data: Any = prepared.trainer.train_dataset
    if isinstance(data, DatasetDict):
        return [_of_data_set(job, prepared, data[source.name], source) for source in sources]
    if isinstance(data, Dataset):
        return [_of_data_set(job, prepared, data, sources[0])]
    return [_of_flag_embedding(job, prepared, data, "all sources" if len(sources) > 1 else sources[0].name)]


def _of_data_set(job: TrainingJob, prepared: Prepared[Any], data: Dataset, source: TrainingSource) -> SourceBatches:
    collator: Any = prepared.trainer.data_collator
    sampler = job.settings.batch_sampler or source.facts.sampler
    table = data.with_format("arrow")[:]
    return SourceBatches(
        source.name,
        len(data),
        prepared.trainer.args.per_device_train_batch_size,
        job.seed,
        _lengths(table),
        np.asarray(table["label"]) if sampler == "group_by_label" else None,
        source.facts.has_margin,
        source.facts.caches or any("mini_batch" in name for name in source.arguments),
        lambda rows, _: collator([data[row] for row in rows]),
        lambda row: dict(data[row]),
    )


def _of_flag_embedding(job: TrainingJob, prepared: Prepared[Any], data: Any, name: str) -> SourceBatches:
    collator: Any = prepared.trainer.data_collator
    inner = data.rows if isinstance(data, SeededRows) else data
    table = inner.dataset.with_format("arrow")[:]

    def collate(rows: Sequence[int], longest: bool) -> Any:
        few = copy.copy(inner)
        chosen = [inner.dataset[row] for row in rows]
        few.dataset = Dataset.from_list([_longest_texts(row) for row in chosen] if longest else chosen)
        if hasattr(few, "batch_datas"):  # same_dataset_within_batch: a row is a batch
            return collator([(*few._create_batch_data(few.dataset[:]), False)])
        return collator([few[i] for i in range(len(rows))])

    def text(row: int) -> dict[str, Any]:
        longest = _longest_texts(inner.dataset[row])
        return {"query": longest["query"], "positive": longest["pos"][0]}

    caches = getattr(job.settings, "parts", None) is not None
    return SourceBatches(
        name, len(table), job.settings.batch_size, job.seed, _lengths(table), None, False, caches, collate, text
    )


def _longest_texts(row: dict[str, Any]) -> dict[str, Any]:
    """The same with only the longest of its positives and of its negatives, which the library then has to draw."""
    row = dict(row)
    for key in ("pos", "neg"):
        if not row[key]:  # in-batch negatives alone
            continue
        at = max(range(len(row[key])), key=lambda i: len(row[key][i].encode()))
        for column in (key, f"{key}_scores"):
            if row.get(column) is not None:
                row[column] = [row[column][at]]
    return row


def _lengths(table: pa.Table) -> dict[str, np.ndarray]:
    # A token takes three to five bytes of UTF-8 in most languages: counting bytes spares tokenizing every text.
    found = {}
    for name in table.column_names:
        column = table.column(name)
        if _is_text(column.type):
            found[name] = np.asarray(pc.binary_length(column)).astype(np.int64)
        elif (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) and _is_text(
            column.type.value_type
        ):
            lists = column.combine_chunks()
            longest = np.zeros(len(lists), dtype=np.int64)
            np.maximum.at(
                longest, np.asarray(pc.list_parent_indices(lists)), np.asarray(pc.binary_length(lists.flatten()))
            )
            found[name] = longest
    return found


def _is_text(type: pa.DataType) -> bool:
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type))
