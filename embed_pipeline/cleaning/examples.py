"""Scored, labelled and parallel rows -> examples in splits that keep test honest, every dropped row with its reason."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from embed_pipeline.cleaning import reasons
from embed_pipeline.cleaning.clean import BATCH_ROWS
from embed_pipeline.cleaning.elsewhere import Apart, CleanedSource, reject_shared
from embed_pipeline.cleaning.normalise import casefolded, create_macros
from embed_pipeline.cleaning.raw_rows import read_as_missing, split_values, view_raw_rows
from embed_pipeline.cleaning.rows import MEMORY_LIMIT, refuse_empty, reject
from embed_pipeline.cleaning.splits import LARGE_GROUP_QUERIES, LARGE_GROUP_SHARE, assign_groups, linked_groups
from embed_pipeline.errors import CleaningError
from embed_pipeline.settings import CleaningSettings, SourceSettings
from embed_pipeline.tables import (
    EXAMPLES,
    EXAMPLES_FILE,
    REJECTED_EXAMPLES,
    REJECTED_EXAMPLES_FILE,
    SPLITS,
    connect,
    write_stream,
)

logger = logging.getLogger(__name__)

# Texts are kept in one split each where that costs no more than this share of train (delivered splits), or leaves more
# than MOST of the rows in groups that can be divided; where sentences stand in many pairs, pairs are.
MOST_LOST = 0.2
MOST = 0.5

_SINGLE = "(SELECT count(sentence2) = 0 FROM rows)"
# Rows that say the same: a score holds for both orders of two sentences, a class or a translation for the one given.
_SAME = {
    "scored": "least(first, second) || chr(0) || greatest(first, second)",
    "labelled": "first || chr(0) || coalesce(second, '')",
    "parallel": "first || chr(0) || second",
}

_ALIKE = {("0", "1"): "1", ("false", "true"): "true"}
# Ways to write the same two classes; where files differ in theirs, they become 0 and 1.
_TWO_CLASSES = ({"0": "0", "1": "1"}, {"false": "0", "true": "1"}, {"no": "0", "yes": "1"})
# A few scores outside of the scale are mistakes, and rejected; more than this share of them, and the scale is wrong.
MOST_OUTSIDE = 0.05


class ExamplesReport(BaseModel):
    """What became of the raw rows of one source. `raw_rows` = `kept_rows` + `rejected_rows`."""

    kind: Literal["scored", "labelled", "parallel"]
    raw_rows: int
    kept_rows: int
    rejected_rows: int
    rejected_by_reason: dict[str, int]  # in the order of reasons.EXAMPLE_REASONS
    examples_by_split: dict[str, int]
    classes: dict[str, int]  # labelled: class -> rows, the 100 most frequent
    class_spellings: dict[str, list[str]]  # labelled: class -> how else it was spelled, for those that had several
    scores_by_split: dict[str, float]  # scored: the mean, 0..1
    apart: Apart  # what stands in one split only: every text, or every pair (in both orders)
    shared_texts: float  # share of the distinct dev and test texts that stand in train as well; 0 where texts are apart
    groups: int  # of rows that may not be divided over splits
    largest_group: int
    delivered_splits: list[str]
    split_values: dict[str, dict[str, int]]  # split -> what it is called in the delivery -> rows
    read_as_missing: dict[str, dict[str, int]]  # column -> text that stands for a missing one -> rows
    split_leaks: int
    elsewhere_leaks: int


def clean_examples(
    raw_file: Path,
    source: SourceSettings,
    settings: CleaningSettings,
    seed: int,
    out: Path,
    *,
    before: Sequence[CleanedSource] = (),
) -> ExamplesReport:
    """Clean `raw_file` (schema `tables.RAW_EXAMPLES`) into `examples.parquet` and `rejected_examples.parquet` in `out`.

    The same rows, settings and seed give the same bytes. Two texts are the same when letter case, punctuation, width
    and spaces are put aside. Of rows of one split that say the same the first stays; where they say something else (two
    scores, two classes) all go. Order counts for classes and translations, not for scores. Two classes that say whether
    sentences are alike contradict each other in either order.

    Delivered splits are honoured, and train gives way where it leaks into dev or test; missing splits are cut from
    train by a seeded hash. No text stands in two splits, however its words are ordered, unless texts stand in so many
    pairs that this would cost more than a fifth of train (delivered), or leave most rows in one group (cut): then no
    two texts stand together in two splits, in either order, and the report tells the share of texts that train shares.
    Documents stay in one split in any case.

    `before`: sources cleaned before, see `elsewhere`. They may leave dev or test without a row.

    Raises CleaningError where scores are on another scale than `score_range` says, fewer than two classes are left, no
    row is left of a split, or its groups cannot be divided.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".cleaning-") as work:
        connection = connect(
            str(Path(work) / "work.duckdb"), config={"memory_limit": MEMORY_LIMIT, "temp_directory": work}
        )
        with connection:
            create_macros(connection)
            refuse_left_empty = partial(
                refuse_empty,
                connection,
                settings,
                left_in="live",
                what="row",
                known=reasons.EXAMPLE_REASONS,
            )
            view_raw_rows(connection, raw_file, settings.missing_texts, examples=True)
            delivered, missing = split_values(connection), read_as_missing(connection)
            _load(connection, source)
            _refuse_other_scale(connection, source)
            spellings = _one_spelling_a_class(connection)
            _reject_bad_rows(connection, source, settings)
            _reject_repeated(connection, source)
            _create_links(connection)
            apart = _remove_leaks(connection)
            refuse_left_empty([*delivered])
            apart = _cut_missing_splits(connection, settings, seed, apart)
            refuse_left_empty([*SPLITS])
            if before:
                connection.execute(
                    """CREATE TABLE own_texts AS SELECT DISTINCT row, split, what, key
                       FROM live JOIN links USING (row) WHERE what <> 'document'"""
                )
                reject_shared(connection, before, apart)
                refuse_left_empty([])
            if source.kind == "labelled":
                _score_classes(connection, source)
            _create_results(connection, apart)
            report = _write(connection, source, apart, delivered, missing, out)
            return report.model_copy(update={"class_spellings": spellings})


