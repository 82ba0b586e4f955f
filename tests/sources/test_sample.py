"""The sample of a smoke test: small, the same every time, and still a pipeline's worth of everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from embed_pipeline.settings import SourceSettings
from embed_pipeline.sources.read import read_sources
from embed_pipeline.sources.sample import sample_rows
from embed_pipeline.tables import RAW, RAW_FILE

WriteParquet = Callable[..., Path]


def sampled(folder: Path, settings: dict[str, Any], queries: int, seed: int = 0) -> list[dict[str, Any]]:
    """The rows that are left of what `settings` reads below `folder`."""
    out = folder / f"out {queries} {seed} {len(list(folder.iterdir()))}"
    out.mkdir()
    read_sources(SourceSettings.model_validate(settings), folder, out)
    whole = pq.read_table(out / RAW_FILE).to_pylist()
    by_kind = sample_rows(out, queries, seed)
    table = pq.read_table(out / RAW_FILE)
    assert table.schema == RAW
    assert [path.name for path in out.iterdir()] == [RAW_FILE]
    rows: list[dict[str, Any]] = table.to_pylist()
    assert by_kind == Counter(row["kind"] for row in rows)
    assert rows == [row for row in whole if row in rows], "as delivered, in the order delivered"
    return rows


def test_all_rows_of_a_sampled_question_are_kept(tmp_path: Path, parquet: WriteParquet) -> None:
    questions = [f"question {number // 3}" for number in range(300)]
    parquet("pairs.parquet", query=questions, passage=[f"answer {number}" for number in range(300)])

    rows = sampled(tmp_path, {"path": "pairs.parquet"}, 20)

    assert set(Counter(row["query"] for row in rows).values()) == {3}
    assert len(rows) == 60
    assert sampled(tmp_path, {"path": "pairs.parquet"}, 20) == rows
    assert sampled(tmp_path, {"path": "pairs.parquet"}, 20, seed=1) != rows
    assert len(sampled(tmp_path, {"path": "pairs.parquet"}, 1_000)) == 300


def test_delivered_splits_have_their_shares(tmp_path: Path, parquet: WriteParquet) -> None:
    splits = ["train"] * 900 + ["dev"] * 50 + ["test"] * 50
    parquet(
        "pairs.parquet", query=[f"q {n}" for n in range(1000)], passage=[f"p {n}" for n in range(1000)], split=splits
    )

    rows = sampled(tmp_path, {"path": "pairs.parquet"}, 50)

    assert Counter(row["split"] for row in rows) == {"train": 35, "dev": 5, "test": 10}


def test_a_beir_set_keeps_what_is_judged_and_some_of_the_rest(tmp_path: Path, parquet: WriteParquet) -> None:
    ids = [f"p{n}" for n in range(500)]
    parquet("corpus.parquet", passage_id=ids, text=[f"text {n}" for n in range(500)])
    parquet("queries.parquet", query_id=[f"q{n}" for n in range(100)], text=[f"question {n}" for n in range(100)])
    # Questions 50 to 99 have no answer; three judgements are of questions that nobody delivered.
    judged = [*(f"q{n}" for n in range(60) for _ in range(2)), "x1", "x2", "x3"]
    score = [int(n < 100) for n in range(len(judged))]
    parquet("qrels.parquet", query_id=judged, passage_id=[ids[n] for n in range(len(judged))], score=score)
    settings = {
        "kind": "beir",
        **{key: f"{key}.parquet" for key in ("corpus", "queries", "qrels")},
    }

    rows = sampled(tmp_path, settings, 10)

    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    asked = {row["query_id"] for row in by_kind["query"]}
    assert len(asked) == 10
    assert asked <= {f"q{n}" for n in range(50)}
    assert {row["query_id"] for row in by_kind["judgement"]} == asked
    assert len(by_kind["judgement"]) == 20
    passages = {row["passage_id"] for row in by_kind["passage"]}
    assert {row["passage_id"] for row in by_kind["judgement"]} < passages
    assert len(passages) == 20 + 10
