"""A training source as the data set that its loss reads: the columns of `losses.Rows`, in the order they are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Array2D, Dataset, Features, List, Value

from embed_pipeline.errors import TrainingError
from embed_pipeline.training.rows import Group, groups
from embed_pipeline.training.sources import Example, TrainingSource, with_teacher_scores

# The columns of example kinds carry no prompt; query and passages get those of the model's encoding.
QUERY, PASSAGES = "query", ("positive", "negative", "passage", "docs")


@dataclass(frozen=True)
class RowSettings:
    """What decides the rows besides the source."""

    group_size: int
    random_negatives: int = 0


def data_set(source: TrainingSource, settings: RowSettings, embeddings: np.ndarray | None = None) -> Dataset:
    """The rows that `source.loss` learns from.

    `embeddings`, for losses that learn a teacher's: (rows, dimension) or (rows, texts, dimension) float32, as
    `texts_to_embed` orders them. Raises TrainingError where the rows cannot be what the loss needs.
    """
    rows = source.facts.rows[source.kind]
    if rows == "embeddings":
        assert embeddings is not None
        columns = ("sentence1", "sentence2") if source.examples else (QUERY, "positive")
        return _embeddings(columns, texts_to_embed(source, settings), embeddings)
    if source.examples:
        return _examples(source, rows)
    queries = with_teacher_scores(source) if rows.startswith("teacher") else iter(source.queries)
    found = list(groups(queries, settings.group_size, settings.random_negatives))
    if rows in ("group", "hardest"):
        size = settings.group_size if rows == "group" else min(settings.group_size, 2)
        return Dataset.from_dict(_group_columns(found, size))
    if rows == "pair":
        return Dataset.from_dict({QUERY: [g.query for g in found], "positive": [g.positive for g in found]})
    if rows == "triplet":
        _refuse_groups_of_one(source, settings)
        triplets = [(g.query, g.positive, negative) for g in found for negative in g.negatives]
        return Dataset.from_dict(dict(zip((QUERY, "positive", "negative"), zip(*triplets, strict=True), strict=True)))
    if rows == "teacher_group":
        _refuse_groups_of_one(source, settings)
        scores = [list(_taught(source, group.scores)) for group in found]
        return Dataset.from_dict({**_group_columns(found, settings.group_size), "label": scores})
    if rows == "teacher_pair":
        pairs = [(g.query, text, score) for g in found for text, score in zip(_texts(g), g.scores, strict=True)]
    elif rows == "judged":
        pairs = [(g.query, text, float(i == 0)) for g in found for i, text in enumerate(_texts(g))]
    else:
        assert rows == "list", rows
        labels = [[1.0, *[0.0] * len(group.negatives)] for group in found]
        docs = [list(_texts(group)) for group in found]
        return Dataset.from_dict({QUERY: [g.query for g in found], "docs": docs, "labels": labels})
    return Dataset.from_dict(dict(zip((QUERY, "passage", "label"), zip(*pairs, strict=True), strict=True)))


def texts_to_embed(source: TrainingSource, settings: RowSettings) -> list[tuple[str, str]]:
    """The two texts of every row whose embeddings a teacher gives: query and positive, or text and translation."""
    if source.examples:
        return [(one.sentence1, one.sentence2) for one in source.examples if one.sentence2 is not None]
    found = groups(source.queries, 1)
    return [(group.query, group.positive) for group in found]


def classes_of(source: TrainingSource) -> list[str]:
    """The classes of a labelled source, in the order of their numbers. Raises TrainingError for fewer than two."""
    classes = sorted({one.label for one in source.examples if one.label is not None})
    if len(classes) < 2:
        raise TrainingError(
            f"{source.name}: a labelled source needs at least two classes in train; found {classes or 'none'}"
        )
    return classes


def _group_columns(found: Sequence[Group], group_size: int) -> dict[str, list[str]]:
    negatives = {f"negative_{i + 1}": [group.negatives[i] for group in found] for i in range(group_size - 1)}
    return {QUERY: [group.query for group in found], "positive": [group.positive for group in found], **negatives}


def _texts(group: Group) -> tuple[str, ...]:
    return (group.positive, *group.negatives)


def _taught(source: TrainingSource, scores: Iterable[float]) -> Iterable[float]:
    """A teacher's logits as a loss can reach them: margins of cosines lie in -2..2, so MarginMSE learns probabilities.

    A reranker's own scores are logits, so it learns them as they are.
    """
    if source.loss == "MarginMSELoss" and source.facts.reaches_cosines:
        return (1.0 / (1.0 + math.exp(-score)) for score in scores)
    return scores


def _examples(source: TrainingSource, rows: str) -> Dataset:
    examples = source.examples
    first = [one.sentence1 for one in examples]
    second = [one.sentence2 for one in examples]
    if rows == "text_classes":
        if any(text is not None for text in second):
            raise TrainingError(
                f"{source.name}: {source.loss} learns from single texts with a class, but the rows have a sentence2. "
                "Take SoftmaxLoss, or leave the second column out"
            )
        return Dataset.from_dict({"sentence": first, "label": _class_numbers(source, examples)})
    if any(text is None for text in second):
        raise TrainingError(
            f"{source.name}: {source.loss} learns from pairs, but rows have no sentence2. For single texts with a "
            "class take BatchAllTripletLoss"
        )
    pair = {"sentence1": first, "sentence2": second}
    if rows == "scored":
        return Dataset.from_dict({**pair, "label": [one.score for one in examples]})
    if "two_classes" in source.facts.needs:
        return Dataset.from_dict({**pair, "label": _alike(source, examples)})
    return Dataset.from_dict({**pair, "label": _class_numbers(source, examples)})


def _class_numbers(source: TrainingSource, examples: Sequence[Example]) -> list[int]:
    number = {label: i for i, label in enumerate(classes_of(source))}
    return [number[one.label or ""] for one in examples]


def _alike(source: TrainingSource, examples: Sequence[Example]) -> list[float]:
    if any(one.score is None for one in examples):
        raise TrainingError(
            f"{source.name}: {source.loss} needs to know which class means alike. Its classes are "
            f"{', '.join(classes_of(source))}: name one of two under positive_label, or take SoftmaxLoss"
        )
    return [float(one.score or 0.0) for one in examples]


def _embeddings(names: tuple[str, str], texts: Sequence[tuple[str, str]], embeddings: np.ndarray) -> Dataset:
    columns = dict(zip(names, map(list, zip(*texts, strict=True)), strict=True))
    label = List(Value("float32")) if embeddings.ndim == 2 else Array2D(embeddings.shape[1:], "float32")
    features = Features({**{name: Value("string") for name in names}, "label": label})
    return Dataset.from_dict({**columns, "label": list(embeddings)}, features=features)


def _refuse_groups_of_one(source: TrainingSource, settings: RowSettings) -> None:
    if settings.group_size < 2:
        raise TrainingError(f"{source.name}: {source.loss} needs negatives: set train_group_size to 2 or more")
