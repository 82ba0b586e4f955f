"""What would make a training worthless without stopping it, read off its rows before the first step.

What cannot work raises TrainingError; what costs something is told, and stands in the summary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sentence_transformers import CrossEncoder, SentenceTransformer

from embed_pipeline.errors import TrainingError
from embed_pipeline.models.embedder import encoding_of
from embed_pipeline.training.job import TrainingJob
from embed_pipeline.training.sources import TrainingSource

SAMPLE = 2_000  # texts of a kind that are tokenized
MOST = 0.5
MET = 0.5  # own answers that a question may meet among its batch's negatives before it is told
_CHARACTERS = 20  # of a token at most, so that a book is not tokenized to see that it is too long


@dataclass(frozen=True)
class DataReport:
    truncated: dict[str, float]  # kind of text -> share that is cut
    warnings: list[str]


def check_data(
    job: TrainingJob, model: SentenceTransformer | CrossEncoder, sources: Sequence[TrainingSource]
) -> DataReport:
    """All of it. Raises TrainingError for rows that nothing can be learnt from."""
    settings = job.settings
    needed = settings.train_group_size - 1 - getattr(settings, "random_negatives", 0)
    told = [check_negatives(source, needed) for source in sources]
    if settings.engine == "flag-embedding":
        # Its embedders mix all sources, a row a query; its rerankers know no in-batch negatives.
        pairs = [(query.query, query.positives[0]) for source in sources for query in source.queries]
        if isinstance(model, SentenceTransformer):
            told.append(check_repeats(_columns(pairs), job.source_name, settings.batch_size, apart=False))
    else:
        for source in sources:
            if source.queries and source.facts.sampler.startswith("no_duplicates"):
                pairs = [(q.query, p) for q in source.queries for p in q.positives]
                apart = (settings.batch_sampler or source.facts.sampler).startswith("no_duplicates")
                told.append(check_repeats(_columns(pairs), source.name, settings.batch_size, apart=apart))
    shares = truncated(model, sources, job)
    return DataReport(shares, [*(one for one in told if one is not None), *tell_truncated(shares, job)])


def _columns(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    return {"query": [query for query, _ in pairs], "positive": [positive for _, positive in pairs]}


def check_negatives(source: TrainingSource, needed: int) -> str | None:
    """What to tell of queries for which mining found no negative, where a group takes `needed` of them.

    Raises TrainingError where these are most: random passages in their place teach next to nothing.
    """
    if not needed or not source.queries or source.facts.rows[source.kind] in ("pair", "embeddings"):
        return None
    count = len(source.queries)
    without = sum(query.mined == "none" for query in source.queries)
    random = sum(query.mined == "random" for query in source.queries)
    if without > MOST * count:
        raise TrainingError(
            f"{source.name}: mining found no negative for {without:,} of {count:,} queries. Loosen it: raise "
            "mining.max_score_ratio, mining.top_k or mining.cross_encoder.max_score_ratio, lower mining.range_min or "
            "mining.absolute_margin, set mining.fill_with_random: true; or train with train_group_size: 1. The table "
            "`refused` of hard_negatives says why each candidate was refused"
        )
    if not without + random:
        return None
    return (
        f"{source.name}: {_share(without + random, count)} of the queries have random passages for negatives, because "
        "mining refused everything else. If these are many, loosen mining.max_score_ratio or raise mining.top_k"
    )


def check_repeats(columns: Mapping[str, Sequence[str]], name: str, batch_size: int, apart: bool) -> str | None:
    """What to tell of texts that stand in many rows, where a batch's other rows are negatives.

    `columns`: column -> (rows,) texts, queries and positives. `apart`: equal texts never share a batch, so rows are
    left out; else a query meets its own answer as a negative. Raises TrainingError where no batch can be filled, or
    where most negatives of an average batch would be answers.
    """
    worst: str | None = None
    for column, texts in columns.items():
        counts = np.array(list(Counter(texts).values()))
        rows = int(counts.sum())
        if apart:
            batches = fillable_batches(counts, batch_size)
            left_out = rows // batch_size - batches
            if not batches:
                raise TrainingError(
                    f"{name}: no step can be made: the {rows:,} rows have {len(counts):,} different texts as {column}, "
                    f"a batch needs {batch_size:,}, and equal texts never share a batch. Lower batch_size to "
                    f"{len(counts):,} or less"
                )
            if left_out > 0.1 * (rows // batch_size):
                worst = (
                    f"{name}: at least {_share(left_out, rows // batch_size)} of the batches of an epoch cannot be "
                    f"filled, because equal texts ({column}) never share a batch. Lower batch_size, or merge duplicates"
                )
            continue
        # How likely two rows are to have the same text.
        alike = float((counts * (counts - 1)).sum() / max(1, rows * (rows - 1)))
        if alike > MOST:
            raise TrainingError(
                f"{name}: {_share(alike, 1)} of a batch's negatives would be the query's own {column}, because few "
                "different texts repeat over all rows: in-batch negatives mean nothing. Take engine: "
                "sentence-transformers with batch_sampler: no_duplicates, or bring rows with different texts"
            )
        if alike * (batch_size - 1) > MET:
            worst = (
                f"{name}: in a batch of {batch_size:,} a query meets its own {column} {alike * (batch_size - 1):.1f} "
                "times as a negative. engine: sentence-transformers with batch_sampler: no_duplicates keeps equal "
                "texts apart; a lower batch_size helps too"
            )
    return worst


def fillable_batches(counts: np.ndarray, batch_size: int) -> int:
    """How many batches of different texts can be made at most of texts that stand in so many rows each.

    A text can be in each batch once, so K batches need K * batch_size rows when none counts more than K times.
    """
    low, high = 0, int(counts.sum()) // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(counts, middle).sum()) >= middle * batch_size:
            low = middle
        else:
            high = middle - 1
    return low


def truncated(
    model: SentenceTransformer | CrossEncoder, sources: Sequence[TrainingSource], job: TrainingJob
) -> dict[str, float]:
    """Kind of text -> share that is cut to the maximum length, of a seeded sample: queries and passages, or pairs."""
    generator = np.random.default_rng([job.seed, 8])
    queries = [query for source in sources for query in source.queries]
    chosen = [queries[i] for i in generator.permutation(len(queries))[:SAMPLE]]
    examples = [example for source in sources for example in source.examples]
    of_examples = [examples[i] for i in generator.permutation(len(examples))[:SAMPLE]]
    if isinstance(model, CrossEncoder):
        pairs = [(query.query, query.positives[0]) for query in chosen]
        pairs += [(example.sentence1, example.sentence2 or "") for example in of_examples]
        return _share_longer({"pairs": (pairs, int(model.max_seq_length or 0))}, model)
    assert isinstance(model, SentenceTransformer)
    encoding = encoding_of(model)
    longest = max(encoding.query_max_length or 0, encoding.passage_max_length or 0)
    texts: dict[str, tuple[list[Any], int]] = {
        "queries": ([f"{encoding.query_prompt}{query.query}" for query in chosen], encoding.query_max_length or 0),
        "passages": (
            [f"{encoding.passage_prompt}{query.positives[0]}" for query in chosen],
            encoding.passage_max_length or 0,
        ),
        "sentences": ([example.sentence1 for example in of_examples], longest),
    }
    return _share_longer(texts, model)


def tell_truncated(shares: Mapping[str, float], job: TrainingJob) -> list[str]:
    """What to tell of the kinds of which most are cut."""
    prefix = "encoding." if hasattr(job.settings, "encoding") else ""
    keys = {"queries": f"{prefix}query_max_length", "pairs": "query_max_length and passage_max_length"}
    return [
        f"{_share(share, 1)} of the {kind} are cut to the maximum length: what stands behind it is neither learnt nor "
        f"found. Raise {keys.get(kind, prefix + 'passage_max_length')}, take a base model for longer texts, or cut "
        "documents into passages"
        for kind, share in shares.items()
        if share > MOST
    ]


def _share_longer(texts: Mapping[str, tuple[list[Any], int]], model: Any) -> dict[str, float]:
    found = {}
    for kind, (sample, limit) in texts.items():
        if not sample or not limit:
            continue
        most = limit * _CHARACTERS
        short = [tuple(part[:most] for part in one) if isinstance(one, tuple) else one[:most] for one in sample]
        lengths = [len(tokens) for tokens in model.tokenizer(short, truncation=False, verbose=False)["input_ids"]]
        found[kind] = round(sum(length > limit for length in lengths) / len(lengths), 4)
    return found


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3g} %"
