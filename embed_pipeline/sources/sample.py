"""A small sample of the raw rows, for a smoke test: some of the questions with all that is said of them."""

from __future__ import annotations

from pathlib import Path

import duckdb

from embed_pipeline.tables import RAW, RAW_EXAMPLES, RAW_EXAMPLES_FILE, RAW_FILE, connect, write_stream

SPLIT_SHARES = {"train": 0.7, "dev": 0.1, "test": 0.2}  # of the questions, where the rows come with splits
OTHER_SHARE = 0.1
BATCH_ROWS = 20_000


def sample_rows(folder: Path, queries: int, seed: int) -> dict[str, int]:
    """Reduce `folder/raw_pairs.parquet` to about `queries` questions; returns the rows that are left, by kind.

    Kept are all rows of the questions in the sample, the passages that are judged for them, and as many other
    passages as there are questions. The same rows and seed give the same sample, in the order delivered. Where rows
    come with splits, each split has its share. Of `raw_examples.parquet`, `queries` rows stay.
    """
    if (folder / RAW_EXAMPLES_FILE).is_file():
        return _sample_examples(folder, queries, seed)
    whole = folder / f"whole.{RAW_FILE}"
    (folder / RAW_FILE).rename(whole)
    with connect() as connection:
        quoted = str(whole).replace("'", "''")  # a view takes no parameters
        connection.execute(f"CREATE VIEW raw AS SELECT * FROM stored_in_order('{quoted}')")
        _choose_queries(connection, queries, seed)
        _choose_passages(connection, queries, seed)
        columns = ", ".join(RAW.names)
        kept = connection.sql(
            f"""SELECT {columns} FROM raw WHERE CASE kind
                    WHEN 'passage' THEN file_row_number IN (SELECT row FROM kept_passages)
                    ELSE coalesce(query_id, query) IN (SELECT query FROM kept_queries) END
                ORDER BY file_row_number"""
        )
        write_stream(kept.to_arrow_reader(BATCH_ROWS), RAW, folder / RAW_FILE)
        counted = connection.execute(
            "SELECT kind, count(*) FROM stored(?) GROUP BY kind ORDER BY kind", [str(folder / RAW_FILE)]
        ).fetchall()
    whole.unlink()
    return {str(kind): int(rows) for kind, rows in counted}


def _sample_examples(folder: Path, rows: int, seed: int) -> dict[str, int]:
    whole = folder / f"whole.{RAW_EXAMPLES_FILE}"
    (folder / RAW_EXAMPLES_FILE).rename(whole)
    shares = " ".join(f"WHEN '{split}' THEN {share}" for split, share in SPLIT_SHARES.items())
    taken = f"CASE WHEN splits = 1 THEN 1.0 ELSE CASE told {shares} ELSE {OTHER_SHARE} END END"
    with connect() as connection:
        kept = connection.sql(
            f"""WITH delivered AS (
                    SELECT *, lower(trim(coalesce(split, ''))) AS told
                    FROM stored_in_order($whole)
                ), ranked AS (
                    SELECT *, (SELECT count(DISTINCT told) FROM delivered) AS splits,
                        row_number() OVER (PARTITION BY told ORDER BY lot, file_row_number) AS rank
                    FROM (SELECT *, md5($seed || file_row_number) AS lot FROM delivered)
                )
                SELECT {", ".join(RAW_EXAMPLES.names)} FROM ranked WHERE rank <= ceil($rows * {taken})
                ORDER BY file_row_number""",
            params={"whole": str(whole), "seed": str(seed), "rows": rows},
        )
        count = write_stream(kept.to_arrow_reader(BATCH_ROWS), RAW_EXAMPLES, folder / RAW_EXAMPLES_FILE)
    whole.unlink()
    return {"example": count}


def _choose_queries(connection: duckdb.DuckDBPyConnection, queries: int, seed: int) -> None:
    """Table kept_queries: the ids (where there are none, the texts) of questions that have an answer."""
    shares = " ".join(f"WHEN '{split}' THEN {share}" for split, share in SPLIT_SHARES.items())
    connection.execute(
        f"""
        CREATE TABLE kept_queries AS
        WITH asked AS (
            SELECT coalesce(query_id, query) AS query, min(lower(trim(split))) AS split FROM raw
            WHERE kind IN ('pair', 'triplet') OR (kind = 'judgement' AND relevance > 0
                AND query_id IN (SELECT query_id FROM raw WHERE kind = 'query'))
            GROUP BY ALL HAVING query IS NOT NULL
        ), ranked AS (
            SELECT query, split, (SELECT count(DISTINCT coalesce(split, '')) FROM asked) AS splits,
                row_number() OVER (PARTITION BY split ORDER BY md5($seed || query), query) AS rank
            FROM asked
        )
        SELECT query FROM ranked
        WHERE rank <= ceil($queries * CASE WHEN splits = 1 THEN 1.0 ELSE CASE split {shares} ELSE {OTHER_SHARE} END END)
        """,
        {"queries": queries, "seed": str(seed)},
    )


def _choose_passages(connection: duckdb.DuckDBPyConnection, others: int, seed: int) -> None:
    """Table kept_passages: rows of the passages that the chosen questions are judged on, and of `others` besides."""
    connection.execute(
        """
        CREATE TABLE kept_passages AS
        WITH judged AS (
            SELECT DISTINCT passage_id FROM raw
            WHERE kind != 'passage' AND coalesce(query_id, query) IN (SELECT query FROM kept_queries)
        ), passages AS (
            SELECT file_row_number AS row, coalesce(passage_id IN (SELECT passage_id FROM judged), false) AS needed,
                md5($seed || coalesce(passage_id, passage, '')) AS lot
            FROM raw WHERE kind = 'passage'
        )
        SELECT row FROM passages QUALIFY needed OR row_number() OVER (PARTITION BY needed ORDER BY lot, row) <= $others
        """,
        {"others": others, "seed": str(seed)},
    )
