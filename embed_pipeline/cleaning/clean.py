"""Raw rows -> queries, passages and judgements in splits that share nothing, and every dropped row with its reason."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
from pydantic import BaseModel

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.answers import Answers, look_for_answers, refuse_missing
from embed_pipeline.cleaning.elsewhere import CleanedSource, reject_elsewhere
from embed_pipeline.cleaning.normalise import create_macros
from embed_pipeline.cleaning.overlap import reject_overlaps
from embed_pipeline.cleaning.raw_rows import read_as_missing, split_values, view_raw_rows
from embed_pipeline.cleaning.rows import (
    MEMORY_LIMIT,
    find_near_duplicates,
    load_rows,
    merge_near_duplicates,
    refuse_empty,
    reject_bad_rows,
    reject_contradictions,
    reject_duplicates,
    reject_queries_without_positive,
    resolve_judgements,
    unite_texts,
)
from embed_pipeline.cleaning.splits import create_links, cut_missing_splits, group_queries, remove_split_leaks
from embed_pipeline.errors import CleaningError
from embed_pipeline.settings import CleaningSettings
from embed_pipeline.tables import (
    MERGED,
    MERGED_FILE,
    PASSAGES,
    PASSAGES_FILE,
    QRELS,
    QRELS_FILE,
    QUERIES,
    QUERIES_FILE,
    REJECTED,
    REJECTED_FILE,
    SPLITS,
    WITHHELD,
    WITHHELD_FILE,
    connect,
    write_stream,
)

BATCH_ROWS = 20_000

# Rows dropped for these say nothing against their passages, which stay in the corpus.
_LEAKS = (reasons.SPLIT_LEAK, reasons.OVERLAP_LEAK, reasons.HELD_OUT_ELSEWHERE, reasons.TRAINED_ON_ELSEWHERE)

_POSITIVES_WITH_THEIR_QUERY = """
    WITH asked AS (SELECT query_id, array_to_string(words(query), ' ') AS query FROM out_queries),
    told AS (
        SELECT passage_id, ' ' || array_to_string(words(passage_text(title, text)), ' ') || ' ' AS passage
        FROM out_passages SEMI JOIN (SELECT passage_id FROM out_qrels WHERE relevance > 0) USING (passage_id)
    )
    SELECT count(*) FROM out_qrels JOIN asked USING (query_id) JOIN told USING (passage_id)
    WHERE relevance > 0 AND query <> '' AND contains(passage, ' ' || query || ' ')"""


class CleaningReport(BaseModel):
    """What became of the raw rows. `raw_rows` = `kept_rows` + `rejected_rows`."""

    raw_rows: int
    raw_rows_by_kind: dict[str, int]
    kept_rows: int
    rejected_rows: int
    rejected_by_reason: dict[str, int]  # in the order of reasons.REASONS
    queries_by_split: dict[str, int]
    positives_by_split: dict[str, int]
    judgements_by_split: dict[str, int]  # positives, and what was judged as not relevant
    answers_by_split: dict[str, Answers]  # as delivered: how many are there, and how many are missing
    positives_with_their_query: int  # title or text holds the query's words as they are: nothing is easier to find
    passages: int
    judged_passages: int
    withheld_pairs: int  # called relevant by a rejected row or for another spelling, query and passage both kept
    near_duplicate_clusters: int  # of two passages or more
    near_duplicate_passages: int  # in these clusters
    merged_rows: int  # kept rows whose passage gave way to a near-duplicate
    groups: int
    largest_group: int  # queries
    delivered_splits: list[str]  # splits that came with the rows; the others were cut from train
    split_values: dict[str, dict[str, int]]  # split -> what it is called in the delivery -> rows
    read_as_missing: dict[str, dict[str, int]]  # column -> text that stands for a missing one -> rows
    split_leaks: int
    overlap_leaks: int
    elsewhere_leaks: int  # rows that another source of the pipeline holds out, or trains on


def clean(
    raw_file: Path, settings: CleaningSettings, seed: int, out: Path, *, before: Sequence[CleanedSource] = ()
) -> CleaningReport:
    """Clean `raw_file` (schema `tables.RAW`) into the parquet tables of cleaned_pairs in `out` (see `tables`).

    The same rows, settings and seed give the same bytes. A row is kept when its judgement (pair, triplet, judgement),
    its passage or its query stands in the tables; otherwise it is in `rejected` with the first of `reasons.REASONS`
    that applies. All clean corpus passages stay, asked for or not, and so does a passage whose judgements were
    dropped as leaks: it is part of what has to be searched.

    What a rejected row calls relevant stays known where its query stands by other rows and its passage is kept: such
    pairs are `withheld`, so that nothing takes them for negatives. No measurement counts them as answers: a dev query
    whose positive was dropped as a leak is asked over a corpus in which that passage is unjudged.

    What is known of a query is known of its other spellings (letter case, punctuation, width, spaces), which stay
    queries of their own. They stand in one split, and so do queries of the same words in another order.

    `before`: sources that were cleaned before; nothing that one of them trains on is held out here, and the other way
    round. That may leave dev or test without a query.

    Raises CleaningError where nothing is left of a split, too many of its answers are missing, or the splits cannot be
    kept apart.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".cleaning-") as work:
        connection = connect(
            str(Path(work) / "work.duckdb"), config={"memory_limit": MEMORY_LIMIT, "temp_directory": work}
        )
        with connection:
            create_macros(connection)
            refuse_left_empty = partial(
                refuse_empty,
                connection,
                settings,
                left_in="judged",
                what="query",
                known=reasons.REASONS,
            )
            view_raw_rows(connection, raw_file, settings.missing_texts)
            delivered, missing = split_values(connection), read_as_missing(connection)
            load_rows(connection)
            reject_bad_rows(connection, settings)
            unite_texts(connection)
            resolve_judgements(connection)
            answers = look_for_answers(connection)
            refuse_missing(connection, answers, settings)
            reject_contradictions(connection, "query_id", "count(DISTINCT relevance) > 1")
            reject_duplicates(connection)
            find_near_duplicates(connection, settings.near_duplicates)
            if settings.near_duplicates.action == "merge":
                merge_near_duplicates(connection)
            # Near-duplicates and spellings may differ in grade, not in whether they answer.
            reject_contradictions(connection, "letters", "min(relevance) = 0 AND max(relevance) > 0")
            reject_duplicates(connection)
            reject_queries_without_positive(connection)
            create_links(connection)
            remove_split_leaks(connection)
            refuse_left_empty([*delivered])
            cut_missing_splits(connection, settings.split, seed)
            reject_overlaps(connection, settings.split)
            reject_queries_without_positive(connection)
            refuse_left_empty([*SPLITS])
            if before:
                reject_elsewhere(connection, before)
                reject_queries_without_positive(connection)
                refuse_left_empty([])
            group_queries(connection)
            _create_results(connection)
            _check_accounting(connection)
            _write(connection, out)
            return _report(connection, delivered, missing, answers)


