"""Whether anything that evaluation asks was trained on: read from the rows that training got, not from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embed_pipeline.cleaning.normalise import create_macros
from embed_pipeline.tables import (
    EXAMPLES_FILE,
    HARD_NEGATIVES_FILE,
    PASSAGES_FILE,
    QRELS_FILE,
    QUERIES_FILE,
    connect,
    extra_folder,
    source_folder,
)


def held_out_queries_among(trained: Path, cleaned: Path) -> list[str]:
    """query_ids of dev and test in `cleaned` (a cleaned_pairs folder) that `trained` (parquet with query_id) holds."""
    return _ids(
        "SELECT DISTINCT query_id FROM stored($trained) SEMI JOIN "
        "(SELECT query_id FROM stored($queries) WHERE split <> 'train') USING (query_id) ORDER BY query_id",
        {"trained": str(trained), "queries": str(cleaned / QUERIES_FILE)},
    )


def seen_in_training(trained: Path, trained_cleaned: Path, cleaned: Path) -> list[str]:
    """query_ids of `cleaned`'s test split that a model has seen, whichever split they stood in when it was trained.

    `trained` (parquet with query_id and positive_ids) is what the model was trained on, `trained_cleaned` the
    cleaned_pairs folder of that time, `cleaned` that of now. A test query is seen if it was trained on itself, or if a
    passage that answers it was a positive of another query; both by id and by text, where letter case, punctuation,
    spacing and, in questions, word order make no difference.
    """
    return _ids(
        """WITH trained AS (SELECT query_id, unnest(positive_ids) AS passage_id FROM stored($trained)),
        trained_queries AS (
            SELECT query_id, unnest(query_keys(folded(query))) AS key FROM stored($old_queries) AS q
            SEMI JOIN trained USING (query_id)),
        trained_passages AS (
            SELECT passage_id, letters(folded(text)) AS text FROM stored($old_passages) AS p
            SEMI JOIN trained USING (passage_id)),
        asked AS (
            SELECT query_id, unnest(query_keys(folded(query))) AS key FROM stored($queries)
            WHERE split = 'test'),
        answers AS (
            SELECT query_id, passage_id, letters(folded(text)) AS text FROM stored($qrels) AS j
            JOIN stored($passages) AS p USING (passage_id) WHERE relevance > 0)
        SELECT DISTINCT query_id FROM asked WHERE query_id IN (SELECT query_id FROM trained_queries)
            OR key IN (SELECT key FROM trained_queries)
            OR query_id IN (
                SELECT query_id FROM answers WHERE passage_id IN (SELECT passage_id FROM trained_passages)
                    OR text IN (SELECT text FROM trained_passages))
        ORDER BY query_id""",
        {
            "trained": str(trained),
            "old_queries": str(trained_cleaned / QUERIES_FILE),
            "old_passages": str(trained_cleaned / PASSAGES_FILE),
            "queries": str(cleaned / QUERIES_FILE),
            "passages": str(cleaned / PASSAGES_FILE),
            "qrels": str(cleaned / QRELS_FILE),
        },
    )


def seen_by(trained_cleaned: Path, mined: Sequence[Path], cleaned: Path) -> set[str]:
    """Test questions, or test pairs of a scored source, of `cleaned` that a model was trained on: their ids.

    `trained_cleaned` is the cleaned_pairs folder that it was trained on, with the extra sources below it; `mined` are
    the folders (of hard_negatives, of the reranker) that hold what of it was trained on, likewise. A question has been
    seen as `seen_in_training` says, or as a sentence of an example; a pair where the same two texts were trained on
    together, in either order and whatever they were to each other.
    """
    scored = (cleaned / EXAMPLES_FILE).is_file()
    extra = sorted(path.name for path in extra_folder(trained_cleaned, "").glob("*") if path.is_dir())
    seen: set[str] = set()
    for name in (None, *extra):
        rows = source_folder(trained_cleaned, name)
        if (rows / EXAMPLES_FILE).is_file():
            seen.update(_seen_pairs(_EXAMPLE_PAIRS, cleaned, examples=rows) if scored else _seen_texts(rows, cleaned))
            continue
        for folder in mined:
            trained = source_folder(folder, name) / HARD_NEGATIVES_FILE
            if trained.is_file():
                of_model = _seen_pairs(_ANSWERED_PAIRS, cleaned, trained=trained, rows=rows) if scored else None
                seen.update(seen_in_training(trained, rows, cleaned) if of_model is None else of_model)
    return seen


def held_out_pairs_among(cleaned: Path) -> list[str]:
    """example_ids of the test pairs of a scored source that its own train split holds as well."""
    return _seen_pairs(_EXAMPLE_PAIRS, cleaned, examples=cleaned)


_EXAMPLE_PAIRS = (
    "SELECT sentence1 AS first, sentence2 AS second FROM stored($examples) "
    "WHERE split = 'train' AND sentence2 IS NOT NULL"
)
_ANSWERED_PAIRS = """SELECT query AS first, text AS second
    FROM (SELECT query_id, unnest(positive_ids) AS passage_id FROM stored($trained))
    JOIN stored($queries) USING (query_id) JOIN stored($passages) USING (passage_id)"""


def _seen_pairs(
    trained_pairs: str,
    cleaned: Path,
    *,
    examples: Path | None = None,
    trained: Path | None = None,
    rows: Path | None = None,
) -> list[str]:
    """example_ids of `cleaned`'s test pairs that stand among `trained_pairs` (a query of first, second)."""
    told = {"asked": str(cleaned / EXAMPLES_FILE)}
    if examples is not None:
        told["examples"] = str(examples / EXAMPLES_FILE)
    if trained is not None and rows is not None:
        told |= {
            "trained": str(trained),
            "queries": str(rows / QUERIES_FILE),
            "passages": str(rows / PASSAGES_FILE),
        }
    return _ids(
        f"""WITH keys AS (SELECT unnest(pair_keys(folded(first), folded(second))) AS key FROM ({trained_pairs})),
        asked AS (
            SELECT example_id, unnest(pair_keys(folded(sentence1), folded(sentence2))) AS key
            FROM stored($asked) WHERE split = 'test')
        SELECT DISTINCT example_id FROM asked SEMI JOIN keys USING (key) ORDER BY example_id""",
        told,
    )


