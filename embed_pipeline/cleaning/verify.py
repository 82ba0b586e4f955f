"""The promises of the cleaned tables, checked on what was written."""

from __future__ import annotations

from pathlib import Path

import duckdb

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.normalise import create_macros
from embed_pipeline.tables import MERGED_FILE, PASSAGES_FILE, QRELS_FILE, QUERIES_FILE, REJECTED_FILE, SPLITS

_TABLES = {
    "queries": QUERIES_FILE,
    "passages": PASSAGES_FILE,
    "qrels": QRELS_FILE,
    "rejected": REJECTED_FILE,
    "merged": MERGED_FILE,
}
_SPLIT_LINKS = """
    SELECT split, 'query' AS what, query_key(query) AS key FROM queries
    UNION ALL SELECT split, 'group', group_id FROM queries
    UNION ALL SELECT split, 'passage', passage_id FROM positives
    UNION ALL SELECT split, 'document', document_id FROM positives WHERE document_id IS NOT NULL
    UNION ALL SELECT split, 'cluster', cluster_id FROM positives
"""
# What is promised -> a query for what breaks it, one text column.
_PROMISES = {
    "a query_id stands once": "SELECT query_id FROM queries GROUP BY query_id HAVING count(*) > 1",
    "a passage_id stands once": "SELECT passage_id FROM passages GROUP BY passage_id HAVING count(*) > 1",
    "a query and passage are judged once": (
        "SELECT query_id || ' / ' || passage_id FROM qrels GROUP BY query_id, passage_id HAVING count(*) > 1"
    ),
    "a judgement's query stands in queries": "SELECT query_id FROM qrels ANTI JOIN queries USING (query_id)",
    "a judgement's passage stands in passages": "SELECT passage_id FROM qrels ANTI JOIN passages USING (passage_id)",
    "a query has a positive": "SELECT query_id FROM queries ANTI JOIN positives USING (query_id)",
    "a relevance is a number from 0": "SELECT query_id FROM qrels WHERE NOT (relevance >= 0 AND isfinite(relevance))",
    "a split is train, dev or test": f"SELECT split FROM queries WHERE split NOT IN {SPLITS}",
    "no query, document, cluster or group stands in two splits": (
        f"SELECT what || ' ' || key FROM ({_SPLIT_LINKS}) GROUP BY what, key HAVING count(DISTINCT split) > 1"
    ),
    "a reason is a known one": f"SELECT reason FROM rejected WHERE reason NOT IN {tuple(reasons.REASONS)}",
    "a row is rejected once": (
        "SELECT source || ' row ' || row_number FROM rejected GROUP BY source, row_number HAVING count(*) > 1"
    ),
    "a merged row is a kept row": (
        "SELECT source || ' row ' || row_number FROM merged SEMI JOIN rejected USING (source, row_number)"
    ),
    "a merged row's passage stands": (
        "SELECT merged_into FROM merged ANTI JOIN passages ON passages.passage_id = merged.merged_into"
    ),
}
_KEPT = """
    SELECT *, one_line(query) AS asked, passage_text(one_line(title), lines(passage)) AS told
    FROM raw ANTI JOIN rejected USING (source, row_number)
"""
_PROMISES_TO_RAW = {
    "a rejected row is a raw row": (
        "SELECT source || ' row ' || row_number FROM rejected ANTI JOIN raw USING (source, row_number)"
    ),
    "a kept row's query stands in queries": (
        f"""SELECT source || ' row ' || row_number FROM ({_KEPT}) kept
            ANTI JOIN queries ON queries.query = kept.asked WHERE kind IN ('pair', 'triplet', 'query')"""
    ),
    "a kept row's passage stands in passages, or gave way to one": (
        f"""SELECT source || ' row ' || row_number FROM ({_KEPT}) kept
            ANTI JOIN (SELECT passage_text(title, text) AS told FROM passages) USING (told)
            ANTI JOIN merged USING (source, row_number) WHERE kind IN ('pair', 'triplet', 'passage')"""
    ),
}
SHOWN = 3


def verify(folder: Path, raw_file: Path | None = None) -> list[str]:
    """Violations found in the tables that `clean` wrote to `folder`, a sentence each; empty when every promise holds.

    Checked: ids are unique, judgements resolve, every query has a positive, no query (case, punctuation and word order
    aside), document, near-duplicate cluster or group stands in two splits, no row is rejected twice. With `raw_file`
    also that every raw row is either rejected or found again in the tables.
    """
    with duckdb.connect() as connection:
        create_macros(connection)
        for table, name in _TABLES.items():
            connection.execute(f"CREATE VIEW {table} AS SELECT * FROM read_parquet('{_quoted(folder / name)}')")
        connection.execute(
            "CREATE VIEW positives AS SELECT query_id, split, passage_id, document_id, cluster_id FROM qrels "
            "JOIN queries USING (query_id) JOIN passages USING (passage_id) WHERE relevance > 0"
        )
        promises = dict(_PROMISES)
        if raw_file is not None:
            connection.execute(f"CREATE VIEW raw AS SELECT * FROM read_parquet('{_quoted(raw_file)}')")
            promises |= _PROMISES_TO_RAW
        found = [(promise, connection.execute(query).fetchall()) for promise, query in promises.items()]
    return [f"{promise}: broken {len(rows)} time(s), e.g. {_examples(rows)}" for promise, rows in found if rows]


def _examples(rows: list[tuple[str, ...]]) -> str:
    return ", ".join(sorted(str(row[0]) for row in rows)[:SHOWN])


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