def _load(connection: duckdb.DuckDBPyConnection, source: SourceSettings) -> None:
    """`rows` of the view `raw`: texts as every later stage sees them, also folded (`first`, `second`), scores 0..1."""
    low, high = source.score_range or (0.0, 1.0)
    connection.execute(
        """
        CREATE TABLE rows AS
        SELECT *, folded(sentence1) AS first, folded(sentence2) AS second
        FROM (
            SELECT row, source, row_number, 'example' AS kind, lines(sentence1) AS sentence1,
                lines(sentence2) AS sentence2, score AS delivered_score, (score - $low) / ($high - $low) AS score,
                one_line(label) AS label, named(document_id) AS document_id, told_split AS split,
                sentence1_missing, sentence2_missing, label_missing
            FROM raw
        )
        """,
        {"low": low, "high": high},
    )
    connection.execute("CREATE TABLE rejections (row BIGINT, reason VARCHAR, detail VARCHAR)")
    connection.execute("CREATE VIEW live AS SELECT * FROM rows WHERE row NOT IN (SELECT row FROM rejections)")


def _refuse_other_scale(connection: duckdb.DuckDBPyConnection, source: SourceSettings) -> None:
    if source.kind != "scored":
        return
    rows, scores, outside, low, high = connection.execute(
        """SELECT count(*), count_if(isfinite(delivered_score)),
               count_if(isfinite(delivered_score) AND score NOT BETWEEN 0 AND 1),
               min(delivered_score) FILTER (isfinite(delivered_score)),
               max(delivered_score) FILTER (isfinite(delivered_score))
           FROM rows"""
    ).fetchall()[0]
    if not scores:
        raise CleaningError(
            f"{source.where}.columns.score: none of the {rows} scores is a number, all are null, NaN or infinite. Name "
            "the column that holds how alike the sentences are, or mend it"
        )
    if outside > scores * MOST_OUTSIDE:
        told = f"{list(source.score_range)}" if source.score_range else "0 to 1, which holds where no range is given"
        if low < high:
            scale = f"they run from {_number(low)} to {_number(high)}"
        else:
            scale = f"all are {_number(low)}, which tells no scale"
            low, high = (
                min(low, (source.score_range or (0.0, 1.0))[0]),
                max(high, (source.score_range or (0.0, 1.0))[1]),
            )
        raise CleaningError(
            f"{source.where}.score_range: {outside} of {scores} scores lie outside {told}; {scale}. Name the scale "
            f"they were given on, e.g. score_range: [{_number(low)}, {_number(high)}]. Up to "
            f"{MOST_OUTSIDE:.0%} of them may be mistakes: those rows are rejected"
        )