def _seen_texts(examples: Path, cleaned: Path) -> list[str]:
    """query_ids of `cleaned`'s test questions that are a sentence of `examples`' train split, or whose answer is."""
    return _ids(
        """WITH sentences AS (
            SELECT DISTINCT unnest(text_keys(folded(sentence))) AS key FROM (
                SELECT unnest([sentence1, sentence2]) AS sentence FROM stored($examples) WHERE split = 'train')
            WHERE sentence IS NOT NULL),
        asked AS (SELECT query_id, query FROM stored($queries) WHERE split = 'test'),
        texts AS (
            SELECT query_id, unnest(text_keys(folded(query))) AS key FROM asked
            UNION ALL
            SELECT query_id, unnest(text_keys(folded(text))) FROM asked JOIN stored($qrels) USING (query_id)
            JOIN stored($passages) USING (passage_id) WHERE relevance > 0)
        SELECT DISTINCT query_id FROM texts SEMI JOIN sentences USING (key) ORDER BY query_id""",
        {
            "examples": str(examples / EXAMPLES_FILE),
            "queries": str(cleaned / QUERIES_FILE),
            "qrels": str(cleaned / QRELS_FILE),
            "passages": str(cleaned / PASSAGES_FILE),
        },
    )


def _ids(query: str, told: dict[str, str]) -> list[str]:
    """The first column of what a query finds, with the macros of cleaning; `told` are its parameters."""
    with connect() as connection:
        create_macros(connection)
        return [row[0] for row in connection.execute(query, told).fetchall()]
