"""From raw rows to judgements between distinct queries and passages: everything that needs no split.

Each function takes the connection that `clean` works on and leaves tables in it:

    rows        one a raw row: normalised texts, split, and the hash of each text
    rejections  row, reason, detail; `live` is the view of the rows that are not in it
    mentions    every place where a live row names a passage, with its canonical `passage_id`
    spellings   query_id; folded, its words but for letter case, punctuation and width; letters, those without spaces
    stated      row, query_id, passage_id, negative_id (triplets), relevance, split, teacher_score: what every row that
                names a known query and passage says of them, rejected or not
    judgements  `stated` of the rows that were live, and the ids the row's own texts had before near-duplicates were
                merged; `judged` is the view of what stands, a row each judgement
    passages    passage_id, title, text; passage_clusters: passage_id -> cluster_id
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import duckdb
import pyarrow as pa

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.near_duplicates import near_duplicate_clusters
from embed_pipeline.errors import CleaningError
from embed_pipeline.settings import CleaningSettings, NearDuplicateSettings
from embed_pipeline.tables import SPLITS

Connection = duckdb.DuckDBPyConnection
SMALLEST_RELEVANCE = sys.float_info.min  # what is closer to 0 is a damaged number (whole ones, read as fractions)
MEMORY_LIMIT = "4GB"  # of DuckDB; beyond it, tables spill to the output's disk


def reject(connection: Connection, reason: str, found: str) -> None:
    """Drop the rows that the query `found` (columns row, detail) names, unless they have been dropped before."""
    connection.execute(
        f"""INSERT INTO rejections SELECT row, '{reason}', min(detail) FROM ({found})
            WHERE row NOT IN (SELECT row FROM rejections) GROUP BY row"""
    )


def refuse_empty(
    connection: Connection,
    settings: CleaningSettings,
    expected: Sequence[str],
    *,
    left_in: str,
    what: str,
    known: Mapping[str, str],
) -> None:
    """Nothing may be empty of train, nor of those of dev and test `expected` that are wanted or were delivered.

    `left_in` is the table of what is left, `known` what each reason means. Raises CleaningError.
    """
    left = {row[0] for row in connection.execute(f"SELECT DISTINCT split FROM {left_in}").fetchall()}
    wanted = {"train", *(s for s in ("dev", "test") if s in expected and getattr(settings.split, s) > 0)}
    empty = [split for split in SPLITS if split in wanted - left]
    if not empty:
        return
    total = connection.execute("SELECT count(*) FROM rows").fetchall()[0][0]
    told, fix = "", "Deliver more rows, mend the column mapping, or relax `cleaning`"
    if connection.execute("SELECT count(*) FROM raw WHERE is_drawn(split)").fetchall()[0][0]:
        asked = "SELECT split, count(*) FROM rows WHERE kind NOT IN ('passage', 'query') GROUP BY split"
        counts: dict[str, int] = dict(connection.execute(asked).fetchall())
        told = f" Delivered: {', '.join(f'{counts.get(split, 0)} as {split}' for split in SPLITS)}."
        if any(not counts.get(split) for split in empty):
            fix = (
                f"Deliver rows of {' and '.join(empty)}, or remove the split column from the files, so that "
                "`cleaning.split` cuts the splits"
            )
    raise CleaningError(
        f"no {what} is left in {' and '.join(empty)} after cleaning {total} rows.{told} "
        f"Rejected: {rejections_told(connection, known) or 'none'}. {fix}"
    )


def rejections_told(connection: Connection, known: Mapping[str, str]) -> str:
    """The most frequent reasons with their counts, what they mean (`known`) and the first row; "" if none."""
    counts = connection.execute(
        """SELECT reason, count(*) AS n, arg_min(source || ' row ' || row_number || coalesce(': ' || detail, ''), row)
           FROM rejections JOIN rows USING (row) GROUP BY reason ORDER BY n DESC, reason LIMIT 4"""
    ).fetchall()
    return "; ".join(f"{n} {reason} ({known[reason]}; the first is {first})" for reason, n, first in counts)


def load_rows(connection: Connection) -> None:
    """Normalise the view `raw`. Texts and ids in which nothing is drawn become null."""
    connection.execute(
        """
        CREATE TABLE rows AS
        SELECT *, 'q-' || short_hash(query) AS query_hash,
            'p-' || short_hash(passage_text(title, passage)) AS passage_hash,
            'p-' || short_hash(negative) AS negative_hash
        FROM (
            SELECT row, source, row_number, kind, named(query_id) AS query_id, one_line(query) AS query,
                named(passage_id) AS passage_id, one_line(title) AS title, lines(passage) AS passage,
                lines(negative) AS negative, relevance,
                CASE WHEN isfinite(teacher_score) THEN teacher_score END AS teacher_score,
                named(document_id) AS document_id, told_split AS split,
                query_missing, passage_missing, negative_missing
            FROM raw
        )
        """
    )
    connection.execute("CREATE TABLE rejections (row BIGINT, reason VARCHAR, detail VARCHAR)")
    connection.execute("CREATE VIEW live AS SELECT * FROM rows WHERE row NOT IN (SELECT row FROM rejections)")


def reject_bad_rows(connection: Connection, settings: CleaningSettings) -> None:
    """Everything that can be seen on a single row."""
    judged = "kind IN ('pair', 'triplet')"
    reject(
        connection,
        reasons.MISSING_ID,
        # An extra corpus may have no ids at all; a corpus with ids has one for every row.
        """SELECT row, 'no ' || CASE WHEN kind = 'query' OR (kind = 'judgement' AND query_id IS NULL) THEN 'query_id'
                ELSE 'passage_id' END AS detail
           FROM live JOIN (SELECT source, count(passage_id) > 0 AS with_ids FROM rows GROUP BY source) USING (source)
           WHERE (kind = 'judgement' AND (query_id IS NULL OR passage_id IS NULL))
              OR (kind = 'query' AND query_id IS NULL) OR (kind = 'passage' AND passage_id IS NULL AND with_ids)""",
    )
    asked = f"({judged} OR kind = 'query')"
    answering = f"({judged} OR kind = 'passage')"
    reject(
        connection,
        reasons.MISSING_TEXT,
        " UNION ALL ".join(
            f"SELECT row, '{text} \"' || {text}_missing || '\"' AS detail FROM live "
            f"WHERE {where} AND {text}_missing IS NOT NULL"
            for text, where in (("query", asked), ("passage", answering), ("negative", "kind = 'triplet'"))
        ),
    )
    reject(connection, reasons.EMPTY_QUERY, f"SELECT row, NULL AS detail FROM live WHERE {asked} AND query IS NULL")
    for text, few, many, smallest, largest in (
        ("query", reasons.QUERY_TOO_SHORT, reasons.QUERY_TOO_LONG, *_limits(settings, "query")),
        ("passage", reasons.PASSAGE_TOO_SHORT, reasons.PASSAGE_TOO_LONG, *_limits(settings, "passage")),
    ):
        if text == "passage":
            reject(
                connection,
                reasons.EMPTY_PASSAGE,
                f"""SELECT row, CASE WHEN passage IS NOT NULL THEN 'negative' END AS detail FROM live
                    WHERE {answering} AND passage IS NULL
                       OR kind = 'triplet' AND negative IS NULL""",
            )
        columns = [text, "negative"] if text == "passage" else [text]
        for reason, wrong in ((few, f"< {smallest}"), (many, f"> {largest}")):
            checks = " UNION ALL ".join(
                f"SELECT row, '{column}: ' || length({column}) || ' characters' AS detail FROM live "
                f"WHERE length({column}) {wrong}"
                for column in columns
            )
            reject(connection, reason, checks)
    reject(
        connection,
        reasons.QUERY_EQUALS_PASSAGE,
        f"""SELECT row, NULL AS detail FROM live
            WHERE {judged} AND lower(drawn(query)) = lower(drawn(replace(passage, chr(10), ' ')))""",
    )
    reject(
        connection,
        reasons.INVALID_RELEVANCE,
        # Pairs may come without relevance; a file that gives it gives it for every row.
        f"""SELECT row, 'relevance ' || coalesce(relevance::VARCHAR, 'null') AS detail
           FROM live JOIN (SELECT source, count(relevance) > 0 AS graded FROM rows GROUP BY source) USING (source)
           WHERE kind IN ('pair', 'judgement') AND (isnan(relevance) OR isinf(relevance)
              OR relevance <> 0 AND abs(relevance) < {SMALLEST_RELEVANCE}
              OR relevance IS NULL AND (graded OR kind = 'judgement'))""",
    )


def _limits(settings: CleaningSettings, text: str) -> tuple[int, int]:
    return getattr(settings, f"{text}_min_characters"), getattr(settings, f"{text}_max_characters")


def unite_texts(connection: Connection) -> None:
    """One id a text. A delivered id stands (the smallest, where a text has several), otherwise the text's hash."""
    for what, kinds in (("query", "('query', 'pair', 'triplet')"), ("passage", "('passage', 'pair', 'triplet')")):
        reject(
            connection,
            reasons.DUPLICATE_ID,
            f"""SELECT row, '{what}_id ' || {what}_id || ' stands for another text since ' || first_source
                    || ' row ' || first_row AS detail
                FROM live JOIN (
                    SELECT {what}_id, arg_min({what}_hash, seen) AS hash, arg_min(source, seen) AS first_source,
                        arg_min(row_number, seen) AS first_row
                    FROM (SELECT *, (kind <> '{what}', row) AS seen FROM live)
                    WHERE kind IN {kinds} AND {what}_id IS NOT NULL GROUP BY {what}_id
                ) USING ({what}_id)
                WHERE kind IN {kinds} AND {what}_hash <> hash""",
        )
        connection.execute(
            f"""CREATE TABLE {what}_names AS
                SELECT {what}_hash AS hash,
                    coalesce(min({what}_id) FILTER (kind = '{what}'), min({what}_id), {what}_hash) AS id
                FROM live WHERE kind IN {kinds} GROUP BY {what}_hash"""
        )
    connection.execute(
        "INSERT INTO passage_names SELECT DISTINCT negative_hash, negative_hash FROM live "
        "WHERE kind = 'triplet' AND negative_hash NOT IN (SELECT hash FROM passage_names)"
    )
    connection.execute(
        """CREATE TABLE mentions AS
           SELECT row, kind, coalesce(l.passage_id, id) AS own_id, id AS passage_id, title, passage AS text, document_id
           FROM live l JOIN passage_names ON hash = passage_hash WHERE kind IN ('passage', 'pair', 'triplet')
           UNION ALL SELECT row, 'negative', id, id, NULL, negative, NULL
           FROM live JOIN passage_names ON hash = negative_hash WHERE kind = 'triplet'"""
    )
    connection.execute(
        """CREATE TABLE asked AS SELECT row, kind, coalesce(query_id, id) AS own_id, id AS query_id, query
           FROM live l JOIN query_names ON hash = query_hash WHERE kind IN ('query', 'pair', 'triplet')"""
    )
    connection.execute(
        """CREATE TABLE spellings AS SELECT query_id, folded, letters(folded) AS letters
           FROM (SELECT query_id, folded(min(query)) AS folded FROM asked GROUP BY query_id)"""
    )


