"""Whether anything that evaluation asks was trained on: read from the rows that training got, not from its settings."""

from __future__ import annotations

from pathlib import Path

import duckdb

from embed_pipeline.tables import QUERIES_FILE


def held_out_queries_among(trained: Path, cleaned: Path) -> list[str]:
    """query_ids of dev and test in `cleaned` (a cleaned_pairs folder) that `trained` (parquet with query_id) holds."""
    rows = duckdb.execute(
        "SELECT DISTINCT query_id FROM read_parquet($trained) SEMI JOIN "
        "(SELECT query_id FROM read_parquet($queries) WHERE split <> 'train') USING (query_id) ORDER BY query_id",
        {"trained": str(trained), "queries": str(cleaned / QUERIES_FILE)},
    ).fetchall()
    return [row[0] for row in rows]
