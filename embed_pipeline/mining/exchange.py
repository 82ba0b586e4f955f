"""Mined sets for other trainers: FlagEmbedding's jsonl, and sentence-transformers' pairs, triplets and n-tuples."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import duckdb

from embed_pipeline.errors import ArtifactError, ConfigurationError
from embed_pipeline.tables import HARD_NEGATIVES_FILE, PASSAGES_FILE, QUERIES_FILE, connect

Format = Literal["flag-embedding", "triplets", "tuples", "pairs"]


@dataclass(frozen=True)
class Exported:
    """What was written, and what could not be."""

    rows: int
    queries: int
    left_out: int  # queries without a negative, or (tuples) with too few
    with_teacher_scores: int | None  # of the queries written; None where the format has no place for them

    @property
    def sentence(self) -> str:
        told = f"{self.rows:,} rows of {self.queries:,} queries"
        if self.left_out:
            told += f"; {self.left_out:,} queries have too few negatives and were left out"
        if self.with_teacher_scores is not None:
            told += f"; {self.with_teacher_scores:,} of them with teacher scores"
            if 0 < self.with_teacher_scores < self.queries:
                told += " (FlagEmbedding's knowledge_distillation needs them on every line)"
        return told


def export_negatives(
    cleaned: Path,
    negatives: Path,
    format: Format,
    output: Path,
    *,
    prompt: str | None = None,
    num_negatives: int | None = None,
) -> Exported:
    """Write the mined queries of `negatives` (texts from `cleaned`) to `output`, whole or not at all.

    flag-embedding: a line a query, `query, pos, neg`, with `pos_scores, neg_scores` where any query has teacher scores
    (null for queries without), and `prompt` if there is one. triplets: `query, positive, negative`, a row for
    each positive and negative. tuples: `query, positive, negative_1` to `negative_n`, a row for each positive;
    `num_negatives` of each query, by default as many as any has. pairs: `query, positive`. All in the order of the
    mined table, negatives the hardest of each origin first.

    Raises ConfigurationError for an output that cannot be written, ArtifactError where a table is missing or no query
    has enough negatives.
    """
    suffix = ".jsonl" if format == "flag-embedding" else ".parquet"
    if output.suffix != suffix:
        raise ConfigurationError(f"{output}: format {format} is written as {suffix}; found '{output.suffix}'")
    if not output.parent.is_dir():
        raise ConfigurationError(f"{output}: there is no folder {output.parent}. Create it, or name another")
    for table in (negatives / HARD_NEGATIVES_FILE, cleaned / QUERIES_FILE, cleaned / PASSAGES_FILE):
        if not table.is_file():
            raise ArtifactError(f"no {table.name} in {table.parent}: the source was not mined, or has another name")
    with (
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as work,
        connect(f"{work}/work.duckdb") as connection,
    ):
        _load(connection, cleaned, negatives)
        fewest = 0 if format == "pairs" else 1
        if format == "tuples":
            most = connection.execute("SELECT coalesce(max(len(neg)), 0) FROM mined").fetchall()[0][0]
            num_negatives = fewest = num_negatives or max(1, int(most))
        rows = _rows(connection, format, prompt, num_negatives or 0)
        connection.execute(f"CREATE VIEW written AS SELECT * FROM mined WHERE len(neg) >= {fewest}")
        queries, scored, all_queries = connection.execute(
            "SELECT count(*), count(pos_scores), (SELECT count(*) FROM mined) FROM written"
        ).fetchall()[0]
        if not queries:
            raise ArtifactError(
                f"none of the {all_queries} queries in {negatives} has {fewest} negative(s), so there is nothing to "
                f"write as {format}. Mine more of them (`mining`), or ask for fewer"
            )
        partial = Path(work) / output.name
        as_format = "FORMAT json" if format == "flag-embedding" else "FORMAT parquet, COMPRESSION zstd"
        quoted = str(partial).replace("'", "''")
        count = connection.execute(f"COPY ({rows}) TO '{quoted}' ({as_format})").fetchall()[0][0]
        partial.replace(output)
    return Exported(
        rows=int(count),
        queries=int(queries),
        left_out=int(all_queries - queries),
        with_teacher_scores=int(scored) if format == "flag-embedding" else None,
    )


def _load(connection: duckdb.DuckDBPyConnection, cleaned: Path, negatives: Path) -> None:
    """Table `mined`: place, query, pos, neg (texts), pos_scores, neg_scores."""
    connection.execute(
        """CREATE TABLE texts AS SELECT passage_id, CASE WHEN coalesce(title, '') = '' THEN text
               ELSE title || ' ' || text END AS text FROM stored($passages)""",
        {"passages": str(cleaned / PASSAGES_FILE)},
    )
    connection.execute(
        "CREATE VIEW hard AS SELECT *, file_row_number AS place FROM stored_in_order('"
        + str(negatives / HARD_NEGATIVES_FILE).replace("'", "''")
        + "')"
    )
    for name, ids in (("pos", "positive_ids"), ("neg", "negative_ids")):
        connection.execute(
            f"""CREATE TABLE {name}_texts AS SELECT place, list(text ORDER BY i) AS {name} FROM (
                    SELECT place, unnest({ids}) AS passage_id, generate_subscripts({ids}, 1) AS i FROM hard
                ) JOIN texts USING (passage_id) GROUP BY place"""
        )
    connection.execute(
        """CREATE TABLE mined AS
           SELECT place, query, pos, coalesce(neg, []) AS neg, positive_teacher_scores AS pos_scores,
               negative_teacher_scores AS neg_scores
           FROM hard JOIN stored($queries) USING (query_id) JOIN pos_texts USING (place)
           LEFT JOIN neg_texts USING (place)""",
        {"queries": str(cleaned / QUERIES_FILE)},
    )


def _rows(connection: duckdb.DuckDBPyConnection, format: Format, prompt: str | None, num_negatives: int) -> str:
    if format == "flag-embedding":
        scores = "pos_scores, neg_scores"
        with_scores = connection.execute("SELECT count(pos_scores) FROM mined").fetchall()[0][0]
        fields = ["query", "pos", "neg", *([scores] if with_scores else [])]
        if prompt:
            fields.append("'" + prompt.replace("'", "''") + "' AS prompt")
        return f"SELECT {', '.join(fields)} FROM written ORDER BY place"
    each = "SELECT place, query, unnest(pos) AS positive, generate_subscripts(pos, 1) AS i, neg FROM written"
    if format == "pairs":
        return f"SELECT query, positive FROM ({each}) ORDER BY place, i"
    if format == "triplets":
        return f"""SELECT query, positive, negative FROM (
                SELECT *, unnest(neg) AS negative, generate_subscripts(neg, 1) AS j FROM ({each})
            ) ORDER BY place, i, j"""
    columns = ", ".join(f"neg[{number}] AS negative_{number}" for number in range(1, num_negatives + 1))
    return f"SELECT query, positive, {columns} FROM ({each}) ORDER BY place, i"