def resolve_judgements(connection: Connection) -> None:
    """Rows that say the same record twice, or judge what is not there, go; what is left becomes `judgements`."""
    for what, reason, named in (
        ("query", reasons.DUPLICATE_QUERY, "asked"),
        ("passage", reasons.DUPLICATE_PASSAGE, "mentions"),
    ):
        reject(
            connection,
            reason,
            f"""SELECT row, 'same text as {what} ' || {what}_id AS detail FROM {named} WHERE kind = '{what}'
                QUALIFY row_number() OVER (PARTITION BY {what}_id ORDER BY own_id <> {what}_id, row) > 1""",
        )
    unknown: tuple[tuple[Literal["query", "passage"], str, str], ...] = (
        ("query", reasons.UNKNOWN_QUERY, "asked"),
        ("passage", reasons.UNKNOWN_PASSAGE, "mentions"),
    )
    for text, reason, named in unknown:
        connection.execute(f"CREATE TABLE {text}_ids AS SELECT DISTINCT own_id, {text}_id AS id FROM {named}")
        reject(connection, reason, _unknown_ids(connection, text))
    connection.execute(
        """CREATE VIEW stated AS
           SELECT row, q.id AS query_id, p.id AS passage_id, n.id AS negative_id,
               CASE WHEN coalesce(relevance, 1.0) > 0 THEN coalesce(relevance, 1.0) ELSE 0.0 END AS relevance, split,
               teacher_score
           FROM rows r JOIN query_names q ON q.hash = query_hash JOIN passage_names p ON p.hash = passage_hash
           LEFT JOIN passage_names n ON n.hash = negative_hash WHERE kind IN ('pair', 'triplet')
           UNION ALL
           SELECT row, q.id, p.id, NULL, greatest(relevance, 0.0), split, teacher_score
           FROM rows r JOIN query_ids q ON q.own_id = r.query_id JOIN passage_ids p ON p.own_id = r.passage_id
           WHERE kind = 'judgement'"""
    )
    connection.execute(
        """CREATE TABLE judgements AS SELECT *, passage_id AS own_passage_id, negative_id AS own_negative_id
           FROM stated WHERE row NOT IN (SELECT row FROM rejections)"""
    )
    connection.execute(
        """CREATE VIEW judged AS
           WITH standing AS (SELECT * FROM judgements WHERE row NOT IN (SELECT row FROM rejections))
           SELECT row, query_id, passage_id, relevance, split, teacher_score FROM standing
           UNION ALL SELECT row, query_id, negative_id, 0.0, split, NULL FROM standing WHERE negative_id IS NOT NULL"""
    )


