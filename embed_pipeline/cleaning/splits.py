"""Splits that share nothing: leaks across delivered ones are removed, and missing ones are cut from train by groups."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.rows import reject, reject_queries_without_positive, rejections_told
from embed_pipeline.errors import CleaningError
from embed_pipeline.settings import SplitSettings

# A group above this share of the queries (and above five of them) goes to train: in test it would outweigh the rest.
LARGE_GROUP_SHARE = 0.05
LARGE_GROUP_QUERIES = 5


def create_links(connection: duckdb.DuckDBPyConnection) -> None:
    """The view `links`: what a judgement must not have in common with another split.

    A row for each judgement and each of: its query's keys; and, for a positive, the documents and the near-duplicate
    cluster of its passage. A passage judged as not relevant links nothing: it may answer another split's query.
    """
    connection.execute("CREATE TABLE keys AS SELECT query_id, unnest(query_keys(folded)) AS key FROM spellings")
    connection.execute(
        """CREATE VIEW links AS
           SELECT row, query_id, split, 'query' AS what, key FROM judged JOIN keys USING (query_id)
           UNION ALL SELECT row, query_id, split, 'document', document_id
           FROM judged JOIN passage_documents USING (passage_id) WHERE relevance > 0
           UNION ALL SELECT row, query_id, split, 'cluster', cluster_id
           FROM judged JOIN passage_clusters USING (passage_id) WHERE relevance > 0"""
    )


def remove_split_leaks(connection: duckdb.DuckDBPyConnection) -> None:
    """Test keeps all it has; dev rows linked to test go, then train rows linked to test or to what is left of dev."""
    for split, held_out in (("dev", "('test')"), ("train", "('test', 'dev')")):
        reject(
            connection,
            reasons.SPLIT_LEAK,
            f"""WITH held AS (
                    SELECT what, key, arg_max(split, (split, query_id)) AS held_split,
                        arg_max(query_id, (split, query_id)) AS held_query
                    FROM links WHERE split IN {held_out} GROUP BY what, key
                )
                SELECT row, 'shares ' || what || ' "' || left(key, 80) || '" with ' || held_split || ' query '
                    || held_query AS detail
                FROM links JOIN held USING (what, key) WHERE split = '{split}'""",
        )
        reject_queries_without_positive(connection)


def cut_missing_splits(connection: duckdb.DuckDBPyConnection, settings: SplitSettings, seed: int) -> None:
    """Cut test and dev from train's groups where none was delivered and its share is above zero.

    Raises CleaningError where too few groups are left to fill every split, saying what links them.
    """
    present = {row[0] for row in connection.execute("SELECT DISTINCT split FROM judged").fetchall()}
    shares = {"test": settings.test, "dev": settings.dev}
    wanted = {split: share for split, share in shares.items() if share > 0 and split not in present}
    if not wanted or "train" not in present:
        return
    queries, labels, keys = linked_groups(connection, "SELECT * FROM links WHERE split = 'train'", seed)
    sizes = np.bincount(labels)
    chosen = assign_groups(keys, sizes, wanted)
    if chosen is None:
        raise CleaningError(_too_few_groups(connection, len(sizes), list(wanted), len(queries)))
    connection.register("found_splits", pa.table({"query_id": queries, "split": pa.array(chosen[labels])}))
    connection.execute(
        """UPDATE judgements SET split = f.split FROM found_splits f
           WHERE f.query_id = judgements.query_id AND judgements.split = 'train'"""
    )
    connection.unregister("found_splits")


def assign_groups(
    keys: NDArray[np.float64], sizes: NDArray[np.int64], wanted: dict[str, float]
) -> NDArray[np.object_] | None:
    """The split of each group, shape (groups,): `wanted` maps split to share, in order; the rest is train.

    `keys` are the groups' places on [0, 1), which do not depend on other groups: so a group stays where it is when
    others are added. Large groups go to train. A split that would be empty takes the lowest key that others can spare.
    None where there are fewer groups than splits.
    """
    if len(sizes) <= len(wanted):
        return None
    small = sizes <= max(LARGE_GROUP_QUERIES, LARGE_GROUP_SHARE * sizes.sum())
    chosen = np.full(len(sizes), "train", dtype=object)
    start = 0.0
    for split, share in wanted.items():
        chosen[small & (keys >= start) & (keys < start + share)] = split
        start += share
    for split in (*wanted, "train"):
        if (chosen == split).any():
            continue
        counts = {name: int((chosen == name).sum()) for name in (*wanted, "train")}
        spare = np.array([counts[name] > 1 for name in chosen])
        candidates = np.flatnonzero(spare & small) if (spare & small).any() else np.flatnonzero(spare)
        chosen[candidates[np.argmin(keys[candidates])]] = split
    return chosen


def group_queries(connection: duckdb.DuckDBPyConnection) -> None:
    """`query_groups`: query_id -> group_id (the smallest query_id linked to it), over the judgements that stand."""
    queries, labels, _ = linked_groups(connection, "FROM links", seed=0)
    ordered = sorted(range(len(queries)), key=lambda index: str(queries[index]))
    first: dict[int, Any] = {}
    for index in ordered:
        first.setdefault(int(labels[index]), queries[index])
    group_ids = [first[int(label)] for label in labels]
    connection.register("found_groups", pa.table({"query_id": queries, "group_id": pa.array(group_ids, pa.string())}))
    connection.execute("CREATE TABLE query_groups AS SELECT * FROM found_groups")
    connection.unregister("found_groups")


def linked_groups(
    connection: duckdb.DuckDBPyConnection, links: str, seed: int
) -> tuple[NDArray[np.object_], NDArray[np.int64], NDArray[np.float64]]:
    """Connected components of queries and `links`, a query with the columns query_id, what, key.

    Returns the query ids, the component of each, each component's place on [0, 1).

    The place is a hash of one member, the document (else the cluster) that hashes lowest, so it does not move when a
    group gains a query.
    """
    table = connection.sql(
        f"""SELECT query_id, dense_rank() OVER (ORDER BY query_id) - 1 AS query_index,
                dense_rank() OVER (ORDER BY what, key) - 1 AS link_index,
                CASE what WHEN 'document' THEN 0 WHEN 'cluster' THEN 1 ELSE 2 END AS priority,
                md5_number_lower($seed || ' ' || what || ' ' || key) AS rank,
                md5_number_upper($seed || ' ' || what || ' ' || key) AS place
            FROM (SELECT DISTINCT query_id, what, key FROM ({links})) ORDER BY query_index, link_index""",
        params={"seed": str(seed)},
    ).to_arrow_table()
    found = {name: np.asarray(table[name]) for name in table.column_names}
    query_index, link_index = found["query_index"], found["link_index"]
    queries, first = np.unique(query_index, return_index=True)
    nodes = len(queries) + int(link_index.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(query_index)), (query_index, link_index + len(queries))), shape=(nodes, nodes))
    count, labels = connected_components(edges, directed=False)
    component = labels[query_index]
    order = np.lexsort((found["rank"], found["priority"], component))
    lowest = order[np.searchsorted(component[order], np.arange(count))]
    places = found["place"][lowest].astype(np.float64) / 2.0**64
    return found["query_id"][first].astype(object), labels[: len(queries)].astype(np.int64), places


def _too_few_groups(connection: duckdb.DuckDBPyConnection, groups: int, wanted: list[str], queries: int) -> str:
    what, key, most, passage = connection.execute(
        """WITH top AS (
               SELECT what, key, count(DISTINCT query_id) AS n FROM links WHERE split = 'train'
               GROUP BY what, key ORDER BY n DESC, what, key LIMIT 1
           ) SELECT what, key, n, left(text, 80) FROM top LEFT JOIN passages ON what = 'cluster' AND passage_id = key"""
    ).fetchall()[0]
    shared = f"passage '{passage}'" if what == "cluster" else f"{what} '{key}'"
    fixes = {
        "document": "leave `columns.document_id` out or choose a finer one",
        "cluster": "raise `cleaning.near_duplicates.threshold` if passages only look alike, or deliver more of them",
        "query": "deliver more questions",
    }
    rejected = rejections_told(connection, reasons.REASONS) or "none"
    return (
        f"cannot cut {' and '.join(wanted)} from train: its {queries} queries form {groups} group(s) that may not be "
        f"divided, and {len(wanted) + 1} are needed. What links most of them is the {shared} ({most} queries). "
        f"Rejected: {rejected}. Fix: {fixes[what]}; or deliver a `split` column"
    )