def _create_results(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute(
        """CREATE TABLE out_queries AS
           SELECT query_id, min(query) AS query, min(split) AS split, min(group_id) AS group_id
           FROM (SELECT DISTINCT query_id, split FROM judged) JOIN query_groups USING (query_id)
           JOIN (SELECT query_id, arg_min(query, row) AS query FROM asked GROUP BY query_id) USING (query_id)
           GROUP BY query_id"""
    )
    connection.execute(
        """CREATE TABLE out_qrels AS
           SELECT query_id, passage_id, max(relevance) AS relevance,
               arg_max(teacher_score, (relevance, -row)) AS teacher_score
           FROM judged GROUP BY query_id, passage_id"""
    )
    connection.execute(
        f"""CREATE TABLE out_passages AS
            SELECT passage_id, title, text, document_id, cluster_id
            FROM passages JOIN passage_clusters USING (passage_id)
            LEFT JOIN (SELECT passage_id, min(document_id) AS document_id FROM passage_documents GROUP BY passage_id)
                USING (passage_id)
            WHERE passage_id IN (
                SELECT passage_id FROM out_qrels
                UNION ALL SELECT passage_id FROM mentions SEMI JOIN live USING (row) WHERE kind = 'passage'
                UNION ALL SELECT unnest([passage_id, negative_id]) FROM judgements JOIN rejections USING (row)
                WHERE reason IN {_LEAKS}
            )"""
    )
    connection.execute(
        # DuckDB holds NaN for the greatest number: what is not finite says nothing.
        """CREATE TABLE out_withheld AS
           SELECT DISTINCT query_id, passage_id FROM (
               SELECT letters, standing_id AS passage_id
               FROM stated JOIN stands_for USING (passage_id) JOIN spellings USING (query_id)
               WHERE relevance > 0 AND isfinite(relevance)
           ) JOIN spellings USING (letters)
           SEMI JOIN out_queries USING (query_id) SEMI JOIN out_passages USING (passage_id)
           ANTI JOIN out_qrels USING (query_id, passage_id)"""
    )
    connection.execute(
        """CREATE TABLE out_rejected AS SELECT source, row_number, rows.kind, reason, detail, query, passage
           FROM rejections JOIN rows USING (row)"""
    )
    connection.execute(
        """CREATE TABLE out_merged AS
           WITH moved AS (
               SELECT row, own_passage_id AS own_id, passage_id AS merged_into FROM judgements
               UNION ALL SELECT row, own_negative_id, negative_id FROM judgements
           )
           SELECT source, row_number, own_id AS passage_id, merged_into, passages.text AS passage
           FROM moved JOIN live USING (row) JOIN passages ON passages.passage_id = own_id WHERE own_id <> merged_into"""
    )


def _check_accounting(connection: duckdb.DuckDBPyConnection) -> None:
    """Every row is rejected once, or stands in the results: a failure here is our mistake, and nothing is written."""
    stands = connection.execute(
        """SELECT count(*) FROM live
           LEFT JOIN judgements j USING (row) LEFT JOIN out_qrels r ON r.query_id = j.query_id
               AND r.passage_id = j.passage_id
           LEFT JOIN (SELECT DISTINCT row, passage_id FROM mentions WHERE kind = 'passage') m USING (row)
           LEFT JOIN out_passages p ON p.passage_id = m.passage_id
           LEFT JOIN (SELECT row, query_id FROM asked WHERE kind = 'query') a USING (row)
           LEFT JOIN out_queries q ON q.query_id = a.query_id
           WHERE CASE kind WHEN 'passage' THEN p.passage_id IS NOT NULL WHEN 'query' THEN q.query_id IS NOT NULL
               ELSE r.relevance IS NOT NULL END"""
    ).fetchall()[0][0]
    rejected, distinct = connection.execute("SELECT count(*), count(DISTINCT row) FROM rejections").fetchall()[0]
    raw = connection.execute("SELECT count(*) FROM rows").fetchall()[0][0]
    if rejected != distinct or raw != stands + rejected:
        raise CleaningError(
            f"accounting does not add up: {raw} raw rows, {stands} kept, {rejected} rejections of {distinct} rows. "
            "This is a mistake in embed_pipeline, not in the data; please report it"
        )


def _write(connection: duckdb.DuckDBPyConnection, out: Path) -> None:
    for table, schema, name, order in (
        ("out_queries", QUERIES, QUERIES_FILE, "query_id"),
        ("out_passages", PASSAGES, PASSAGES_FILE, "passage_id"),
        ("out_qrels", QRELS, QRELS_FILE, "query_id, passage_id"),
        ("out_withheld", WITHHELD, WITHHELD_FILE, "query_id, passage_id"),
        ("out_rejected", REJECTED, REJECTED_FILE, "source, row_number"),
        ("out_merged", MERGED, MERGED_FILE, "source, row_number, passage_id"),
    ):
        rows = connection.sql(f"SELECT * FROM {table} ORDER BY {order}").to_arrow_reader(BATCH_ROWS)
        write_stream(_batches(rows), schema, out / name)


def _batches(reader: pa.RecordBatchReader | None) -> pa.RecordBatchReader:
    assert reader is not None
    return reader


def _report(
    connection: duckdb.DuckDBPyConnection,
    delivered: dict[str, dict[str, int]],
    missing: dict[str, dict[str, int]],
    answers: dict[str, Answers],
) -> CleaningReport:
    def counts(query: str) -> dict[str, int]:
        return {str(name): int(count) for name, count in connection.execute(query).fetchall()}

    def one(query: str) -> int:
        return int(connection.execute(query).fetchall()[0][0])

    by_reason = counts("SELECT reason, count(*) FROM rejections GROUP BY reason")
    judgements = "SELECT split, count(*) FROM out_qrels JOIN out_queries USING (query_id)"
    clustered = "SELECT count(*) AS n FROM passage_clusters GROUP BY cluster_id HAVING n > 1"
    raw_rows, rejected_rows = one("SELECT count(*) FROM rows"), one("SELECT count(*) FROM rejections")
    return CleaningReport(
        raw_rows=raw_rows,
        raw_rows_by_kind=counts("SELECT kind, count(*) FROM rows GROUP BY kind ORDER BY kind"),
        kept_rows=raw_rows - rejected_rows,
        rejected_rows=rejected_rows,
        rejected_by_reason={reason: by_reason[reason] for reason in reasons.REASONS if reason in by_reason},
        queries_by_split=_in_order(counts("SELECT split, count(*) FROM out_queries GROUP BY split")),
        positives_by_split=_in_order(counts(f"{judgements} WHERE relevance > 0 GROUP BY split")),
        judgements_by_split=_in_order(counts(f"{judgements} GROUP BY split")),
        answers_by_split=answers,
        positives_with_their_query=one(_POSITIVES_WITH_THEIR_QUERY),
        passages=one("SELECT count(*) FROM out_passages"),
        judged_passages=one("SELECT count(DISTINCT passage_id) FROM out_qrels"),
        withheld_pairs=one("SELECT count(*) FROM out_withheld"),
        near_duplicate_clusters=one(f"SELECT count(*) FROM ({clustered})"),
        near_duplicate_passages=one(f"SELECT coalesce(sum(n), 0) FROM ({clustered})"),
        merged_rows=one("SELECT count(DISTINCT (source, row_number)) FROM out_merged"),
        groups=one("SELECT count(DISTINCT group_id) FROM out_queries"),
        largest_group=one("SELECT max(n) FROM (SELECT count(*) AS n FROM out_queries GROUP BY group_id)"),
        delivered_splits=[*delivered],
        split_values=delivered,
        read_as_missing=missing,
        split_leaks=by_reason.get(reasons.SPLIT_LEAK, 0),
        overlap_leaks=by_reason.get(reasons.OVERLAP_LEAK, 0),
        elsewhere_leaks=sum(by_reason.get(r, 0) for r in (reasons.HELD_OUT_ELSEWHERE, reasons.TRAINED_ON_ELSEWHERE)),
    )


def _in_order(by_split: dict[str, int]) -> dict[str, int]:
    return {split: by_split.get(split, 0) for split in SPLITS}
