"""FlagEmbedding's jsonl (`query, pos, neg, pos_scores, neg_scores, prompt`): a raw row for each text of a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


def _lines(types: Mapping[str, str]) -> str:
    columns = ", ".join(f"{name}: '{type}'" for name, type in types.items())
    return f"""(
        SELECT row_number() OVER () - 1 AS row_number, * FROM read_json(
            $path, format = 'newline_delimited', hive_partitioning = false, columns = {{{columns}}})
    )"""


# DuckDB would take an object, a list or a number for its text: what a field holds is looked at first.
_AS_WRITTEN = _lines(dict.fromkeys(_FIELDS, "JSON"))
_TEXT, _NUMBER = "('VARCHAR', 'NULL')", "('UBIGINT', 'BIGINT', 'DOUBLE', 'NULL')"


def _is_wrong(field: str, type: str) -> str:
    if not type.endswith("[]"):
        return f"coalesce(json_type({field}), 'NULL') NOT IN {_TEXT}"
    one = _TEXT if type == "VARCHAR[]" else _NUMBER
    return f"""(coalesce(json_type({field}), 'NULL') NOT IN ('ARRAY', 'NULL')
        OR coalesce(list_bool_or(list_transform(json_extract({field}, '$[*]'),
            lambda one: json_type(one) NOT IN {one})), false))"""


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
            ELSE {_texts("pos", 1.0)} END, {_texts("neg", 0.0)})) AS found FROM {_lines(_FIELDS)})"""


MOST_BYTES = 16 * 2**20  # of a line, for DuckDB
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"BZh": "compressed (bzip2)",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet (kind: pairs or triplets)",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass(frozen=True)
class Described:
    """What a file holds, in figures."""

    rows: int
    prompt: str | None
    columns: dict[str, str]


def describe(connection: duckdb.DuckDBPyConnection, path: Path, exactly: Sequence[str]) -> Described:
    """Look through the whole file; `exactly` is its path as DuckDB takes it literally.

    Raises SourceError naming file and line where a line is no object of these fields, where scores are not as many as
    texts, and where lines carry several prompts; naming the file where no line has a query or an answer, or where it
    is of another format. A file without lines has no rows.
    """
    _refuse_other_formats(path)
    count = "coalesce(json_array_length({}), 0)".format
    try:
        found = connection.execute(
            f"""SELECT count(*), coalesce(sum(greatest(1, {count("pos")}) + {count("neg")}), 0),
                    count_if({" OR ".join(_is_wrong(name, type) for name, type in _FIELDS.items())}),
                    count_if(coalesce(json_array_length(pos_scores) <> {count("pos")}, false)
                          OR coalesce(json_array_length(neg_scores) <> {count("neg")}, false)),
                    array_agg(DISTINCT prompt ->> '$') FILTER (coalesce(prompt ->> '$', '') <> ''),
                    {", ".join(f"count_if(coalesce(json_type({name}), 'NULL') <> 'NULL')" for name in _FIELDS)}
                FROM {_AS_WRITTEN}""",
            {"path": list(exactly)},
        ).fetchall()[0]
    except duckdb.Error as error:
        told = (
            _first_bad_line(path)
            or _too_long(path)
            or f"cannot be read as jsonl. DuckDB says: {str(error).splitlines()[0]}"
        )
        raise SourceError(f"{path}: {told}") from error
    lines, rows, wrong, unequal, prompts = (*(int(number or 0) for number in found[:4]), sorted(found[4] or []))
    if lines == 0:
        return Described(0, None, {})
    if wrong or unequal:
        raise SourceError(f"{path}: {_first_bad_line(path)}")
    filled = dict(zip(_FIELDS, found[5:], strict=True))
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


def _refuse_other_formats(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(4)
    for magic, format in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise SourceError(f"{path}: is {format}, expected jsonl: UTF-8 text, one object a line")


def _first_bad_line(path: Path) -> str | None:
    """What is wrong with the first line that is not as it must be. DuckDB counts lines in more ways than one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and (problem := _problem(line)):
                return f"line {number} (the first is 1): {problem}"
    return None


def _too_long(path: Path) -> str | None:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if len(line) > MOST_BYTES:
                return (
                    f"line {number} (the first is 1): is {len(line) / 2**20:.0f} MB long, and at most "
                    f"{MOST_BYTES // 2**20} MB are read as one line. Cut its texts, or leave it out"
                )
    return None


def _problem(line: bytes) -> str | None:
    if line.startswith(b"\xef\xbb\xbf"):
        return "starts with a byte-order mark. Save the file as UTF-8 without one"
    try:
        found: Any = json.loads(line.decode(), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 ({error.reason} at byte {error.start}). Write the file as UTF-8"
    except _RepeatedError as error:
        return f"has the key `{error}` twice. Leave one"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}. Expected one object a line"
    if not isinstance(found, dict):
        return f"holds {_kind(found)}, expected an object with query, pos, neg"
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return f"holds half a character, {half} without its other half: a text that was cut. Write it anew"
    for name, type in _FIELDS.items():
        value = found.get(name)
        if value is not None and (problem := _problem_of(name, type, value)):
            return problem
    for name in ("pos", "neg"):
        scores, texts = found.get(f"{name}_scores"), found.get(name) or []
        if scores is not None and len(scores) != len(texts):
            return f"`{name}_scores` has {len(scores)} scores for {len(texts)} texts in `{name}`; expected one for each"
    return None


def _problem_of(name: str, type: str, value: Any) -> str | None:
    if not type.endswith("[]"):
        return None if isinstance(value, str) else f"`{name}` is {_kind(value)}, expected text"
    what, expected = ("text", str) if type == "VARCHAR[]" else ("a number", (int, float))
    if not isinstance(value, list):
        return f"`{name}` is {_kind(value)}, expected a list, each of it {what}"
    for place, one in enumerate(value):
        if one is not None and (not isinstance(one, expected) or isinstance(one, bool)):
            return f"`{name}[{place}]` is {_kind(one)}, expected {what}"
    return None


class _RepeatedError(Exception):
    """A key that stands twice in one object."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedError(key)
        found[key] = value
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")