def _unknown_ids(connection: Connection, what: Literal["query", "passage"]) -> str:
    """Judgements of ids that are nowhere (or whose text was dropped), each beside an id that is there and like it.

    Ids are alike without letter case, zeros in front, a `.0` behind, and whatever is neither letter nor digit.
    """
    unknown = f"""SELECT row, {what}_id AS id FROM live
        WHERE kind = 'judgement' AND {what}_id NOT IN (SELECT own_id FROM {what}_ids)"""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE unknown AS {unknown}")
    if not connection.execute("SELECT count(*) FROM unknown").fetchall()[0][0]:
        return "SELECT row, NULL AS detail FROM unknown"
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE there AS SELECT {what}_id AS id, min(source || ' row ' || row_number) AS place
            FROM rows WHERE kind IN ('{what}', 'pair', 'triplet') AND {what}_id IS NOT NULL GROUP BY id"""
    )
    return f"""
        WITH alike AS (SELECT id_key(id) AS key, min(id) AS near, arg_min(place, id) AS place FROM there GROUP BY key)
        SELECT row, '{what}_id ' || CASE
            WHEN id IN (SELECT id FROM there) THEN id
            WHEN near IS NOT NULL THEN side_by_side(id, near) || ' (' || place || ')'
            ELSE coalesce(side_by_side(id, (SELECT min(id) FROM there)), id) END AS detail
        FROM unknown LEFT JOIN alike ON id_key(unknown.id) = key"""


def reject_contradictions(connection: Connection, same: Literal["query_id", "letters"], differ: str) -> None:
    """Judgements of one passage and one query (`same` text, or any spelling): where they `differ` (SQL) all go."""
    reject(
        connection,
        reasons.CONTRADICTION,
        f"""WITH spelled AS (SELECT * FROM judged JOIN spellings USING (query_id))
            SELECT row, 'query ' || query_id || ' and passage ' || passage_id || ' are judged ' || grades AS detail
            FROM spelled JOIN (
                SELECT {same}, passage_id, array_to_string(list_sort(list(DISTINCT relevance)), ' and ') AS grades
                FROM spelled GROUP BY ALL HAVING {differ}
            ) USING ({same}, passage_id)""",
    )


def reject_duplicates(connection: Connection) -> None:
    """Of judgements of one query and passage in one split, the best stays; a copy in another split is a leak."""
    reject(
        connection,
        reasons.DUPLICATE,
        """SELECT row, 'query ' || query_id || ' and passage ' || passage_id AS detail FROM judgements
           WHERE row NOT IN (SELECT row FROM rejections)
           QUALIFY row_number() OVER (
               PARTITION BY query_id, passage_id, negative_id, split
               ORDER BY relevance DESC, teacher_score IS NULL, row) > 1""",
    )


def find_near_duplicates(connection: Connection, settings: NearDuplicateSettings) -> None:
    """Cluster the passages; where they merge, the longest text (then the smallest id) stands for its cluster."""
    connection.execute(
        """CREATE TABLE passages AS
           SELECT passage_id, arg_min(title, (kind <> 'passage', row)) AS title,
               arg_min(text, (kind <> 'passage', row)) AS text
           FROM mentions WHERE row NOT IN (SELECT row FROM rejections) GROUP BY passage_id"""
    )
    ordered = connection.sql(
        "SELECT passage_id, passage_text(title, text) AS text FROM passages ORDER BY length(text) DESC, passage_id"
    ).to_arrow_table()
    ids = ordered["passage_id"].combine_chunks()
    # Labels are the lowest index in a cluster: in this order, the passage that stands for it.
    labels = near_duplicate_clusters(ordered["text"].to_pylist(), settings)
    clusters = pa.table({"passage_id": ids, "cluster_id": ids.take(pa.array(labels))})
    connection.register("found_clusters", clusters)
    connection.execute("CREATE TABLE passage_clusters AS SELECT * FROM found_clusters")
    connection.unregister("found_clusters")
    # All documents that a text was delivered with link it, not only the one it is listed under.
    # A row that was dropped for its query says no less where its passage comes from.
    connection.execute(
        f"""CREATE VIEW stands_for AS
            SELECT passage_id, {"cluster_id" if settings.action == "merge" else "passage_id"} AS standing_id
            FROM passage_clusters"""
    )
    connection.execute(
        """CREATE TABLE passage_documents AS SELECT DISTINCT standing_id AS passage_id, document_id
           FROM rows JOIN passage_names ON hash = passage_hash JOIN stands_for ON stands_for.passage_id = id
           WHERE document_id IS NOT NULL AND kind IN ('passage', 'pair', 'triplet')"""
    )


def merge_near_duplicates(connection: Connection) -> None:
    """Judgements move to the passage that stands for the cluster; corpus rows that gave way are rejected."""
    for column in ("passage_id", "negative_id"):
        connection.execute(
            f"""UPDATE judgements SET {column} = cluster_id FROM passage_clusters c
                WHERE c.passage_id = judgements.{column} AND c.cluster_id <> c.passage_id"""
        )
    reject(
        connection,
        reasons.NEAR_DUPLICATE_PASSAGE,
        """SELECT row, 'near-duplicate of passage ' || cluster_id AS detail
           FROM mentions JOIN passage_clusters USING (passage_id)
           WHERE kind = 'passage' AND cluster_id <> passage_id""",
    )


def reject_queries_without_positive(connection: Connection) -> None:
    """A query that nothing answers goes, and with it what it was judged not to be answered by."""
    reject(
        connection,
        reasons.QUERY_WITHOUT_POSITIVE,
        """WITH answered AS (SELECT query_id FROM judged WHERE relevance > 0)
           SELECT row, 'query ' || query_id AS detail FROM judged WHERE query_id NOT IN (SELECT * FROM answered)
           UNION ALL
           SELECT row, 'query ' || query_id FROM asked
           WHERE kind = 'query' AND query_id NOT IN (SELECT * FROM answered)""",
    )
