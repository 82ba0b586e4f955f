"""FlagEmbedding's jsonl (`query, pos, neg, pos_scores, neg_scores, prompt`): a raw row for each text of a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from embed_pipeline.errors import SourceError

_FIELDS = {
    "query": "VARCHAR",
    "pos": "VARCHAR[]",
    "neg": "VARCHAR[]",
    "pos_scores": "DOUBLE[]",
    "neg_scores": "DOUBLE[]",
    "prompt": "VARCHAR",
}
_LINES = f"""(
    SELECT row_number() OVER () - 1 AS row_number, * FROM read_json(
        $path, format = 'newline_delimited', hive_partitioning = false,
        columns = {{{", ".join(f"{name}: '{type}'" for name, type in _FIELDS.items())}}})
)"""


def _texts(field: str, relevance: float) -> str:
    return f"""list_transform(coalesce({field}, []), lambda text, i: {{
        part: '{field}[' || (i - 1) || ']', text: text, relevance: {relevance}, score: {field}_scores[i]}})"""


# One row a text, named by its place in the line. A line without `pos` is a row without passage, which cleaning rejects;
# one without `neg` is no mistake: mining finds some.
ROWS = f"""
    SELECT $source || '#' || found.part AS source, row_number, 'pair' AS kind, query, found.text AS passage,
        found.relevance AS relevance, found.score AS teacher_score
    FROM (SELECT row_number, query, unnest(list_concat(
        CASE WHEN coalesce(len(pos), 0) = 0
            THEN [{{part: 'pos', text: NULL::VARCHAR, relevance: 1.0, score: NULL::DOUBLE}}]
            ELSE {_texts("pos", 1.0)} END, {_texts("neg", 0.0)})) AS found FROM {_LINES})"""


@dataclass(frozen=True)
class Described:
    """What a file holds, in figures."""

    rows: int
    prompt: str | None
    columns: dict[str, str]


def describe(connection: duckdb.DuckDBPyConnection, path: Path, exactly: Sequence[str]) -> Described:
    """Look through the whole file; `exactly` is its path as DuckDB takes it literally.

    Raises SourceError naming file and line where a line is no object of these fields, where scores are not as many as
    texts, and where lines carry several prompts; naming the file where no line has a query or an answer.
    """
    try:
        found = connection.execute(
            f"""SELECT count(*), coalesce(sum(greatest(1, coalesce(len(pos), 0)) + coalesce(len(neg), 0)), 0),
                    count_if(coalesce(len(pos_scores) <> coalesce(len(pos), 0), false)
                          OR coalesce(len(neg_scores) <> coalesce(len(neg), 0), false)),
                    array_agg(DISTINCT nullif(prompt, '')) FILTER (nullif(prompt, '') IS NOT NULL),
                    {", ".join(f"count({name})" for name in _FIELDS)}
                FROM {_LINES}""",
            {"path": list(exactly)},
        ).fetchall()[0]
    except duckdb.Error as error:
        told = _first_bad_line(path) or f"cannot be read as jsonl. DuckDB says: {str(error).splitlines()[0]}"
        raise SourceError(f"{path}: {told}") from error
    lines, rows, unequal, prompts = int(found[0]), int(found[1]), int(found[2]), sorted(found[3] or [])
    if lines == 0:
        raise SourceError(f"{path}: no lines. Remove the file, or build it again")
    if unequal:
        raise SourceError(f"{path}: {_first_bad_line(path)}")
    filled = dict(zip(_FIELDS, found[4:], strict=True))
    for name in ("query", "pos"):
        if not filled[name]:
            raise SourceError(
                f"{path}: no line has `{name}`. Expected FlagEmbedding's fields, one object a line: "
                '{"query": "...", "pos": ["..."], "neg": ["..."]}'
            )
    if len(prompts) > 1:
        raise SourceError(
            f"{path}: lines carry different prompts, {prompts[0]!r} and {prompts[1]!r}. A model has one instruction "
            "for its questions: leave `prompt` out, or give all lines the one that "
            "embedder.encoding.query_instruction_for_retrieval names"
        )
    return Described(rows, prompts[0] if prompts else None, {name: name for name in _FIELDS if filled[name]})


def _first_bad_line(path: Path) -> str | None:
    """What is wrong with the first line that is not as it must be. DuckDB counts lines in more ways than one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and (problem := _problem(line)):
                return f"line {number} (the first is 1): {problem}"
    return None


def _problem(line: bytes) -> str | None:
    if line.startswith(b"\xef\xbb\xbf"):
        return "starts with a byte-order mark. Save the file as UTF-8 without one"
    try:
        found: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error.reason} at byte {error.start}). Write the file as UTF-8"
    except ValueError as error:
        return f"is not JSON: {error}. Expected one object a line"
    if not isinstance(found, dict):
        return f"holds {_kind(found)}, expected an object with query, pos, neg"
    for name, type in _FIELDS.items():
        value = found.get(name)
        if value is None:
            continue
        if type.endswith("[]") != isinstance(value, list):
            return f"`{name}` is {_kind(value)}, expected {'a list' if type.endswith('[]') else 'text'}"
        if type == "DOUBLE[]" and not all(one is None or isinstance(one, int | float) for one in value):
            return f"`{name}` holds something that is no number"
    for name in ("pos", "neg"):
        scores, texts = found.get(f"{name}_scores"), found.get(name) or []
        if scores is not None and len(scores) != len(texts):
            return f"`{name}_scores` has {len(scores)} scores for {len(texts)} texts in `{name}`; expected one for each"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")
