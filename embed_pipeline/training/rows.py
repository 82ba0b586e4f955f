"""The training rows: every train query with the texts of its positives and of its hard negatives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embed_pipeline.errors import TrainingError
from embed_pipeline.settings import RerankerSettings
from embed_pipeline.tables import HARD_NEGATIVES_FILE, PASSAGES_FILE, QUERIES_FILE, WITHHELD_FILE, passage_text
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.random_negatives import add_random, turns


@dataclass(frozen=True)
class TrainingQuery:
    query: str
    positives: tuple[str, ...]  # at least one
    negatives: tuple[str, ...]  # hardest first; at least one wherever groups hold mined ones
    random: tuple[str, ...] = ()  # random passages, for as many groups as `random_negatives.turns` says


def read_training_queries(job: TrainingJob) -> list[TrainingQuery]:
    """The job's train queries in the order of their ids; a seeded sample of them if `train_queries` asks for one.

    A query without any negative gets random passages that are no positive of it (withheld ones count as positives),
    nor a near-duplicate of one.
    Raises TrainingError when a table is missing or there is no query to train on.
    """
    rows = sorted(read_table(job.hard_negatives / HARD_NEGATIVES_FILE).to_pylist(), key=lambda row: row["query_id"])
    rows = [row for row in rows if row["positive_ids"]]
    if not rows:
        raise TrainingError(
            f"{job.hard_negatives / HARD_NEGATIVES_FILE} has no query with a positive: nothing to train on. "
            "See cleaned_pairs' `rejected` table for what became of the raw rows"
        )
    wanted = job.settings.train_queries
    if wanted is not None and wanted < len(rows):
        chosen = np.random.default_rng(job.seed).choice(len(rows), size=wanted, replace=False)
        rows = [rows[i] for i in np.sort(chosen)]
    random_needed = job.settings.random_negatives if isinstance(job.settings, RerankerSettings) else 0
    negatives_needed = job.settings.train_group_size - 1 - random_needed
    if job.settings.train_group_size > 1:
        _add_known(rows, job.cleaned_pairs)
    if negatives_needed:
        _fill_empty(rows, job, negatives_needed)
    if random_needed:
        corpus = read_table(job.cleaned_pairs / PASSAGES_FILE, ["passage_id", "cluster_id"])
        add_random(rows, corpus, job.seed, random_needed, negatives_needed)
    keys = ("positive_ids", "negative_ids", "random_ids")
    needed = {id for row in rows for key in keys for id in row.get(key, ())}
    passages = read_passages(job.cleaned_pairs, needed)
    queries = read_queries(job.cleaned_pairs, {row["query_id"] for row in rows})
    return [
        TrainingQuery(
            queries[row["query_id"]],
            tuple(passages[id] for id in row["positive_ids"]),
            tuple(passages[id] for id in row["negative_ids"]),
            tuple(passages[id] for id in row.get("random_ids", ())),
        )
        for row in rows
    ]


def groups(
    queries: Iterable[TrainingQuery], group_size: int, random_negatives: int = 0
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """One (query, positive, group_size - 1 negatives, the random ones last) a judged pair."""
    for query in queries:
        for turn, positive in enumerate(query.positives):
            yield query.query, positive, negatives_of(query, turn, group_size, random_negatives)


def negatives_of(query: TrainingQuery, turn: int, group_size: int, random_negatives: int = 0) -> tuple[str, ...]:
    """The negatives of a query's group number `turn`.

    The next group goes on where the last one stopped; at the end it begins again, so a query with too few repeats them
    (as FlagEmbedding does).
    """
    mined = group_size - 1 - random_negatives
    return (
        *(query.negatives[(turn * mined + i) % len(query.negatives)] for i in range(mined)),
        *(query.random[(turn * random_negatives + i) % len(query.random)] for i in range(random_negatives)),
    )


def negatives_to_draw_from(query: TrainingQuery, group_size: int, random_negatives: int) -> list[str]:
    """For a trainer that draws a group's negatives itself: mined and random ones in the shares of a group."""
    if not random_negatives:
        return list(query.negatives)
    count = turns(len(query.positives), len(query.negatives), group_size - 1 - random_negatives)
    return [text for turn in range(count) for text in negatives_of(query, turn, group_size, random_negatives)]


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The parquet table at `path`. Raises TrainingError when it is not there or not readable."""
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise TrainingError(f"cannot read {path}, which the job names: {error}. Materialize its stage again") from error


def read_passages(cleaned_pairs: Path, ids: set[str]) -> dict[str, str]:
    """Texts, as models read them, of the passages in `ids`. The table is streamed: only these are held."""
    path = cleaned_pairs / PASSAGES_FILE
    texts: dict[str, str] = {}
    for batch in pq.ParquetFile(path).iter_batches(columns=["passage_id", "title", "text"]):
        for id, title, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if id in ids:
                texts[id] = passage_text(title, text)
    if len(texts) < len(ids):
        missing = sorted(ids - texts.keys())
        raise TrainingError(
            f"{len(missing)} passages are not in {path}, e.g. {missing[0]!r}: the tables are of different versions. "
            "Materialize hard_negatives again"
        )
    return texts


def read_queries(cleaned_pairs: Path, ids: set[str]) -> dict[str, str]:
    """Texts of the queries in `ids`."""
    table = read_table(cleaned_pairs / QUERIES_FILE, ["query_id", "query"])
    texts = dict(zip(table["query_id"].to_pylist(), table["query"].to_pylist(), strict=True))
    missing = sorted(ids - texts.keys())
    if missing:
        raise TrainingError(
            f"{len(missing)} queries are not in {cleaned_pairs / QUERIES_FILE}, e.g. {missing[0]!r}: the tables are of "
            "different versions. Materialize hard_negatives again"
        )
    return {id: texts[id] for id in ids}


def _add_known(rows: list[dict[str, list[str]]], cleaned_pairs: Path) -> None:
    """Set every row's `known_ids`: its positives, and the passages withheld from it. None of them may be a negative."""
    withheld: dict[str, list[str]] = defaultdict(list)
    for pair in read_table(cleaned_pairs / WITHHELD_FILE).to_pylist():
        withheld[pair["query_id"]].append(pair["passage_id"])
    for row in rows:
        row["known_ids"] = [*row["positive_ids"], *withheld.get(str(row["query_id"]), ())]


def _fill_empty(rows: list[dict[str, list[str]]], job: TrainingJob, count: int) -> None:
    empty = [row for row in rows if not row["negative_ids"]]
    if not empty:
        return
    table = read_table(job.cleaned_pairs / PASSAGES_FILE, ["passage_id", "cluster_id"])
    passage_ids, clusters = table["passage_id"].to_pylist(), table["cluster_id"].to_pylist()
    cluster_of = dict(zip(passage_ids, clusters, strict=True))
    generator = np.random.default_rng([job.seed, 1])
    for row in empty:
        refused = {cluster_of.get(id) for id in row["known_ids"]}
        drawn = generator.permutation(len(passage_ids))[: count + _members(clusters, refused)]
        row["negative_ids"] = [passage_ids[i] for i in drawn if clusters[i] not in refused][:count]
        if not row["negative_ids"]:
            raise TrainingError(
                f"query {row['query_id']!r} has no negative and the corpus holds nothing but its positives. Train with "
                "train_group_size: 1 (in-batch negatives only) or give the pipeline more passages"
            )


def _members(clusters: list[str], chosen: set[str | None]) -> int:
    return sum(cluster in chosen for cluster in clusters)
