"""Boilerplate that stands in two splits: long runs of words in common, where whole texts differ too much to cluster."""

from __future__ import annotations

import duckdb
from tqdm import tqdm

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.rows import reject
from embed_pipeline.settings import SplitSettings

# Pairs of equal runs that one query may bring together; bounds its memory whatever boilerplate there is.
PAIRS_AT_ONCE = 20_000_000


def reject_overlaps(connection: duckdb.DuckDBPyConnection, settings: SplitSettings) -> None:
    """Drop dev rows that repeat test's passages, then train rows that repeat dev's or test's.

    A row goes when its passage holds more than `max_overlap` of the runs of `overlap_tokens` words of one single
    passage that answers a query held out from it: the 13-gram rule of GPT-3 (arXiv 2005.14165, appendix C) as a share.
    Titles do not count: a boilerplate text under another title is still that text. Texts shorter than a run have none.
    """
    for split, held_out in (("dev", "('test')"), ("train", "('test', 'dev')")):
        _collect_runs(connection, "held_runs", f"split IN {held_out}", settings.overlap_tokens)
        _collect_runs(
            connection, "own_runs", f"split = '{split}'", settings.overlap_tokens, "SEMI JOIN held_runs USING (run)"
        )
        _compare(connection, settings.max_overlap)
        reject(
            connection,
            reasons.OVERLAP_LEAK,
            f"""SELECT row, 'passage ' || passage_id || ' holds ' || round(100 * share)::INTEGER || ' % of the '
                    || '{settings.overlap_tokens}-word runs of passage ' || held_id AS detail
                FROM judged JOIN found_overlaps USING (passage_id) WHERE split = '{split}' AND relevance > 0""",
        )
        for table in ("held_runs", "own_runs", "found_overlaps"):
            connection.execute(f"DROP TABLE {table}")


def _collect_runs(
    connection: duckdb.DuckDBPyConnection, table: str, where: str, tokens: int, narrowed: str = ""
) -> None:
    """Distinct hashed word runs of the passages that answer queries `where`: passage_id, run."""
    connection.execute(
        f"""CREATE TABLE {table} AS
            WITH hashed AS (
                SELECT passage_id, list_transform(words(text), lambda word: hash(word)) AS w FROM passages
                WHERE passage_id IN (SELECT passage_id FROM judged WHERE relevance > 0 AND {where})
            ), run AS (
                SELECT passage_id, w, unnest(range(1, len(w) - {tokens} + 2)) AS start FROM hashed
                WHERE len(w) >= {tokens}
            )
            SELECT DISTINCT passage_id, run
            FROM (SELECT passage_id, hash(w[start : start + {tokens} - 1]) AS run FROM run) {narrowed}"""
    )


def _compare(connection: duckdb.DuckDBPyConnection, max_overlap: float) -> None:
    """`found_overlaps`: passage_id (of `own_runs`), held_id, share, for every own passage above `max_overlap`.

    Held-out passages are taken in portions whose runs meet at most PAIRS_AT_ONCE own ones, and an own passage that was
    found is not looked at again: the answer is exact, and boilerplate that stands everywhere soon has few to meet.
    """
    connection.execute("CREATE TABLE found_overlaps (passage_id VARCHAR, held_id VARCHAR, share DOUBLE)")
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE portions AS
            WITH met AS (SELECT run, count(*) AS own FROM own_runs GROUP BY run),
            held AS (
                SELECT passage_id, count(*) AS runs, coalesce(sum(own), 0) AS pairs
                FROM held_runs LEFT JOIN met USING (run) GROUP BY passage_id
            )
            SELECT passage_id, runs,
                (sum(pairs) OVER (ORDER BY pairs DESC, passage_id) // {PAIRS_AT_ONCE})::BIGINT AS portion
            FROM held WHERE pairs > {max_overlap} * runs"""
    )
    portions = connection.execute("SELECT DISTINCT portion FROM portions ORDER BY portion").fetchall()
    for (portion,) in tqdm(portions, desc="overlap across splits", unit="portion", delay=5):
        connection.execute(
            f"""INSERT INTO found_overlaps
                SELECT passage_id, arg_max(held_id, (share, held_id)), max(share) FROM (
                    SELECT own_runs.passage_id, held_runs.passage_id AS held_id, count(*) / any_value(runs) AS share
                    FROM held_runs JOIN portions USING (passage_id) JOIN own_runs USING (run)
                    WHERE portion = $portion GROUP BY ALL HAVING count(*) > {max_overlap} * any_value(runs)
                ) GROUP BY passage_id""",
            {"portion": portion},
        )
        connection.execute("DELETE FROM own_runs WHERE passage_id IN (SELECT passage_id FROM found_overlaps)")