def _number(value: float) -> str:
    """As YAML reads it back, to the last digit."""
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    digits, e, exponent = repr(value).partition("e")
    return digits + ("" if "." in digits or not e else ".0") + e + exponent


def _one_spelling_a_class(connection: duckdb.DuckDBPyConnection) -> dict[str, list[str]]:
    """Letter case and width make no class, nor does it whether a file holds booleans, 0 and 1, or yes and no.

    The most frequent spelling stands for all of them. Returns class -> its other spellings, where it has any.
    """
    found = connection.execute(
        "SELECT label FROM rows WHERE label IS NOT NULL GROUP BY label ORDER BY count(*) DESC, label"
    ).fetchall()
    keys = {row[0]: casefolded(row[0]) for row in found}
    ways = [way for way in _TWO_CLASSES if way.keys() & set(keys.values())]
    spelled = {key: spelling for spelling, key in reversed(keys.items())}
    if len(ways) > 1 and all(any(key in way for way in ways) for key in keys.values()):
        spelled = {key: way[key] for way in ways for key in way}
    changed = {spelling: spelled[key] for spelling, key in keys.items() if spelled[key] != spelling}
    if changed:
        connection.register("one_spelling", pa.table({"label": list(changed), "spelled": list(changed.values())}))
        connection.execute("UPDATE rows SET label = spelled FROM one_spelling o WHERE o.label = rows.label")
        connection.unregister("one_spelling")
    others: dict[str, list[str]] = {}
    for spelling, stands in changed.items():
        others.setdefault(stands, []).append(spelling)
    for stands, spellings in others.items():
        logger.info("class '%s' stands for %s as well", stands, ", ".join(f"'{one}'" for one in spellings))
    return others


def _reject_bad_rows(connection: duckdb.DuckDBPyConnection, source: SourceSettings, settings: CleaningSettings) -> None:
    # Classes may be given to single texts, but then to all of them.
    alone = f"('{source.kind}' = 'labelled' AND {_SINGLE})"
    reject(
        connection,
        reasons.MISSING_TEXT,
        " UNION ALL ".join(
            f"SELECT row, '{text} \"' || {text}_missing || '\"' AS detail FROM live WHERE {where}"
            for text, where in (
                ("sentence1", "sentence1_missing IS NOT NULL"),
                ("sentence2", f"sentence2_missing IS NOT NULL AND NOT {alone}"),
            )
        ),
    )
    reject(
        connection,
        reasons.EMPTY_SENTENCE,
        f"""SELECT row, CASE WHEN sentence1 IS NULL THEN 'sentence1' ELSE 'sentence2' END AS detail FROM rows
            WHERE sentence1 IS NULL OR sentence2 IS NULL AND NOT {alone}""",
    )
    for reason, wrong in (
        (reasons.SENTENCE_TOO_SHORT, f"< {settings.passage_min_characters}"),
        (reasons.SENTENCE_TOO_LONG, f"> {settings.passage_max_characters}"),
    ):
        checks = " UNION ALL ".join(
            f"SELECT row, '{text}: ' || length({text}) || ' characters' AS detail FROM live "
            f"WHERE length({text}) {wrong}"
            for text in ("sentence1", "sentence2")
        )
        reject(connection, reason, checks)
    if source.kind == "labelled":
        missing = "'label \"' || label_missing || '\"'"
        reject(connection, reasons.MISSING_LABEL, f"SELECT row, {missing} AS detail FROM live WHERE label IS NULL")
    if source.kind == "scored":
        score = "'score ' || coalesce(delivered_score::VARCHAR, 'null') AS detail"
        for reason, found in (
            (reasons.INVALID_SCORE, "delivered_score IS NULL OR NOT isfinite(delivered_score)"),
            (reasons.SCORE_OUT_OF_RANGE, "score NOT BETWEEN 0 AND 1"),
        ):
            reject(connection, reason, f"SELECT row, {score} FROM live WHERE {found}")


