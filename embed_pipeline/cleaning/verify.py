"""The promises of the cleaned tables, checked on what was written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.elsewhere import Apart
from embed_pipeline.cleaning.normalise import create_macros
from embed_pipeline.cleaning.raw_rows import view_raw_rows
from embed_pipeline.cleaning.rows import MEMORY_LIMIT
from embed_pipeline.settings import SourceSettings
from embed_pipeline.tables import (
    EXAMPLES_FILE,
    MERGED_FILE,
    PASSAGES_FILE,
    QRELS_FILE,
    QUERIES_FILE,
    REJECTED_EXAMPLES_FILE,
    REJECTED_FILE,
    SPLITS,
    WITHHELD_FILE,
    connect,
)

_TABLES = {
    "queries": QUERIES_FILE,
    "passages": PASSAGES_FILE,
    "qrels": QRELS_FILE,
    "withheld": WITHHELD_FILE,
    "rejected": REJECTED_FILE,
    "merged": MERGED_FILE,
}
_SPLIT_LINKS = """
    SELECT split, 'query' AS what, unnest(query_keys(folded(query))) AS key FROM queries
    UNION ALL SELECT split, 'group', group_id FROM queries
    UNION ALL SELECT split, 'passage', passage_id FROM positives
    UNION ALL SELECT split, 'document', document_id FROM positives WHERE document_id IS NOT NULL
    UNION ALL SELECT split, 'cluster', cluster_id FROM positives
