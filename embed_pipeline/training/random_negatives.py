"""Easy negatives: seeded random passages, for a reranker that must first learn what relevance is."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from embed_pipeline.errors import TrainingError


def add_random(rows: Sequence[dict[str, Any]], passages: pa.Table, seed: int, each: int, mined: int) -> None:
    """Set every row's `random_ids`: `each` ids for every group that its positives and negatives give (see `turns`).

    `passages` has the columns passage_id and cluster_id. Never drawn: one of the row's `known_ids` (its positives,
    withheld ones too), a near-duplicate of one, a negative that the row has already. A row's passages depend on the
    seed and its query id alone, not on the other rows. A corpus too small gives fewer; raises TrainingError when it
    gives none.
    """
    ids, clusters = passages["passage_id"].to_pylist(), passages["cluster_id"].to_pylist()
    cluster_of = dict(zip(ids, clusters, strict=True))
    for row in rows:
        near = {cluster_of.get(id) for id in row["known_ids"]}
        wanted = each * turns(len(row["positive_ids"]), len(row["negative_ids"]), mined)
        generator = random.Random(f"{seed}:{row['query_id']}")
        row["random_ids"] = _draw(generator, wanted, ids, clusters, set(row["negative_ids"]), near)
        if not row["random_ids"]:
            raise TrainingError(
                f"query {row['query_id']!r}: the corpus holds no passage besides its positives and mined negatives, so "
                "none can be a random negative. Set reranker.random_negatives: 0 or give the pipeline more passages"
            )


def turns(positives: int, negatives: int, mined: int) -> int:
    """How many different groups a query gives: one a positive, or more while it has unused negatives."""
    return max(positives, math.ceil(negatives / mined) if mined else 0)


def _draw(
    generator: random.Random,
    wanted: int,
    ids: Sequence[str],
    clusters: Sequence[str],
    blocked: Collection[str],
    near: Collection[str | None],
) -> list[str]:
    drawn: dict[str, None] = {}
    for _ in range(20 * wanted):
        if len(drawn) == wanted:
            break
        at = generator.randrange(len(ids))
        if ids[at] not in blocked and clusters[at] not in near:
            drawn[ids[at]] = None
    if len(drawn) < wanted:
        # So small a corpus that drawing blindly often misses.
        left = [id for id, cluster in zip(ids, clusters, strict=True) if id not in blocked and cluster not in near]
        left = [id for id in left if id not in drawn]
        drawn |= dict.fromkeys(generator.sample(left, min(wanted - len(drawn), len(left))))
    return list(drawn)