def _reject_repeated(connection: duckdb.DuckDBPyConnection, source: SourceSettings) -> None:
    """Within a split; what stands in two splits is a leak, and there the split that goes before decides."""
    same = _SAME[source.kind]
    said = {"scored": "delivered_score", "labelled": "label"}.get(source.kind)
    # That two sentences are alike holds in both orders. Other classes, such as entailment, hold for one.
    about = _SAME["scored"] if _tells_alike(connection, source) else same
    if said is not None:
        reject(
            connection,
            reasons.CONTRADICTION,
            f"""SELECT row, said AS detail FROM (
                    SELECT row, {about} AS same, split FROM live
                ) JOIN (
                    SELECT {about} AS same, split, array_to_string(list_sort(list(DISTINCT {said})), ' and ') AS said
                    FROM live GROUP BY ALL HAVING count(DISTINCT {said}) > 1
                ) USING (same, split)""",
        )
    reject(
        connection,
        reasons.DUPLICATE,
        f"""SELECT row, 'of ' || first_source || ' row ' || first_row AS detail FROM (
                SELECT row, row_number() OVER same_rows AS place, first_value(source) OVER same_rows AS first_source,
                    first_value(row_number) OVER same_rows AS first_row
                FROM live WINDOW same_rows AS (PARTITION BY {same}, split ORDER BY row)
            ) WHERE place > 1""",
    )


def _tells_alike(connection: duckdb.DuckDBPyConnection, source: SourceSettings) -> bool:
    """Whether the classes are given to pairs, and say whether these are alike or not."""
    if source.kind != "labelled" or connection.execute(f"SELECT {_SINGLE}").fetchall()[0][0]:
        return False
    found = connection.execute("SELECT DISTINCT label FROM live ORDER BY label").fetchall()
    return source.positive_label is not None or tuple(row[0].lower() for row in found) in _ALIKE


def _create_links(connection: duckdb.DuckDBPyConnection) -> None:
    """`links`: row, what (texts, pairs, document), key: what a row must not have in common with another split."""
    connection.execute(
        """CREATE TABLE links AS
           SELECT row, 'texts' AS what, unnest(list_distinct(
               list_concat(text_keys(first), coalesce(text_keys(second), [])))) AS key FROM live
           UNION ALL SELECT row, 'pairs', unnest(pair_keys(first, second)) FROM live WHERE second IS NOT NULL
           UNION ALL SELECT row, 'document', document_id FROM live WHERE document_id IS NOT NULL"""
    )


def _leaks(split: str, apart: Apart) -> str:
    """Rows of `split` that share something with a split that goes before."""
    held_out = "('test')" if split == "dev" else "('test', 'dev')"
    return f"""
        WITH linked AS (SELECT * FROM live JOIN links USING (row) WHERE what IN ('{apart}', 'document')),
        held AS (
            SELECT what, key, arg_max(split, (split, -row)) AS held_split,
                arg_max(source, (split, -row)) AS held_source, arg_max(row_number, (split, -row)) AS held_row
            FROM linked WHERE split IN {held_out} GROUP BY what, key
        )
        SELECT row, 'shares its ' || CASE what WHEN 'document' THEN 'document' WHEN 'pairs' THEN 'pair' ELSE 'text' END
            || ' with ' || held_split || ', ' || held_source || ' row ' || held_row AS detail
        FROM linked JOIN held USING (what, key) WHERE split = '{split}'"""


def _remove_leaks(connection: duckdb.DuckDBPyConnection) -> Apart:
    """Of delivered splits test keeps all it has, then dev; returns what could be kept apart."""
    counts = dict(connection.execute("SELECT split, count(*) FROM live GROUP BY split").fetchall())
    apart: Apart = "texts"
    if len(counts) > 1 and not connection.execute(f"SELECT {_SINGLE}").fetchall()[0][0]:
        for split in ("dev", "train"):
            lost = connection.execute(f"SELECT count(DISTINCT row) FROM ({_leaks(split, 'texts')})").fetchall()[0][0]
            if lost > MOST_LOST * counts.get(split, 0):
                apart = "pairs"
    for split in ("dev", "train"):
        reject(connection, reasons.SPLIT_LEAK, _leaks(split, apart))
    return apart


