"""Several sources train one model: what one of them holds out for dev and test, no other may train on.

Sources come in the order of the YAML, the pipeline's own first. What was cleaned before stands: a train row gives way
where a source before it holds its texts out, a dev or test row where a source before it trains on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import duckdb

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.normalise import create_macros
from embed_pipeline.cleaning.rows import MEMORY_LIMIT, reject
from embed_pipeline.tables import EXAMPLES_FILE, PASSAGES_FILE, QRELS_FILE, QUERIES_FILE, connect

# What may not stand in two splits: a text, or (where texts stand in many pairs) two texts together.
Apart = Literal["texts", "pairs"]
SHOWN = 3
SHOWN_CHARACTERS = 80

_RETRIEVAL = """
    SELECT split, query AS first, text AS second, title FROM stored($qrels) JOIN stored($queries)
    USING (query_id) JOIN stored($passages) USING (passage_id) WHERE relevance > 0"""
_EXAMPLES = "SELECT split, sentence1 AS first, sentence2 AS second, NULL::VARCHAR AS title FROM stored($examples)"


@dataclass(frozen=True)
class CleanedSource:
    """What `collect` found in the cleaned tables of a source, and what of it stands in one split only."""

    name: str
    texts: Path
    apart: Apart


def reject_elsewhere(connection: duckdb.DuckDBPyConnection, before: Sequence[CleanedSource]) -> None:
    """Drop judgements of the tables that `clean` works on; a positive's near-duplicates are looked for as well."""
    connection.execute(
        """CREATE TABLE own_texts AS
           WITH asked AS (SELECT DISTINCT row, split, query_id, cluster_id, relevance FROM judged
                          JOIN passage_clusters USING (passage_id)),
           answers AS (
               SELECT row, split, folded AS first, title, text AS second FROM asked JOIN spellings USING (query_id)
               JOIN passage_clusters USING (cluster_id) JOIN passages USING (passage_id) WHERE relevance > 0
           )
           SELECT row, split, 'texts' AS what, unnest(text_keys(folded)) AS key
           FROM asked JOIN spellings USING (query_id)
           UNION SELECT row, split, 'texts', unnest(text_keys(folded(told))) FROM (
               SELECT row, split, unnest(list_distinct([second, passage_text(title, second)])) AS told FROM answers)
           UNION SELECT row, split, 'pairs', unnest(pair_keys(first, folded(second))) FROM answers"""
    )
    reject_shared(connection, before, "texts")


def reject_shared(connection: duckdb.DuckDBPyConnection, before: Sequence[CleanedSource], apart: Apart) -> None:
    """Drop the rows of the table `own_texts` (row, split, what: texts or pairs, key) that share a key with `before`.

    What is held out decides whether a shared text is too much, or only a shared pair: `apart` is this source's.
    """
    _view(connection, before)
    for reason, mine, theirs, level in (
        (reasons.HELD_OUT_ELSEWHERE, "o.split = 'train'", "e.split <> 'train'", "e.apart"),
        (reasons.TRAINED_ON_ELSEWHERE, "o.split <> 'train'", "e.split = 'train'", f"'{apart}'"),
    ):
        reject(
            connection,
            reason,
            f"""SELECT row, e.split || ' of ' || source || ': "' || shown || '"' AS detail
                FROM own_texts o JOIN elsewhere e USING (what, key)
                WHERE {mine} AND {theirs} AND what = {level}""",
        )


def verify_apart(sources: Sequence[CleanedSource]) -> list[str]:
    """What one of the sources holds out and another trains on, a sentence each pair of sources; empty if nothing is."""
    found = []
    with _connected(sources[0].texts.parent) as connection:
        _view(connection, sources)
        for one, other in combinations(sources, 2):
            for held, trained in ((one, other), (other, one)):
                shared = connection.execute(
                    """SELECT DISTINCT h.shown FROM elsewhere h JOIN elsewhere t USING (what, key)
                       WHERE h.source = $held AND h.split <> 'train' AND t.source = $trained AND t.split = 'train'
                       AND what = $apart ORDER BY 1""",
                    {"held": held.name, "trained": trained.name, "apart": held.apart},
                ).fetchall()
                if shared:
                    examples = ", ".join(f'"{row[0]}"' for row in shared[:SHOWN])
                    found.append(
                        f"{trained.name} trains on what {held.name} holds out: {len(shared)} time(s), e.g. {examples}"
                    )
    return found


def collect(name: str, folder: Path, apart: Apart, work: Path) -> CleanedSource:
    """Read the cleaned tables of a source once, and keep what others are compared with in a file of `work`."""
    files = {"examples": EXAMPLES_FILE}
    if not (folder / EXAMPLES_FILE).is_file():
        files = {"queries": QUERIES_FILE, "passages": PASSAGES_FILE, "qrels": QRELS_FILE}
    texts = work / f"{name}.parquet"
    with _connected(work) as connection:
        create_macros(connection)
        connection.execute(
            f"""CREATE TABLE told AS
                WITH rows AS ({_EXAMPLES if "examples" in files else _RETRIEVAL})
                SELECT split, 'texts' AS what, unnest(text_keys(folded(told))) AS key, first FROM (
                    SELECT *, unnest(list_distinct([first, second, passage_text(title, second)])) AS told FROM rows)
                UNION ALL SELECT split, 'pairs', unnest(pair_keys(folded(first), folded(second))), first
                FROM rows WHERE second IS NOT NULL""",
            {key: str(folder / name) for key, name in files.items()},
        )
        connection.sql(
            f"SELECT split, what, key, min(left(first, {SHOWN_CHARACTERS})) AS shown FROM told GROUP BY ALL"
        ).write_parquet(str(texts))
    return CleanedSource(name, texts, apart)


def _view(connection: duckdb.DuckDBPyConnection, sources: Sequence[CleanedSource]) -> None:
    """View `elsewhere`: source, apart, split, what (texts, pairs), key, shown (the first text, cut)."""
    parts = [
        f"SELECT '{source.name}' AS source, '{source.apart}' AS apart, * FROM stored('{quoted}')"
        for source in sources
        for quoted in [str(source.texts).replace("'", "''")]
    ]
    connection.execute(f"CREATE TEMP VIEW elsewhere AS {' UNION ALL '.join(parts)}")


def _connected(work: Path) -> duckdb.DuckDBPyConnection:
    """Tables that do not fit spill to `work`."""
    return connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": str(work)})
