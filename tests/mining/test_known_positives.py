"""From raw rows to negatives: what anybody delivered as relevant is never a negative, whatever became of its row."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cleaned_folder import unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_pipeline import tables
from embed_pipeline.cleaning import verify as cleaning_verify
from embed_pipeline.cleaning.clean import CleaningReport, clean
from embed_pipeline.mining.mine import mine
from embed_pipeline.mining.verify import verify
from embed_pipeline.settings import CleaningSettings, MiningSettings

Row = dict[str, Any]


class EveryTextIsSomewhere:
    """Vectors that depend on the text alone."""

    precision = "float32"

    def encode_queries(self, texts: Sequence[str], *, progress: bool = True) -> np.ndarray:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts]
        return unit_rows([np.random.default_rng(seed).normal(size=4) for seed in seeds])

    encode_passages = encode_queries


def passage(number: int, variant: int) -> str:
    """Texts of one number are near-duplicates, texts of two numbers have nothing in common."""
    words = " ".join(f"{chr(97 + number % 26)}{number * 31 + i}{chr(97 + i % 26)}" for i in range(40))
    return words if variant == 0 else f"{words.capitalize()}! v{variant}"


def rows_of(seed: int) -> list[Row]:
    """Few queries and passages in many rows: in splits, documents and grades that do not go together."""
    draw = random.Random(seed)
    rows: list[Row] = [
        {
            "query": f"why number {draw.randrange(8)}",
            "passage": passage(draw.randrange(12), draw.choice([0, 0, 1])),
            "document_id": draw.choice([None, "d1", "d2", "d3", "d4", "d5"]),
            "split": draw.choice([None, "train", "train", "train", "dev", "valid", "test"]),
            "relevance": draw.choice([1.0, 1.0, 1.0, 2.0, 0.0]),
        }
        for _ in range(draw.randrange(5, 40))
    ]
    rows += [
        {"query": f"why number {number}", "passage": passage(number, 0), "split": split, "relevance": 1.0}
        for start, split in zip((100, 110, 120), tables.SPLITS, strict=True)
        for number in range(start, start + 3)
    ]
    whole = {**dict.fromkeys(tables.RAW.names), "source": "a", "kind": "pair"}
    return [{**whole, "row_number": n, **row} for n, row in enumerate(rows)]


def negatives_of(rows: list[Row], action: str) -> tuple[set[tuple[str, str]], CleaningReport]:
    """(query, passage) texts of what is mined from the cleaned rows: as many as there can be."""
    with TemporaryDirectory() as folder:
        raw, out = Path(folder) / tables.RAW_FILE, Path(folder) / "out"
        out.mkdir()
        tables.write(pa.Table.from_pylist(rows, schema=tables.RAW), tables.RAW, raw)
        report = clean(raw, CleaningSettings.model_validate({"near_duplicates": {"action": action}}), 1, out)
        mining = MiningSettings(top_k=5, num_negatives=50, max_score_ratio=None)
        mine(out, EveryTextIsSomewhere(), mining, 0, out, progress=False)
        assert verify(out, out, mining) == []
        assert cleaning_verify.verify(out, raw) == []
        query_of = {r["query_id"]: r["query"] for r in pq.read_table(out / tables.QUERIES_FILE).to_pylist()}
        text_of = {r["passage_id"]: r["text"] for r in pq.read_table(out / tables.PASSAGES_FILE).to_pylist()}
        mined = pq.read_table(out / tables.HARD_NEGATIVES_FILE).to_pylist()
        return {(query_of[row["query_id"]], text_of[id]) for row in mined for id in row["negative_ids"]}, report


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), action=st.sampled_from(["merge", "keep"]))
def test_delivered_positives_are_never_negatives(seed: int, action: str) -> None:
    rows = rows_of(seed)
    negatives, _ = negatives_of(rows, action)
    assert not negatives & {(row["query"], row["passage"]) for row in rows if row["relevance"] > 0}
    assert len({query for query, _ in negatives}) >= 3


@pytest.mark.parametrize("action", ["merge", "keep"])
def test_a_positive_lost_to_test_is_no_negative_of_a_query_that_stays(action: str) -> None:
    rows = rows_of(0)[-9:]
    lost = {"query": "why so", "passage": passage(1, 0), "split": "train"}
    stays = {"query": "why so", "passage": passage(2, 0), "split": "train"}
    held = {"query": "how so", "passage": passage(1, 1), "split": "test"}
    more = [{**rows[0], "document_id": None, "row_number": 50 + n, **row} for n, row in enumerate([lost, stays, held])]
    negatives, report = negatives_of([*rows, *more], action)
    assert report.rejected_by_reason == {"split_leak": 1}
    assert report.withheld_pairs == 1
    own = {text for query, text in negatives if query == "why so"}
    assert own
    assert not own & {passage(1, 0), passage(1, 1), passage(2, 0)}