def _cut_missing_splits(
    connection: duckdb.DuckDBPyConnection, settings: CleaningSettings, seed: int, apart: Apart
) -> Apart:
    """Cut test and dev from train's groups where none was delivered; returns what could be kept apart."""
    present = {row[0] for row in connection.execute("SELECT DISTINCT split FROM live").fetchall()}
    shares = {"test": settings.split.test, "dev": settings.split.dev}
    wanted = {split: share for split, share in shares.items() if share > 0 and split not in present}
    if not wanted:
        return apart
    single = connection.execute(f"SELECT {_SINGLE}").fetchall()[0][0]
    levels: tuple[Apart, ...] = ("texts", "pairs") if apart == "texts" and not single else (apart,)
    for level in levels:
        rows, labels, places = linked_groups(connection, f"{_linked(level)} AND split = 'train'", seed)
        sizes = np.bincount(labels)
        large = sizes > max(LARGE_GROUP_QUERIES, LARGE_GROUP_SHARE * sizes.sum())
        apart = level
        if len(sizes) > len(wanted) and sizes[large].sum() <= MOST * sizes.sum():
            break
    chosen = assign_groups(places, sizes, wanted)
    if chosen is None:
        raise CleaningError(
            f"cannot cut {' and '.join(wanted)} from train: its {len(rows)} rows form {len(sizes)} group(s) that share "
            f"a document or a text, and {len(wanted) + 1} are needed. Leave `columns.document_id` out or choose a "
            "finer one, or deliver a `split` column"
        )
    split_of = pa.table({"row": pa.array(rows.tolist(), pa.int64()), "split": pa.array(chosen[labels], pa.string())})
    connection.register("found_splits", split_of)
    connection.execute("UPDATE rows SET split = f.split FROM found_splits f WHERE f.row = rows.row")
    connection.unregister("found_splits")
    return apart


def _linked(apart: Apart) -> str:
    """What `linked_groups` reads: a row is its query."""
    return f"SELECT row AS query_id, what, key FROM links JOIN live USING (row) WHERE what IN ('{apart}', 'document')"


def _score_classes(connection: duckdb.DuckDBPyConnection, source: SourceSettings) -> None:
    """Pairs of two classes are alike (1) or not (0), where it is known which class means that."""
    found = connection.execute("SELECT DISTINCT label FROM live WHERE split = 'train' ORDER BY label").fetchall()
    classes = [row[0] for row in found]
    if len(classes) < 2:
        raise CleaningError(
            f"{source.where}: train has one class, '{classes[0]}', and nothing to tell it from. Name the column that "
            f"holds the class under {source.where}.columns.label, or deliver rows of other classes"
        )
    rows = connection.execute("SELECT count(*) FROM live WHERE split = 'train'").fetchall()[0][0]
    if rows == len(classes) > 2:
        raise CleaningError(
            f"{source.where}.columns.label: each of the {rows} rows of train has a class of its own, e.g. "
            f"'{classes[0]}': nothing can be learnt from that. Name the column that holds the class"
        )
    alike = source.positive_label
    if alike is not None and alike not in classes:
        meant = connection.execute(
            "SELECT min(label) FROM live WHERE class_key(label) = class_key(trim($alike))", {"alike": alike}
        ).fetchall()[0][0]
        alike = meant or alike
    if alike is not None and (alike not in classes or len(classes) > 2):
        told = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise CleaningError(
            f"{source.where}.positive_label: expected one of two classes, found '{alike}'. The classes are: {told}"
        )
    if alike is None:
        alike = _ALIKE.get(tuple(name.lower() for name in classes))
    if alike is not None:
        connection.execute(
            "UPDATE rows SET score = (lower(label) = lower($alike))::DOUBLE WHERE sentence2 IS NOT NULL",
            {"alike": alike},
        )