"""
_SPELLINGS = "SELECT query_id, letters(folded(query)) AS letters FROM queries"
# What is promised -> a query for what breaks it, one text column.
_PROMISES = {
    "a query_id stands once": "SELECT query_id FROM queries GROUP BY query_id HAVING count(*) > 1",
    "a passage_id stands once": "SELECT passage_id FROM passages GROUP BY passage_id HAVING count(*) > 1",
    "a query and passage are judged once": (
        "SELECT query_id || ' / ' || passage_id FROM qrels GROUP BY query_id, passage_id HAVING count(*) > 1"
    ),
    "a judgement's query stands in queries": "SELECT query_id FROM qrels ANTI JOIN queries USING (query_id)",
    "a judgement's passage stands in passages": "SELECT passage_id FROM qrels ANTI JOIN passages USING (passage_id)",
    "a withheld query stands in queries": "SELECT query_id FROM withheld ANTI JOIN queries USING (query_id)",
    "a withheld passage stands in passages": "SELECT passage_id FROM withheld ANTI JOIN passages USING (passage_id)",
    "a withheld pair is not judged": (
        "SELECT query_id || ' / ' || passage_id FROM withheld SEMI JOIN qrels USING (query_id, passage_id)"
    ),
    "what answers a question is judged or withheld in all its spellings": (
        f"""SELECT other.query_id || ' / ' || passage_id FROM positives JOIN ({_SPELLINGS}) one USING (query_id)
            JOIN ({_SPELLINGS}) other USING (letters) ANTI JOIN qrels r ON r.query_id = other.query_id
            AND r.passage_id = positives.passage_id ANTI JOIN withheld w ON w.query_id = other.query_id
            AND w.passage_id = positives.passage_id"""
    ),
    "no spelling of a question is denied what answers another": (
        f"""SELECT letters || ' / ' || passage_id FROM qrels JOIN ({_SPELLINGS}) USING (query_id)
            GROUP BY letters, passage_id HAVING min(relevance) = 0 AND max(relevance) > 0"""
    ),
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
# The raw rows as cleaning reads them, and what became of each: found again by their texts and ids, with none of the
# tables that cleaning works on.
_FROM_RAW = {
    "delivered": """
        SELECT source, row_number, kind, reason, named(query_id) AS query_id, one_line(query) AS asked,
            named(passage_id) AS passage_id, passage_text(one_line(title), lines(passage)) AS told,
            lines(negative) AS refused, named(document_id) AS document_id,
            CASE WHEN kind = 'judgement' THEN relevance ELSE coalesce(relevance, 1.0) END AS relevance
        FROM raw LEFT JOIN (SELECT source, row_number, reason FROM rejected) USING (source, row_number)""",
    # A passage's own text, and the texts of what gave way to it. `merged` has it without the title that it may have in
    # another row; of a triplet's two texts, the one that is exactly it goes before the one that ends with it.
    "stands_for": f"""
        SELECT passage_text(title, text) AS told, passage_id AS standing_id FROM passages
        UNION SELECT told, merged_into FROM delivered JOIN merged USING (source, row_number)
        WHERE told IS NOT NULL AND (kind <> 'triplet' OR merged.passage = told
            OR ends_with(told, merged.passage) AND merged.passage <> refused)
        UNION SELECT refused, merged_into FROM delivered JOIN merged USING (source, row_number)
        WHERE merged.passage = refused OR ends_with(refused, merged.passage) AND merged.passage <> told
        UNION SELECT told, regexp_extract(detail, '^near-duplicate of passage (.*)$', 1, 's')
        FROM delivered JOIN rejected USING (source, row_number)
        WHERE delivered.reason = '{reasons.NEAR_DUPLICATE_PASSAGE}'""",
    "query_names": f"""
        SELECT DISTINCT d.query_id AS own_id, q.query_id AS standing_id FROM delivered d JOIN queries q ON query = asked
        WHERE d.query_id IS NOT NULL AND reason IS DISTINCT FROM '{reasons.DUPLICATE_ID}'""",
    "passage_names": f"""
        SELECT DISTINCT passage_id AS own_id, standing_id FROM delivered JOIN stands_for USING (told)
        WHERE passage_id IS NOT NULL AND reason IS DISTINCT FROM '{reasons.DUPLICATE_ID}'""",
    "said": """
        SELECT source, row_number, reason, 'positive' AS what, q.query_id, s.standing_id AS passage_id,
            greatest(relevance, 0.0) AS relevance
        FROM delivered JOIN queries q ON query = asked JOIN stands_for s USING (told) WHERE kind IN ('pair', 'triplet')
        UNION ALL
        SELECT source, row_number, reason, 'negative', q.query_id, s.standing_id, 0.0
        FROM delivered JOIN queries q ON query = asked JOIN stands_for s ON s.told = refused WHERE kind = 'triplet'
        UNION ALL
        SELECT source, row_number, reason, 'positive', q.standing_id, p.standing_id, greatest(relevance, 0.0)
        FROM delivered d JOIN query_names q ON q.own_id = d.query_id JOIN passage_names p ON p.own_id = d.passage_id
        WHERE kind = 'judgement'""",
    "documents": """
        SELECT DISTINCT standing_id AS passage_id, document_id FROM delivered JOIN stands_for USING (told)
        WHERE document_id IS NOT NULL""",
}
_ROW = "source || ' row ' || row_number"
_PROMISES_TO_RAW = {
    "a rejected row is a raw row": f"SELECT {_ROW} FROM rejected ANTI JOIN raw USING (source, row_number)",
    "a kept row's query stands in queries": (
        f"""SELECT {_ROW} FROM delivered ANTI JOIN queries ON query = asked
            WHERE reason IS NULL AND kind IN ('pair', 'triplet', 'query')"""
    ),
    "a kept row's passage stands in passages, or gave way to one": (
        f"""SELECT {_ROW} FROM delivered ANTI JOIN stands_for USING (told)
            WHERE reason IS NULL AND kind IN ('pair', 'triplet', 'passage')"""
    ),
    # The best grade stays where near-duplicates are merged.
    "a kept row's judgement stands in qrels": (
        f"""SELECT {_ROW} FROM (
                SELECT source, row_number, unnest(['positive', 'negative'][: if(kind = 'triplet', 2, 1)]) AS what
                FROM delivered WHERE reason IS NULL AND kind IN ('pair', 'triplet', 'judgement')
            ) ANTI JOIN (
                SELECT source, row_number, what FROM said JOIN qrels USING (query_id, passage_id)
                WHERE qrels.relevance >= said.relevance AND (qrels.relevance > 0) = (said.relevance > 0)
            ) USING (source, row_number, what)"""
    ),
    "a judgement in qrels was delivered": (
        """SELECT query_id || ' / ' || passage_id FROM qrels
           ANTI JOIN (SELECT * FROM said WHERE reason IS NULL) USING (query_id, passage_id, relevance)"""
    ),
    "what any row calls relevant is judged or withheld": (
        f"""SELECT {_ROW} FROM said ANTI JOIN qrels USING (query_id, passage_id)
            ANTI JOIN withheld USING (query_id, passage_id) WHERE relevance > 0 AND isfinite(relevance)"""
    ),
    "no delivered document stands in two splits": (
        """SELECT documents.document_id FROM documents JOIN positives USING (passage_id)
           GROUP BY documents.document_id HAVING count(DISTINCT split) > 1"""
    ),
}
SHOWN = 3


def verify(folder: Path, raw_file: Path | None = None, missing_texts: Sequence[str] = ()) -> list[str]:
    """Violations found in the tables that `clean` wrote to `folder`, a sentence each; empty when every promise holds.

    Checked: ids are unique, judgements resolve, every query has a positive, no query (case, punctuation and word order
    aside), document, near-duplicate cluster or group stands in two splits, no row is rejected twice. With `raw_file`
    also that every raw row is either rejected or found again in the tables with what it judged, that no judgement is
    there that nobody delivered, that what rejected rows call relevant is withheld, and that no document of a positive
    (a passage may have been delivered with several) stands in two splits. `missing_texts` are those that were read as
    missing.
    """
    with (
        tempfile.TemporaryDirectory(prefix="verify-") as work,
        connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": work}) as connection,
    ):
        create_macros(connection)
        for table, name in _TABLES.items():
            connection.execute(f"CREATE VIEW {table} AS SELECT * FROM stored('{_quoted(folder / name)}')")
        connection.execute(
            "CREATE VIEW positives AS SELECT query_id, split, passage_id, document_id, cluster_id FROM qrels "
            "JOIN queries USING (query_id) JOIN passages USING (passage_id) WHERE relevance > 0"
        )
        promises = dict(_PROMISES)
        if raw_file is not None:
            view_raw_rows(connection, raw_file, missing_texts)
            for table, query in _FROM_RAW.items():
                connection.execute(f"CREATE TEMP TABLE {table} AS {query}")
            promises |= _PROMISES_TO_RAW
        found = [(promise, connection.execute(query).fetchall()) for promise, query in promises.items()]
    return [f"{promise}: broken {len(rows)} time(s), e.g. {_examples(rows)}" for promise, rows in found if rows]


_EXAMPLE_PROMISES = {
    "an example_id stands once": "SELECT example_id FROM examples GROUP BY example_id HAVING count(*) > 1",
    "a split is train, dev or test": f"SELECT split FROM examples WHERE split NOT IN {SPLITS}",
    "a reason is a known one": f"SELECT reason FROM rejected WHERE reason NOT IN {tuple(reasons.EXAMPLE_REASONS)}",
    "a row is rejected once": (
        "SELECT source || ' row ' || row_number FROM rejected GROUP BY source, row_number HAVING count(*) > 1"
    ),
    "a score lies between 0 and 1": "SELECT example_id FROM examples WHERE NOT (score BETWEEN 0 AND 1)",
    "what the kind needs is there": """SELECT example_id FROM examples WHERE CASE $kind WHEN 'scored'
        THEN score IS NULL OR sentence2 IS NULL WHEN 'labelled' THEN label IS NULL ELSE sentence2 IS NULL END""",
    "no two sentences, in either order, and no group stand in two splits": """
        SELECT min(shown) FROM (
            SELECT split, unnest(pair_keys(folded(sentence1), folded(sentence2))) AS key, sentence1 AS shown
            FROM examples WHERE sentence2 IS NOT NULL UNION ALL SELECT split, group_id, group_id FROM examples
        ) GROUP BY key HAVING count(DISTINCT split) > 1""",
    "no text stands in two splits": """
        SELECT min(text) FROM (
            SELECT split, text, unnest(text_keys(folded(text))) AS key
            FROM (SELECT split, unnest([sentence1, sentence2]) AS text FROM examples) WHERE text IS NOT NULL
        ) WHERE $apart = 'texts' GROUP BY key HAVING count(DISTINCT split) > 1""",
}
_EXAMPLE_PROMISES_TO_RAW = {
    "a rejected row is a raw row": f"SELECT {_ROW} FROM rejected ANTI JOIN raw USING (source, row_number)",
    "every kept row is an example, as it was delivered": f"""
        SELECT {_ROW} FROM kept ANTI JOIN examples e ON e.sentence1 = kept.sentence1
        AND e.sentence2 IS NOT DISTINCT FROM kept.sentence2
        AND class_key(e.label) IS NOT DISTINCT FROM class_key(kept.label)
        AND ($kind <> 'scored' OR abs(e.score - (kept.score - $low) / ($high - $low)) < 1e-9)""",
    "an example was delivered, once": """
        SELECT example_id FROM examples e LEFT JOIN kept k ON e.sentence1 = k.sentence1
        AND e.sentence2 IS NOT DISTINCT FROM k.sentence2 GROUP BY example_id HAVING count(k.source) <> 1""",
    "a delivered dev or test row stays what it is": f"""
        SELECT {_ROW} FROM kept JOIN examples e ON e.sentence1 = kept.sentence1
        AND e.sentence2 IS NOT DISTINCT FROM kept.sentence2 WHERE e.split <> kept.held_out""",
}


def verify_examples(
    folder: Path,
    source: SourceSettings,
    apart: Apart,
    raw_file: Path | None = None,
    missing_texts: Sequence[str] = (),
) -> list[str]:
    """The same for the tables that `examples.clean_examples` wrote; `apart` is what its report says of the splits."""
    low, high = source.score_range or (0.0, 1.0)
    told = {"kind": source.kind, "apart": apart, "low": low, "high": high}
    with connect(config={"memory_limit": MEMORY_LIMIT}) as connection:
        create_macros(connection)
        for table, name in (("examples", EXAMPLES_FILE), ("rejected", REJECTED_EXAMPLES_FILE)):
            connection.execute(f"CREATE VIEW {table} AS SELECT * FROM stored('{_quoted(folder / name)}')")
        promises = dict(_EXAMPLE_PROMISES)
        if raw_file is not None:
            view_raw_rows(connection, raw_file, missing_texts, examples=True)
            connection.execute(
                """CREATE TEMP TABLE kept AS
                   SELECT source, row_number, lines(sentence1) AS sentence1, lines(sentence2) AS sentence2, score,
                       one_line(label) AS label, nullif(told_split, 'train') AS held_out
                   FROM raw ANTI JOIN rejected USING (source, row_number)"""
            )
            promises |= _EXAMPLE_PROMISES_TO_RAW
        found = []
        for promise, query in promises.items():
            given = {key: value for key, value in told.items() if f"${key}" in query}
            found.append((promise, connection.execute(query, given).fetchall()))
    return [f"{promise}: broken {len(rows)} time(s), e.g. {_examples(rows)}" for promise, rows in found if rows]


def _examples(rows: list[tuple[str, ...]]) -> str:
    return ", ".join(sorted(str(row[0]) for row in rows)[:SHOWN])


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
