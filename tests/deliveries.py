"""A delivery of parquet files, read and cleaned as a pipeline does it, and what a user sees of the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed_pipeline.artifacts import Artifact, PipelineStore
from embed_pipeline.cleaning.clean import CleaningReport
from embed_pipeline.mining.verify import verify as verify_negatives
from embed_pipeline.orchestration.checks import splits_do_not_leak_and_rows_add_up
from embed_pipeline.settings import PipelineSettings
from embed_pipeline.stages import Pipeline, make_cleaned_pairs, make_hard_negatives, make_raw_pairs
from embed_pipeline.tables import (
    HARD_NEGATIVES_FILE,
    PASSAGES_FILE,
    QRELS_FILE,
    QUERIES_FILE,
    REJECTED_FILE,
    SPLITS,
    WITHHELD_FILE,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Delivery:
    """A pipeline whose delivery was read and cleaned."""

    pipeline: Pipeline
    cleaned: Artifact

    @cached_property
    def report(self) -> CleaningReport:
        return CleaningReport.model_validate(self.cleaned.report)

    def table(self, name: str) -> list[Row]:
        return pq.read_table(self.cleaned.path / name).to_pylist()

    @cached_property
    def split_of(self) -> dict[str, str]:
        """Query -> the split it stands in."""
        return {row["query"]: row["split"] for row in self.table(QUERIES_FILE)}

    @cached_property
    def reasons(self) -> dict[tuple[str, int], str]:
        """(file, row number) -> why it was dropped."""
        return {(row["source"], row["row_number"]): row["reason"] for row in self.table(REJECTED_FILE)}

    @cached_property
    def detail(self) -> dict[tuple[str, int], str]:
        return {(row["source"], row["row_number"]): row["detail"] for row in self.table(REJECTED_FILE)}

    @cached_property
    def answers(self) -> dict[str, set[str]]:
        """Query -> the texts that answer it."""
        return self._pairs([row for row in self.table(QRELS_FILE) if row["relevance"] > 0])

    @cached_property
    def withheld(self) -> dict[str, set[str]]:
        """Query -> texts that are known to answer it, and are neither trained nor measured on."""
        return self._pairs(self.table(WITHHELD_FILE))

    @cached_property
    def negatives(self) -> dict[str, set[str]]:
        """Train query -> its hard negatives, as mined by the pipeline's base model."""
        mined = make_hard_negatives(self.pipeline).artifact
        assert verify_negatives(mined.path, self.cleaned.path, self.pipeline.settings.mining) == []
        rows = pq.read_table(mined.path / HARD_NEGATIVES_FILE).to_pylist()
        pairs = [{"query_id": row["query_id"], "passage_id": id} for row in rows for id in row["negative_ids"]]
        return self._pairs(pairs)

    def _pairs(self, rows: Iterable[Row]) -> dict[str, set[str]]:
        query = {row["query_id"]: row["query"] for row in self.table(QUERIES_FILE)}
        text = {row["passage_id"]: row["text"] for row in self.table(PASSAGES_FILE)}
        found: dict[str, set[str]] = {}
        for row in rows:
            found.setdefault(query[row["query_id"]], set()).add(text[row["passage_id"]])
        return found


def clean_delivery(
    folder: Path, files: Mapping[str, Sequence[Row]], model: Path = Path("model"), **cleaning: Any
) -> Delivery:
    """Write `files` (name -> rows), read them as pairs or as BEIR, and clean them. What must always hold is checked."""
    (folder / "raw").mkdir(parents=True)
    for name, rows in files.items():
        columns = dict.fromkeys(column for row in rows for column in row)
        pq.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), folder / "raw" / f"{name}.parquet")
    beir = {"kind": "beir", **{name: f"raw/{name}.parquet" for name in files}}
    settings = PipelineSettings.model_validate(
        {
            "name": "lies",
            "encode_precision": "float32",
            "source": beir if "qrels" in files else {"path": "raw/*.parquet"},
            "cleaning": cleaning,
            "mining": {"top_k": 20, "num_negatives": 10, "max_score_ratio": None},
            "embedder": {"base_model": {"path": str(model)}},
            "reranker": {"base_model": {"path": str(model)}},
        }
    )
    pipeline = Pipeline(settings, folder, PipelineStore(folder / "store", settings.name))
    make_raw_pairs(pipeline)
    delivery = Delivery(pipeline, make_cleaned_pairs(pipeline).artifact)
    assert splits_do_not_leak_and_rows_add_up(pipeline) == []
    report = delivery.report
    assert report.raw_rows == sum(map(len, files.values())) == report.kept_rows + len(delivery.table(REJECTED_FILE))
    assert sum(report.rejected_by_reason.values()) == report.rejected_rows
    return delivery


def passage(number: int, variant: int = 0) -> str:
    """Texts of one number are near-duplicates, texts of two numbers have nothing in common."""
    words = " ".join(f"{chr(97 + number % 26)}{number * 31 + i}{chr(97 + i % 26)}" for i in range(40))
    return words if variant == 0 else f"{words.capitalize()}! v{variant}"


def sound(start: int, count: int = 4, **columns: Any) -> list[Row]:
    """Pairs that nothing is wrong with."""
    return [{"query": f"where is number {n}", "passage": passage(n), **columns} for n in range(start, start + count)]


ALL_SPLITS = [row for n, split in enumerate(SPLITS) for row in sound(900 + 20 * n, split=split)]


def beir(count: int, split_of: Callable[[int], str | None] = lambda n: None) -> dict[str, list[Row]]:
    """Question k<n> is answered by passage c<n>, in the split that `split_of` tells."""
    return {
        "corpus": [{"passage_id": f"c{n}", "text": passage(n)} for n in range(count)],
        "queries": [{"query_id": f"k{n}", "text": f"where is number {n}"} for n in range(count)],
        "qrels": [
            {"query_id": f"k{n}", "passage_id": f"c{n}", "score": 1.0, "split": split_of(n)} for n in range(count)
        ],
    }


def by_tens(number: int) -> str:
    """Of ten questions seven are for training, one for dev, two for test."""
    return "train" if number % 10 < 7 else "dev" if number % 10 == 7 else "test"
