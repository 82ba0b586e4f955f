"""The raw rows as cleaning understands them: what stands for a missing text, which split a row was delivered for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import duckdb

from embed_pipeline.errors import CleaningError
from embed_pipeline.tables import RAW, RAW_EXAMPLES

logger = logging.getLogger(__name__)

# How deliveries call the splits, letter case aside.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "dev": ("dev", "devel", "development", "val", "valid", "validation"),
    "test": ("test", "testing"),
}
# An id or a document may well be called NA or NULL: of these only what pandas writes for a missing one is read so.
_MISSING_IDS = ("nan", "NaN", "NaT", "None", "<NA>")
_IDS = ("query_id", "passage_id", "document_id")
_ORIGIN = ("source", "row_number", "kind")
# Around such a text: spaces, line ends, a byte-order mark.
_MARGIN = " \t\r\n\u00a0\u200b\ufeff"
_SHOWN_VALUES = 5
_SHOWN_CHARACTERS = 80


def view_raw_rows(
    connection: duckdb.DuckDBPyConnection, raw_file: Path, missing_texts: Sequence[str], *, examples: bool = False
) -> None:
    """Create the view `raw`: the rows of `raw_file`, with `row` (their place in it) and `told_split`.

    A text, id, label or split that is one of `missing_texts` is null; what it was is told in `COLUMN_missing`.
    `told_split` is train, dev or test, train where no split was told, and null for an unknown one.
    """
    schema = RAW_EXAMPLES if examples else RAW
    columns = [f.name for f in schema if str(f.type) == "string" and f.name not in _ORIGIN]
    found = {}
    for column in columns:
        texts = [text for text in missing_texts if column not in _IDS or text in _MISSING_IDS]
        trimmed = f"trim({column}, '{_MARGIN}')"
        found[column] = f"CASE WHEN list_contains({_list(texts)}, {trimmed}) THEN {trimmed} END"
    names = " ".join(
        f"WHEN list_contains({_list(names)}, lower(drawn(one_line(split)))) THEN '{split}'"
        for split, names in SPLIT_NAMES.items()
    )
    connection.execute(
        f"""CREATE VIEW raw AS
            SELECT *, CASE WHEN NOT coalesce(is_drawn(split), false) THEN 'train' {names} END AS told_split
            FROM (
                SELECT file_row_number AS row, * EXCLUDE (file_row_number) REPLACE (
                    {", ".join(f"CASE WHEN {found[c]} IS NULL THEN {c} END AS {c}" for c in columns)}),
                    {", ".join(f"{found[c]} AS {c}_missing" for c in columns)}
                FROM stored_in_order({_text(str(raw_file))})
            )"""
    )


def read_as_missing(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, int]]:
    """Column -> text that was read as missing -> rows, of the view `raw`."""
    described = connection.execute("DESCRIBE raw").fetchall()
    columns = [name.removesuffix("_missing") for name, *_ in described if name.endswith("_missing")]
    counts = connection.execute(
        f"""SELECT name, text, count(*) FROM (
                SELECT unnest({_list(columns)}) AS name, unnest([{", ".join(f"{c}_missing" for c in columns)}]) AS text
                FROM raw
            ) WHERE text IS NOT NULL GROUP BY ALL ORDER BY ALL"""
    ).fetchall()
    found: dict[str, dict[str, int]] = {}
    for name, text, rows in counts:
        found.setdefault(name, {})[text] = rows
    if found:
        told = "; ".join(f"{column}: {_counted(texts)}" for column, texts in found.items())
        logger.warning("read as missing: %s. `cleaning.missing_texts` names what is read so", told)
    return found


def split_values(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, int]]:
    """Split -> what it is called in the delivery -> rows, of the view `raw`; in the order of the splits.

    Raises CleaningError where a value names no split.
    """
    counts = connection.execute(
        """SELECT told_split, split, count(*), arg_min(source || ' row ' || row_number, row) FROM raw
           WHERE is_drawn(split) GROUP BY ALL ORDER BY count(*) DESC, split"""
    ).fetchall()
    if unknown := [row for row in counts if row[0] is None]:
        examples = "; ".join(
            f"{value[:_SHOWN_CHARACTERS]!r} in {rows} row(s), the first is {first}"
            for _, value, rows, first in unknown[:_SHOWN_VALUES]
        )
        more = f"; and {len(unknown) - _SHOWN_VALUES} other values" if len(unknown) > _SHOWN_VALUES else ""
        total = connection.execute("SELECT count(*) FROM raw").fetchall()[0][0]
        accepted = "; ".join(f"{', '.join(names)} for {split}" for split, names in SPLIT_NAMES.items())
        raise CleaningError(
            f"the split column names splits that are not known, in {sum(row[2] for row in unknown)} of {total} rows: "
            f"{examples}{more}. Accepted in any letter case: {accepted}; a row without a value is train's. Rename the "
            "values in the files, or remove the column and let `cleaning.split` cut the splits"
        )
    found: dict[str, dict[str, int]] = {}
    for split in SPLIT_NAMES:
        if values := {str(row[1]): int(row[2]) for row in counts if row[0] == split}:
            found[split] = values
    for split, values in found.items():
        if renamed := {value: rows for value, rows in values.items() if value != split}:
            logger.info("read as split %s: %s", split, _counted(renamed))
    return found


def _counted(texts: dict[str, int]) -> str:
    return ", ".join(f"{text!r} in {rows} rows" for text, rows in texts.items())


def _list(texts: Iterable[str]) -> str:
    """A list as SQL: a view takes no parameters."""
    return f"[{', '.join(map(_text, texts))}]::VARCHAR[]"


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
