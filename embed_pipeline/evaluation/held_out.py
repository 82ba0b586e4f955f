"""Whether anything that evaluation asks was trained on: read from the rows that training got, not from its settings."""

from __future__ import annotations

from pathlib import Path

import duckdb

from embed_pipeline.cleaning.normalise import create_macros
from embed_pipeline.tables import PASSAGES_FILE, QRELS_FILE, QUERIES_FILE


def held_out_queries_among(trained: Path, cleaned: Path) -> list[str]:
    """query_ids of dev and test in `cleaned` (a cleaned_pairs folder) that `trained` (parquet with query_id) holds."""
    rows = duckdb.execute(
        "SELECT DISTINCT query_id FROM read_parquet($trained) SEMI JOIN "
        "(SELECT query_id FROM read_parquet($queries) WHERE split <> 'train') USING (query_id) ORDER BY query_id",
        {"trained": str(trained), "queries": str(cleaned / QUERIES_FILE)},
    ).fetchall()
    return [row[0] for row in rows]


def seen_in_training(trained: Path, trained_cleaned: Path, cleaned: Path) -> list[str]:
    """query_ids of `cleaned`'s test split that a model has seen, whichever split they stood in when it was trained.

    `trained` (parquet with query_id and positive_ids) is what the model was trained on, `trained_cleaned` the
    cleaned_pairs folder of that time, `cleaned` that of now. A test query is seen if it was trained on itself, or if a
    passage that answers it was a positive of another query; both by id and by text, where letter case, punctuation,
    spacing and, in questions, word order make no difference.
    """
    connection = duckdb.connect()
    create_macros(connection)
    rows = connection.execute(
        """WITH trained AS (SELECT query_id, unnest(positive_ids) AS passage_id FROM read_parquet($trained)),
        trained_queries AS (
            SELECT query_id, unnest(query_keys(folded(query))) AS key FROM read_parquet($old_queries) AS q
            SEMI JOIN trained USING (query_id)),
        trained_passages AS (
            SELECT passage_id, letters(folded(text)) AS text FROM read_parquet($old_passages) AS p
            SEMI JOIN trained USING (passage_id)),
        asked AS (
            SELECT query_id, unnest(query_keys(folded(query))) AS key FROM read_parquet($queries)
            WHERE split = 'test'),
        answers AS (
            SELECT query_id, passage_id, letters(folded(text)) AS text FROM read_parquet($qrels) AS j
            JOIN read_parquet($passages) AS p USING (passage_id) WHERE relevance > 0)
        SELECT DISTINCT query_id FROM asked WHERE query_id IN (SELECT query_id FROM trained_queries)
            OR key IN (SELECT key FROM trained_queries)
            OR query_id IN (
                SELECT query_id FROM answers WHERE passage_id IN (SELECT passage_id FROM trained_passages)
                    OR text IN (SELECT text FROM trained_passages))
        ORDER BY query_id""",
        {
            "trained": str(trained),
            "old_queries": str(trained_cleaned / QUERIES_FILE),
            "old_passages": str(trained_cleaned / PASSAGES_FILE),
            "queries": str(cleaned / QUERIES_FILE),
            "passages": str(cleaned / PASSAGES_FILE),
            "qrels": str(cleaned / QRELS_FILE),
        },
    ).fetchall()
    return [row[0] for row in rows]
