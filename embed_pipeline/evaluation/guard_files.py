"""The files of a guard set, read whole and checked before any model is loaded.

A `beir` guard is a folder with `corpus`, `queries` and `qrels`, each as parquet or as BEIR has them: `corpus.jsonl`,
`queries.jsonl`, `qrels/<split>.tsv` with a header. A `scored` guard is one parquet file of sentence pairs.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embed_pipeline.artifacts import sha256_of
from embed_pipeline.errors import ConfigurationError, SourceError
from embed_pipeline.settings import ForgettingSettings, GuardSettings
from embed_pipeline.tables import passage_text

Column = list[Any]
# Our name of a column -> the names it may have in a file.
_CORPUS = {"id": ("passage_id", "_id"), "text": ("text",)}
_QUERIES = {"id": ("query_id", "_id"), "text": ("text",)}
_QRELS = {"query": ("query_id", "query-id"), "passage": ("passage_id", "corpus-id"), "score": ("score",)}
_PAIRS = {"first": ("sentence1",), "second": ("sentence2",), "score": ("score",)}


@dataclass(frozen=True)
class RetrievalFiles:
    """The queries of the split that have a relevant passage, what answers them, and the whole corpus."""

    queries: dict[str, str]  # query id -> text
    passages: dict[str, str]  # passage id -> title before text
    qrels: dict[str, dict[str, float]]  # query id -> passage id -> relevance


@dataclass(frozen=True)
class ScoredFile:
    """The sentence pairs of the split."""

    first: list[str]
    second: list[str]
    scores: np.ndarray  # (n,) float64


def check_guards(settings: ForgettingSettings, folder: Path) -> None:
    """Every guard set's files must be there; opens none. `folder` is that of the YAML file.

    Raises ConfigurationError naming the key, the place looked at and what was expected.
    """
    for number, guard in enumerate(settings.guards):
        try:
            _files(guard, folder)
        except ConfigurationError as error:
            raise ConfigurationError(f"forgetting.guards[{number}].path ({guard.name}): {error}") from error


def guard_digest(guard: GuardSettings, folder: Path) -> str:
    """SHA-256 over the contents of a guard set's files. Raises ConfigurationError where one is not there."""
    digest = hashlib.sha256()
    for part, paths in _files(guard, folder).items():
        for path in paths:
            digest.update(f"{part}\0{path.name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


def read_retrieval(guard: GuardSettings, folder: Path) -> RetrievalFiles:
    """Read a `beir` guard.

    Raises SourceError naming the file and what is wrong with it: a missing column, an id that stands twice, a row
    without text, a judgement that points nowhere, a split without a relevant passage.
    """
    files = _files(guard, folder)
    (corpus_path,), (queries_path,) = files["corpus"], files["queries"]
    corpus = _read(corpus_path, _CORPUS, optional=("title",))
    titles = corpus.get("title") or [None] * len(corpus["id"])
    texts = [
        passage_text(title, text)
        for title, text in zip(titles, _texts(corpus_path, "text", corpus["text"]), strict=True)
    ]
    passages = dict(zip(_ids(corpus_path, corpus["id"]), texts, strict=True))
    asked = _read(queries_path, _QUERIES)
    queries = dict(zip(_ids(queries_path, asked["id"]), _texts(queries_path, "text", asked["text"]), strict=True))
    qrels: dict[str, dict[str, float]] = defaultdict(dict)
    for path in files["qrels"]:
        judged = _of_split(path, _read(path, _QRELS, optional=("split",)), guard.split)
        query_ids, passage_ids = ([str(id) for id in judged[key]] for key in ("query", "passage"))
        _refuse_unknown(path, query_ids, queries, queries_path)
        _refuse_unknown(path, passage_ids, passages, corpus_path)
        for query, passage, score in zip(query_ids, passage_ids, _numbers(path, judged["score"]), strict=True):
            qrels[query][passage] = score
    answered = {query: judged for query, judged in sorted(qrels.items()) if max(judged.values()) > 0}
    if not answered:
        raise SourceError(
            f"{files['qrels'][0]}: no query of split '{guard.split or 'any'}' has a passage with a score above 0, so "
            "nothing can be measured. Expected scores above 0 for what is relevant"
        )
    return RetrievalFiles({query: queries[query] for query in answered}, passages, answered)


def read_pairs(guard: GuardSettings, folder: Path) -> ScoredFile:
    """Read a `scored` guard.

    Raises SourceError naming the file and what is wrong with it: a missing column, a row without text or score, one
    score for all pairs.
    """
    ((path,),) = _files(guard, folder).values()
    pairs = _of_split(path, _read(path, _PAIRS, optional=("split",)), guard.split)
    scores = np.array(_numbers(path, pairs["score"]))
    if (scores == scores[0]).all():
        raise SourceError(
            f"{path}: every pair of split '{guard.split or 'any'}' has the score {scores[0]:g}: a rank correlation "
            "needs pairs that are more and less alike"
        )
    return ScoredFile(_texts(path, "sentence1", pairs["first"]), _texts(path, "sentence2", pairs["second"]), scores)


def _files(guard: GuardSettings, folder: Path) -> dict[str, list[Path]]:
    place = folder / guard.path
    if guard.kind == "scored":
        if not place.is_file() or place.suffix != ".parquet":
            raise ConfigurationError(
                f"no parquet file at {place}. A guard of kind scored is one .parquet file with the columns sentence1, "
                "sentence2 and score; the path is relative to the YAML file"
            )
        return {"pairs": [place]}
    if not place.is_dir():
        raise ConfigurationError(
            f"no folder at {place}. A guard of kind beir is a folder with corpus, queries and qrels; the path is "
            "relative to the YAML file"
        )
    return {"corpus": [_one_of(place, "corpus")], "queries": [_one_of(place, "queries")], "qrels": _qrels(guard, place)}


def _one_of(place: Path, name: str) -> Path:
    for path in (place / f"{name}.parquet", place / f"{name}.jsonl"):
        if path.is_file():
            return path
    raise ConfigurationError(f"{place} holds neither {name}.parquet nor {name}.jsonl")


def _qrels(guard: GuardSettings, place: Path) -> list[Path]:
    if (place / "qrels.parquet").is_file():
        return [place / "qrels.parquet"]
    there = sorted((place / "qrels").glob("*.tsv"))
    if not there:
        raise ConfigurationError(f"{place} holds neither qrels.parquet nor qrels/<split>.tsv")
    wanted = [path for path in there if guard.split in (None, path.stem)]
    if not wanted:
        raise ConfigurationError(
            f"no {guard.split}.tsv in {place / 'qrels'}, only {', '.join(path.name for path in there)}. Set the "
            "guard's `split` to one of them, or to null for all"
        )
    return wanted


def _read(path: Path, columns: Mapping[str, Sequence[str]], optional: Sequence[str] = ()) -> dict[str, Column]:
    """Our name -> values, one a row, for the columns wanted and those optional ones that the file has."""
    delivered = _READERS[path.suffix](path)
    if not delivered or not len(next(iter(delivered.values()))):
        raise SourceError(f"{path}: no rows. Build it again, or leave the guard set out")
    found: dict[str, Column] = {}
    for ours, names in {**columns, **{name: (name,) for name in optional}}.items():
        theirs = next((name for name in names if name in delivered), None)
        if theirs is not None:
            found[ours] = delivered[theirs]
        elif ours not in optional:
            wanted = " or ".join(f"'{name}'" for name in names)
            raise SourceError(f"{path}: no column {wanted}; found: {', '.join(delivered)}")
    return found


def _read_parquet(path: Path) -> dict[str, Column]:
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read as parquet: {error}. Copy or build it again") from error
    return {name: table[name].to_pylist() for name in table.schema.names}


def _read_jsonl(path: Path) -> dict[str, Column]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise SourceError(f"{path}, line {number}: not JSON ({error}). Expected one object a line") from error
            if not isinstance(row, dict):
                raise SourceError(f"{path}, line {number}: found a {type(row).__name__}, expected a JSON object")
            rows.append(row)
    names = dict.fromkeys(name for row in rows[:1] for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_tsv(path: Path) -> dict[str, Column]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if line]
    header, rows = (lines[0], lines[1:]) if lines else ([], [])
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise SourceError(f"{path}, line {number}: {len(row)} fields, expected {len(header)} ({', '.join(header)})")
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


_READERS: dict[str, Callable[[Path], dict[str, Column]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".tsv": _read_tsv,
}


def _of_split(path: Path, columns: dict[str, Column], split: str | None) -> dict[str, Column]:
    if split is None or "split" not in columns:
        return columns
    rows = [row for row, found in enumerate(columns["split"]) if found == split]
    if not rows:
        there = ", ".join(sorted({str(found) for found in columns["split"]}))
        raise SourceError(
            f"{path}: no row of split '{split}'; splits found: {there}. Set the guard's `split` to one of them, or to "
            "null for all"
        )
    return {name: [values[row] for row in rows] for name, values in columns.items()}


def _ids(path: Path, values: Column) -> list[str]:
    ids = [str(value) for value in values]
    twice, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise SourceError(f"{path}: the id '{twice}' stands {count} times: which text it means cannot be told")
    return ids


def _texts(path: Path, column: str, values: Column) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise SourceError(f"{path}, row {row} (from 0): `{column}` is {value!r}, expected text")
    return values


def _numbers(path: Path, values: Column) -> list[float]:
    numbers = []
    for row, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SourceError(f"{path}, row {row} of the split (from 0): `score` is {value!r}, expected a number")
        numbers.append(number)
    return numbers


def _refuse_unknown(path: Path, ids: Sequence[str], known: Mapping[str, str], where: Path) -> None:
    unknown = [id for id in ids if id not in known]
    if unknown:
        raise SourceError(
            f"{path}: {len(unknown)} of {len(ids)} judgements name an id that {where.name} does not hold (first: "
            f"'{unknown[0]}'): they point nowhere. Add the missing rows to {where.name}, or remove the judgements"
        )
