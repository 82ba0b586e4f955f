"""The training rows: every train query with the texts of its positives and of its hard negatives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embed_pipeline.errors import TrainingError
from embed_pipeline.fitting import FittedSettings
from embed_pipeline.settings import RerankerSettings
from embed_pipeline.tables import HARD_NEGATIVES_FILE, PASSAGES_FILE, QUERIES_FILE, WITHHELD_FILE, passage_text
from embed_pipeline.training.random_negatives import add_random, turns


@dataclass(frozen=True)
class TrainingQuery:
    query: str
    positives: tuple[str, ...]  # at least one
    negatives: tuple[str, ...]  # hardest first; at least one wherever groups hold mined ones
    random: tuple[str, ...] = ()  # random passages, for as many groups as `random_negatives.turns` says
    positive_scores: tuple[float, ...] = ()  # a teacher's logits; empty where a text of the query has none
    negative_scores: tuple[float, ...] = ()
    mined: Literal["some", "random", "none"] = "some"  # random: mining added random passages only; none: we did, here

    @property
    def has_scores(self) -> bool:
        """Whether a teacher has scored every text that a group can hold."""
        all_scored = len(self.positive_scores), len(self.negative_scores)
        return all_scored == (len(self.positives), len(self.negatives)) and not self.random


class Group(NamedTuple):
    """A query with one of its positives and the negatives of its turn, the random ones last."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    scores: tuple[float, ...] = ()  # a teacher's, of the positive and of each negative; empty without a teacher


def read_training_queries(
    settings: FittedSettings, seed: int, cleaned_pairs: Path, hard_negatives: Path, wanted: int | None
) -> list[TrainingQuery]:
    """The train queries in the order of their ids; a seeded sample of `wanted` of them if that is fewer.

    A query without any negative gets random passages that are no positive of it (withheld ones count as positives),
    nor a near-duplicate of one.
    Raises TrainingError when a table is missing or there is no query to train on.
    """
    rows = sorted(read_table(hard_negatives / HARD_NEGATIVES_FILE).to_pylist(), key=lambda row: row["query_id"])
    rows = [row for row in rows if row["positive_ids"]]
    if not rows:
        raise TrainingError(
            f"{hard_negatives / HARD_NEGATIVES_FILE} has no query with a positive: nothing to train on. "
            "See cleaned_pairs' `rejected` table for what became of the raw rows"
        )
    if wanted is not None and wanted < len(rows):
        chosen = np.random.default_rng(seed).choice(len(rows), size=wanted, replace=False)
        rows = [rows[i] for i in np.sort(chosen)]
    for row in rows:
        row["mined"] = "some" if set(row["negative_origins"]) - {"random"} else "random"
    random_needed = settings.random_negatives if isinstance(settings, RerankerSettings) else 0
    negatives_needed = settings.train_group_size - 1 - random_needed
    if settings.train_group_size > 1:
        _add_known(rows, cleaned_pairs)
    if negatives_needed:
        _fill_empty(rows, cleaned_pairs, seed, negatives_needed)
    if random_needed:
        corpus = read_table(cleaned_pairs / PASSAGES_FILE, ["passage_id", "cluster_id"])
        add_random(rows, corpus, seed, random_needed, negatives_needed)
    keys = ("positive_ids", "negative_ids", "random_ids")
    needed = {id for row in rows for key in keys for id in row.get(key, ())}
    passages = read_passages(cleaned_pairs, needed)
    queries = read_queries(cleaned_pairs, {row["query_id"] for row in rows})
    return [
        TrainingQuery(
            queries[row["query_id"]],
            tuple(passages[id] for id in row["positive_ids"]),
            tuple(passages[id] for id in row["negative_ids"]),
            tuple(passages[id] for id in row.get("random_ids", ())),
            tuple(row["positive_teacher_scores"] or ()),
            tuple(row["negative_teacher_scores"] or ()),
            row["mined"],
        )
        for row in rows
    ]


def groups(queries: Iterable[TrainingQuery], group_size: int, random_negatives: int = 0) -> Iterator[Group]:
    """One group a judged pair, with group_size - 1 negatives."""
    for query in queries:
        for turn, positive in enumerate(query.positives):
            negatives = negatives_of(query, turn, group_size, random_negatives)
            scores: tuple[float, ...] = ()
            if query.has_scores:
                of_negatives = (query.negative_scores[i] for i in _turn(len(query.negatives), turn, group_size - 1))
                scores = (query.positive_scores[turn], *of_negatives)
            yield Group(query.query, positive, negatives, scores)


def negatives_of(query: TrainingQuery, turn: int, group_size: int, random_negatives: int = 0) -> tuple[str, ...]:
    """The negatives of a query's group number `turn`.

    The next group goes on where the last one stopped; at the end it begins again, so a query with too few repeats them
    (as FlagEmbedding does).
    """
    return (
        *(query.negatives[i] for i in _turn(len(query.negatives), turn, group_size - 1 - random_negatives)),
        *(query.random[i] for i in _turn(len(query.random), turn, random_negatives)),
    )


def _turn(available: int, turn: int, count: int) -> list[int]:
    return [(turn * count + i) % available for i in range(count)]


def negatives_to_draw_from(query: TrainingQuery, group_size: int, random_negatives: int) -> list[str]:
    """For a trainer that draws a group's negatives itself: mined and random ones in the shares of a group."""
    if not random_negatives:
        return list(query.negatives)
    count = turns(len(query.positives), len(query.negatives), group_size - 1 - random_negatives)
    return [text for turn in range(count) for text in negatives_of(query, turn, group_size, random_negatives)]


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The parquet table at `path`. Raises TrainingError when it is not there or not readable."""
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
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


def _add_known(rows: list[dict[str, Any]], cleaned_pairs: Path) -> None:
    """Set every row's `known_ids`: its positives, and the passages withheld from it. None of them may be a negative."""
    withheld: dict[str, list[str]] = defaultdict(list)
    for pair in read_table(cleaned_pairs / WITHHELD_FILE).to_pylist():
        withheld[pair["query_id"]].append(pair["passage_id"])
    for row in rows:
        row["known_ids"] = [*row["positive_ids"], *withheld.get(str(row["query_id"]), ())]


def _fill_empty(rows: list[dict[str, Any]], cleaned_pairs: Path, seed: int, count: int) -> None:
    empty = [row for row in rows if not row["negative_ids"]]
    if not empty:
        return
    table = read_table(cleaned_pairs / PASSAGES_FILE, ["passage_id", "cluster_id"])
    passage_ids, clusters = table["passage_id"].to_pylist(), table["cluster_id"].to_pylist()
    cluster_of = dict(zip(passage_ids, clusters, strict=True))
    generator = np.random.default_rng([seed, 1])
    for row in empty:
        refused = {cluster_of.get(id) for id in row["known_ids"]}
        drawn = generator.permutation(len(passage_ids))[: count + _members(clusters, refused)]
        row["negative_ids"] = [passage_ids[i] for i in drawn if clusters[i] not in refused][:count]
        row["negative_teacher_scores"], row["mined"] = None, "none"
        if not row["negative_ids"]:
            raise TrainingError(
                f"query {row['query_id']!r} has no negative and the corpus holds nothing but its positives. Train with "
                "train_group_size: 1 (in-batch negatives only) or give the pipeline more passages"
            )


def _members(clusters: list[str], chosen: set[str | None]) -> int:
    return sum(cluster in chosen for cluster in clusters)