def _create_results(connection: duckdb.DuckDBPyConnection, apart: Apart) -> None:
    connection.execute(
        """CREATE TABLE named AS SELECT *, 'e-' || short_hash(
               sentence1 || chr(0) || coalesce(sentence2, '')) AS example_id FROM live"""
    )
    rows, labels, _ = linked_groups(connection, _linked(apart), seed=0)
    connection.register(
        "found_groups",
        pa.table({"row": pa.array(rows.tolist(), pa.int64()), "component": pa.array(labels.tolist(), pa.int64())}),
    )
    connection.execute(
        """CREATE TABLE out_examples AS SELECT row, example_id, sentence1, sentence2, score, label, split,
               min(example_id) OVER (PARTITION BY component) AS group_id
           FROM named JOIN found_groups USING (row)"""
    )
    connection.unregister("found_groups")


def _write(
    connection: duckdb.DuckDBPyConnection,
    source: SourceSettings,
    apart: Apart,
    delivered: dict[str, dict[str, int]],
    missing: dict[str, dict[str, int]],
    out: Path,
) -> ExamplesReport:
    def counts(query: str) -> dict[str, int]:
        return {str(name): int(count) for name, count in connection.execute(query).fetchall()}

    def one(query: str) -> int:
        return int(connection.execute(query).fetchall()[0][0])

    raw_rows, kept = one("SELECT count(*) FROM rows"), one("SELECT count(*) FROM out_examples")
    rejected, distinct = connection.execute("SELECT count(*), count(DISTINCT row) FROM rejections").fetchall()[0]
    if rejected != distinct or raw_rows != kept + rejected:
        raise CleaningError(
            f"accounting does not add up: {raw_rows} raw rows, {kept} kept, {rejected} rejections of {distinct} rows. "
            "This is a mistake in embed_pipeline, not in the data; please report it"
        )
    for query, schema, name in (
        ("SELECT * FROM out_examples ORDER BY example_id", EXAMPLES, EXAMPLES_FILE),
        (
            "SELECT * FROM rejections JOIN rows USING (row) ORDER BY source, row_number",
            REJECTED_EXAMPLES,
            REJECTED_EXAMPLES_FILE,
        ),
    ):
        write_stream(connection.sql(query).to_arrow_reader(BATCH_ROWS), schema, out / name)
    by_reason = counts("SELECT reason, count(*) FROM rejections GROUP BY reason")
    by_split = counts("SELECT split, count(*) FROM out_examples GROUP BY split")
    means = connection.execute("SELECT split, round(avg(score), 6) FROM out_examples GROUP BY split").fetchall()
    classes = "SELECT label, count(*) AS n FROM out_examples GROUP BY label ORDER BY n DESC, label LIMIT 100"
    shared = connection.execute(
        """WITH texts AS (
               SELECT DISTINCT key, split = 'train' AS trained FROM links JOIN live USING (row) WHERE what = 'texts'
           ), held AS (SELECT key FROM texts WHERE NOT trained)
           SELECT count(*), count(*) FILTER (key IN (SELECT key FROM texts WHERE trained)) FROM held"""
    ).fetchall()[0]
    return ExamplesReport(
        kind=source.kind,
        raw_rows=raw_rows,
        kept_rows=kept,
        rejected_rows=rejected,
        rejected_by_reason={reason: by_reason[reason] for reason in reasons.EXAMPLE_REASONS if reason in by_reason},
        examples_by_split={split: by_split.get(split, 0) for split in SPLITS},
        classes=counts(classes) if source.kind == "labelled" else {},
        class_spellings={},
        scores_by_split={split: float(mean) for split, mean in sorted(means)} if source.kind == "scored" else {},
        apart=apart,
        shared_texts=shared[1] / max(1, shared[0]),
        groups=one("SELECT count(DISTINCT group_id) FROM out_examples"),
        largest_group=one("SELECT max(n) FROM (SELECT count(*) AS n FROM out_examples GROUP BY group_id)"),
        delivered_splits=[*delivered],
        split_values=delivered,
        read_as_missing=missing,
        split_leaks=by_reason.get(reasons.SPLIT_LEAK, 0),
        elsewhere_leaks=sum(by_reason.get(r, 0) for r in (reasons.HELD_OUT_ELSEWHERE, reasons.TRAINED_ON_ELSEWHERE)),
    )
