"""Which column of a raw file becomes which of ours, and whether it can."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from embed_pipeline.errors import SourceError
from embed_pipeline.losses import EXAMPLE_KINDS
from embed_pipeline.settings import ColumnSettings, SourceSettings
from embed_pipeline.sources.check import Key, SourceFile

logger = logging.getLogger(__name__)

TEXT_TYPES = ("VARCHAR", "JSON", "ENUM")
_SIGNED = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
INTEGER_TYPES = (*_SIGNED, *(f"U{name}" for name in _SIGNED))
NUMBER_TYPES = (*INTEGER_TYPES, "FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN")
# A column that is null in every row has no type of its own; whether that is an error is decided by its values.
NO_TYPE = '"NULL"'

_EXPECTED = {
    "text": (TEXT_TYPES, "text"),
    "id": ((*TEXT_TYPES, *INTEGER_TYPES, "UUID"), "text or whole numbers"),
    "number": (NUMBER_TYPES, "numbers"),
    "class": ((*TEXT_TYPES, *INTEGER_TYPES, "BOOLEAN"), "text or whole numbers"),
}
_HINTS = {
    "BLOB": "bytes without a text annotation; write the column as strings, e.g. pandas `df[c] = df[c].str.decode()`",
    "DOUBLE": "in pandas an id column with missing values turns into floats; use `Int64` or strings",
    "FLOAT": "in pandas an id column with missing values turns into floats; use `Int64` or strings",
}


@dataclass(frozen=True)
class Column:
    """One of our raw columns (`ours`), the delivered column it comes from, and what it may hold."""

    ours: str
    theirs: str
    holds: str  # text | id | number | class
    required: bool
    setting: str  # the key of the YAML that names it


def wanted_columns(settings: SourceSettings, key: Key) -> list[Column]:
    """The columns looked for in the files of one YAML key, in the order of the raw schema."""
    return [replace(column, setting=f"{settings.where}.{column.setting}") for column in _wanted(settings, key)]


def negative_columns(settings: SourceSettings, delivered: Mapping[str, str]) -> list[str]:
    """The columns of a triplets file that hold negatives: `negative`, then `negative_1`, `negative_2`, ...

    With none of them, `negative` alone, whose absence is told when it is looked for.
    """
    name = settings.columns.negative
    numbered = {
        int(found[1]): column
        for column in delivered
        if (found := re.fullmatch(rf"{re.escape(name)}_(\d+)", column, re.IGNORECASE))
    }
    several = [numbered[number] for number in sorted(numbered)]
    return [name, *several] if name in delivered or not several else several


def as_triplets(wanted: list[Column], negative: str) -> list[Column]:
    """`wanted` of triplets with the negative from another column."""
    return [replace(column, theirs=negative) if column.ours == "negative" else column for column in wanted]


def as_further_negatives(wanted: list[Column], negative: str) -> list[Column]:
    """What is read of a triplets file for a negative besides the first: pairs of the query and what does not answer."""
    kept = [column for column in wanted if column.ours in ("query", "query_id", "split")]
    (first,) = (column for column in wanted if column.ours == "negative")
    return [*kept, replace(first, ours="passage", theirs=negative)]


def _wanted(settings: SourceSettings, key: Key) -> list[Column]:
    if key == "extra_corpus":
        return _corpus(settings.extra_corpus_columns, "extra_corpus_columns", ids_required=False)
    named = settings.columns
    if key == "corpus":
        return _corpus(named, "columns", ids_required=True)
    if key == "queries":
        return [_one("query_id", named.query_id, "id", "query_id"), _one("query", named.text, "text", "text")]
    if key == "qrels":
        return _qrels(named)
    if settings.kind in EXAMPLE_KINDS:
        return _examples(named, settings.kind)
    positive = (named.passage, "passage") if settings.kind == "pairs" else (named.positive, "positive")
    columns = [
        _one("query", named.query, "text", "query"),
        _one("passage", positive[0], "text", positive[1]),
        _optional(named, "query_id", "id"),
        _optional(named, "passage_id", "id"),
        _optional(named, "document_id", "id"),
        _optional(named, "split", "text"),
    ]
    if settings.kind == "triplets":
        return [*columns, _one("negative", named.negative, "text", "negative")]
    return [*columns, _optional(named, "title", "text"), _optional(named, "relevance", "number")]


def _examples(named: ColumnSettings, kind: str) -> list[Column]:
    second = _one("sentence2", named.sentence2 or "sentence2", "text", "sentence2")
    judged = {
        "scored": [_one("score", named.score, "number", "score")],
        "labelled": [_one("label", named.label, "class", "label")],
        "parallel": [],
    }
    return [
        _one("sentence1", named.sentence1, "text", "sentence1"),
        # A class may be given to a single text.
        _optional(named, "sentence2", "text") if kind == "labelled" else second,
        *judged[kind],
        _optional(named, "document_id", "id"),
        _optional(named, "split", "text"),
    ]


def _corpus(named: ColumnSettings, where: str, ids_required: bool) -> list[Column]:
    passage_id = _one("passage_id", named.passage_id, "id", "passage_id", where)
    return [
        passage_id if ids_required else _optional(named, "passage_id", "id", where),
        _one("passage", named.text, "text", "text", where),
        _optional(named, "title", "text", where),
        _optional(named, "document_id", "id", where),
    ]


def _qrels(named: ColumnSettings) -> list[Column]:
    return [
        _one("query_id", named.qrels_query_id or named.query_id, "id", "qrels_query_id"),
        _one("passage_id", named.qrels_passage_id or named.passage_id, "id", "qrels_passage_id"),
        _one("relevance", named.relevance or "score", "number", "relevance"),
        _optional(named, "split", "text"),
    ]


def _one(ours: str, theirs: str, holds: str, key: str, where: str = "columns") -> Column:
    return Column(ours, theirs, holds, required=True, setting=f"{where}.{key}")


def _optional(named: ColumnSettings, ours: str, holds: str, where: str = "columns") -> Column:
    """Used if it is there; required once the YAML gives it another name than ours."""
    given: str | None = getattr(named, ours)
    required = given is not None and given != ColumnSettings.model_fields[ours].default
    return Column(ours, given or ours, holds, required, setting=f"{where}.{ours}")


def match_columns(file: SourceFile, delivered: Mapping[str, str], wanted: list[Column]) -> dict[str, str]:
    """Our column -> delivered column, for those the file has.

    `delivered` maps the file's column names to DuckDB types. Raises SourceError naming file and column where a
    required one is missing or its type cannot be what we need. An optional one is also found where its name differs in
    letter case or invisible characters, which is logged: who delivers `Split` means it to be honoured.
    """
    matched: dict[str, str] = {}
    for column in wanted:
        if column.theirs == "query" and "query" not in delivered and "anchor" in delivered:
            column = replace(column, theirs="anchor")  # sentence-transformers' name for it
        if column.theirs not in delivered:
            if column.required:
                raise SourceError(_missing(file, delivered, column))
            name = the_one_alike(file, column, delivered, "columns")
            if name is None:
                continue
            logger.warning("%s: its column %a is read as '%s' (%s)", file.path, name, column.theirs, column.setting)
            column = replace(column, theirs=name)
        types, expected = _EXPECTED[column.holds]
        found = delivered[column.theirs]
        base = re.sub(r"\(.*", "", found, flags=re.DOTALL)
        if found != NO_TYPE and (base not in types or found.endswith("]")):
            hint = f" ({_HINTS[base]})" if base in _HINTS else ""
            raise SourceError(
                f"{file.path}: column '{column.theirs}' ({column.setting}) holds {found}{hint}, expected {expected}. "
                f"Convert the column, or name another one under {column.setting}"
            )
        matched[column.ours] = column.theirs
    return matched


def the_one_alike(file: SourceFile, column: Column, names: Iterable[str], what: str) -> str | None:
    """The name that `column` has among `names`, whatever its letter case and invisible characters.

    Raises SourceError where several names can be meant.
    """
    found = [name for name in names if alike(name) == alike(column.theirs)]
    if len(found) > 1:
        raise SourceError(
            f"{file.path}: the {what} {' and '.join(f'{name!a}' for name in found)} can both be meant by "
            f"'{column.theirs}' ({column.setting}). Rename one of them"
        )
    return found[0] if found else None


def _missing(file: SourceFile, delivered: Mapping[str, str], column: Column) -> str:
    names = ", ".join(sorted(delivered))
    same = [name for name in delivered if _seen(name) == _seen(column.theirs)]
    folded = {name.lower(): name for name in delivered}
    near = difflib.get_close_matches(column.theirs.lower(), folded, n=1, cutoff=0.5)
    hint = f" Did you mean '{folded[near[0]]}'?" if near else ""
    if same:
        hint = (
            f" {same[0]!a} looks the same as {column.theirs!a} and is not: rename the column in the file, or "
            "copy its name into the YAML"
        )
    return (
        f"{file.path}: no column '{column.theirs}' ({column.setting}). It has: {names}.{hint} "
        f"Name the right one in the YAML: {column.setting}: <column>"
    )


def alike(name: str) -> str:
    """The same for names that a person takes for the same."""
    return _seen(name).casefold()


def _seen(name: str) -> str:
    """A name as it looks: composed, without margins and invisible characters."""
    return "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) not in ("Cc", "Cf")).strip()
