"""The Arrow schemas that pass between stages, the file each table is kept in, and the way to read and write them.

A column name's only home.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SPLITS = ("train", "dev", "test")


def extra_folder(folder: Path, source: str) -> Path:
    """Where raw_pairs, cleaned_pairs and hard_negatives keep the tables of one extra source, named as their own."""
    return folder / "extra" / source


def source_folder(folder: Path, extra: str | None) -> Path:
    """Where the tables of a source lie: in `folder` itself those of the own source, whose name is None."""
    return folder if extra is None else extra_folder(folder, extra)


# --- raw_pairs: one row per delivered row, whatever file it came from ------------------------------------
RAW_FILE = "raw_pairs.parquet"
RAW = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # file as named in the YAML's folder, forward slashes
        pa.field("row_number", pa.int64(), nullable=False),  # 0-based within the file
        pa.field("kind", pa.string(), nullable=False),  # pair | triplet | passage | query | judgement
        pa.field("query_id", pa.string()),
        pa.field("query", pa.string()),
        pa.field("passage_id", pa.string()),
        pa.field("title", pa.string()),
        pa.field("passage", pa.string()),
        pa.field("negative", pa.string()),
        pa.field("relevance", pa.float64()),
        pa.field("teacher_score", pa.float64()),  # a cross-encoder's, where the rows came with one
        pa.field("document_id", pa.string()),
        pa.field("split", pa.string()),
    ]
)
RAW_EXAMPLES_FILE = "raw_examples.parquet"  # of a scored, labelled or parallel source
RAW_EXAMPLES = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row_number", pa.int64(), nullable=False),
        pa.field("sentence1", pa.string()),
        pa.field("sentence2", pa.string()),
        pa.field("score", pa.float64()),  # as delivered
        pa.field("label", pa.string()),
        pa.field("document_id", pa.string()),
        pa.field("split", pa.string()),
    ]
)

# --- cleaned_pairs ---------------------------------------------------------------------------------------
QUERIES_FILE = "queries.parquet"
QUERIES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),  # what may not be divided over splits
    ]
)
PASSAGES_FILE = "passages.parquet"
PASSAGES = pa.schema(
    [
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("text", pa.string(), nullable=False),
        pa.field("document_id", pa.string()),
        pa.field("cluster_id", pa.string(), nullable=False),  # near-duplicates share it
    ]
)
QRELS_FILE = "qrels.parquet"
QRELS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("relevance", pa.float64(), nullable=False),  # > 0 positive, 0 judged as not relevant
        pa.field("teacher_score", pa.float64()),
    ]
)
EXAMPLES_FILE = "examples.parquet"  # of a scored, labelled or parallel source, instead of the three tables above
EXAMPLES = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("sentence1", pa.string(), nullable=False),
        pa.field("sentence2", pa.string()),  # null for labelled texts that stand alone
        # scored: 0..1; labelled pairs of two classes: 1 for the one that means alike (source.positive_label), 0 for
        # the other, null where that is not known
        pa.field("score", pa.float64()),
        pa.field("label", pa.string()),  # labelled: the class, in one spelling
        pa.field("split", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
    ]
)
REJECTED_EXAMPLES_FILE = "rejected_examples.parquet"
REJECTED_EXAMPLES = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row_number", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("sentence1", pa.string()),
        pa.field("sentence2", pa.string()),
    ]
)
WITHHELD_FILE = "withheld.parquet"  # known to be relevant, yet not to be trained or measured on: never a negative
WITHHELD = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),
    ]
)
REJECTED_FILE = "rejected.parquet"
REJECTED = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row_number", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),  # e.g. the passage it duplicates, the length found
        pa.field("query", pa.string()),
        pa.field("passage", pa.string()),
    ]
)
MERGED_FILE = "merged.parquet"  # kept rows whose passage gave way to a near-duplicate
MERGED = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row_number", pa.int64(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),  # the id its own text had
        pa.field("merged_into", pa.string(), nullable=False),  # the passage_id that stands for it
        pa.field("passage", pa.string(), nullable=False),
    ]
)

# --- hard_negatives --------------------------------------------------------------------------------------
HARD_NEGATIVES_FILE = "hard_negatives.parquet"
HARD_NEGATIVES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("positive_ids", pa.list_(pa.string()), nullable=False),
        pa.field("negative_ids", pa.list_(pa.string()), nullable=False),
        pa.field("positive_scores", pa.list_(pa.float32()), nullable=False),
        pa.field("negative_scores", pa.list_(pa.float32()), nullable=False),
        pa.field("negative_origins", pa.list_(pa.string()), nullable=False),  # mined | given | random
        # Logits of mining's cross-encoder, else what the rows came with; null where a text of the query has none.
        pa.field("positive_teacher_scores", pa.list_(pa.float32())),
        pa.field("negative_teacher_scores", pa.list_(pa.float32())),
    ]
)
REFUSED_FILE = "refused.parquet"
REFUSED = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # 0-based in the embedder's ranking
        pa.field("score", pa.float32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

CANDIDATES_FILE = "dev_candidates.parquet"  # what the embedder retrieves for dev queries, for the reranker
CANDIDATES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # 0-based
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)

# --- evaluation ------------------------------------------------------------------------------------------
PER_QUERY_FILE = "per_query.parquet"
PER_QUERY = pa.schema(
    [
        pa.field("system", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
RANKINGS_FILE = "rankings.parquet"
RANKINGS = pa.schema(
    [
        pa.field("system", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # 0-based
        pa.field("passage_id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)

SIMILARITIES_FILE = "similarities.parquet"  # of a pipeline of scored pairs, instead of the two tables above
SIMILARITIES = pa.schema(
    [
        pa.field("system", pa.string(), nullable=False),
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("similarity", pa.float64(), nullable=False),  # cosine of the two sentences
        pa.field("score", pa.float64(), nullable=False),  # what people gave them, 0..1
    ]
)


# DuckDB takes a path for a pattern, and makes a column of every folder `key=value` in it, over the file's own.
_READERS = (
    ("stored(path)", "hive_partitioning = false"),
    ("stored_in_order(path)", "hive_partitioning = false, file_row_number = true"),
)


def connect(database: str = ":memory:", config: Mapping[str, str] | None = None) -> duckdb.DuckDBPyConnection:
    """DuckDB with `stored(path)`, the rows of one parquet file as it is, wherever it lies.

    `stored_in_order(path)` has the column `file_row_number` besides, from 0.
    """
    connection = duckdb.connect(database, config=dict(config or {}))
    for name, options in _READERS:
        connection.execute(
            f"CREATE OR REPLACE TEMP MACRO {name} AS TABLE "
            rf"SELECT * FROM read_parquet([regexp_replace(path, '([*?\[])', '[\1]', 'g')], {options})"
        )
    return connection


def count_split(cleaned: Path, split: str) -> int:
    """Queries of the own source in `split`, or its examples where it has none."""
    queries = cleaned / QUERIES_FILE
    table = queries if queries.is_file() else cleaned / EXAMPLES_FILE
    splits = pq.read_table(table, columns=["split"], partitioning=None).column("split")
    return int(pc.sum(pc.equal(splits, split)).as_py() or 0)


def passage_text(title: str | None, text: str) -> str:
    """A passage as every model and BM25 read it: BEIR's convention, the title before the text."""
    return f"{title} {text}" if title else text


def write(rows: pa.Table, schema: pa.Schema, path: Path) -> None:
    """Write `rows` as zstd parquet in exactly `schema` (columns in its order; raises if one is missing)."""
    pq.write_table(rows.select(schema.names).cast(schema), path, compression="zstd")


def write_stream(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path, rows_per_group: int = 20_000) -> int:
    """Write `batches` as `write` does, holding one row group in memory; the same rows give the same bytes.

    However the rows are cut into batches, the row groups are the same. Returns the number of rows.
    """
    rows = 0
    waiting = schema.empty_table()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            waiting = pa.concat_tables([waiting, table])
            while waiting.num_rows >= rows_per_group:
                writer.write_table(waiting.slice(0, rows_per_group))
                waiting = waiting.slice(rows_per_group)
            rows += batch.num_rows
        if waiting.num_rows:
            writer.write_table(waiting)
    return rows
