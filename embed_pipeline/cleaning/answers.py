"""Answers that were promised and are not there: qrels that point nowhere, a truncated corpus, test pairs left empty.

A question that lost its answer leaves the measurement, and the figures of what is left look the same, or better. A
pair without its passage or its query promises nothing, unless it was delivered as one of dev's or test's.
"""

from __future__ import annotations

import duckdb
from pydantic import BaseModel

from embed_pipeline.cleaning import reasons
from embed_pipeline.errors import CleaningError
from embed_pipeline.settings import CleaningSettings
from embed_pipeline.tables import SPLITS

EXAMPLES = 3
_POINTS_NOWHERE = (reasons.MISSING_ID, reasons.UNKNOWN_QUERY, reasons.UNKNOWN_PASSAGE)


class Answers(BaseModel):
    """What one delivered split promised (`train`, where none was told), and how much of it is not there."""

    answers: int  # rows that call a passage relevant
    missing: int  # of them, those whose query or passage is nowhere, empty, or was dropped for its length
    queries: int
    queries_lost: int  # of them, those whose every answer is missing

    @property
    def share(self) -> float:
        """The larger of the two shares."""
        return max(self.missing / max(1, self.answers), self.queries_lost / max(1, self.queries))

    def told(self, split: str) -> str:
        return (
            f"{split}: {self.missing} of {self.answers} answers ({self.missing / max(1, self.answers):.1%}) are "
            f"missing, and with them {self.queries_lost} of {self.queries} questions"
        )


def look_for_answers(connection: duckdb.DuckDBPyConnection) -> dict[str, Answers]:
    """The table `promised` (row, asked, split, is_missing: one a row that calls a passage relevant), summed by split.

    To be called when judgements were resolved, before duplicates and leaks are taken out.
    """
    connection.execute(
        f"""CREATE TABLE promised AS
            SELECT row, coalesce(query_id, query, row::VARCHAR) AS asked, split,
                CASE kind WHEN 'judgement' THEN coalesce(reason IN {_POINTS_NOWHERE}, false)
                    ELSE query IS NULL OR passage IS NULL END AS is_missing
            FROM rows LEFT JOIN rejections USING (row)
            WHERE coalesce(relevance > 0 AND isfinite(relevance), kind <> 'judgement') AND (
                kind = 'judgement' OR kind IN ('pair', 'triplet') AND split IN ('dev', 'test'))"""
    )
    found = connection.execute(
        """WITH questions AS (
               SELECT split, asked, count(*) AS answers, count_if(is_missing) AS missing FROM promised GROUP BY ALL
           )
           SELECT split, sum(answers), sum(missing), count(*), count_if(missing = answers)
           FROM questions GROUP BY split"""
    ).fetchall()
    counts = {row[0]: [int(count) for count in row[1:]] for row in found}
    return {
        split: Answers(**dict(zip(Answers.model_fields, counts[split], strict=True)))
        for split in SPLITS
        if split in counts
    }


def refuse_missing(
    connection: duckdb.DuckDBPyConnection, answers: dict[str, Answers], settings: CleaningSettings
) -> None:
    """Raise CleaningError where a split lacks more than `max_missing_answers` of its answers or of its questions."""
    lacking = {split: found for split, found in answers.items() if found.share > settings.max_missing_answers}
    if not lacking:
        return
    examples = connection.execute(
        f"""WITH corpus AS (
                SELECT passage_id, min(reason) AS dropped FROM rows LEFT JOIN rejections USING (row)
                WHERE kind = 'passage' GROUP BY passage_id
            )
            SELECT source || ' row ' || row_number || ': ' || reason || coalesce(', ' || detail, '')
                || coalesce(' (dropped as ' || dropped || ')', '')
            FROM promised JOIN rejections USING (row) JOIN rows USING (row) LEFT JOIN corpus USING (passage_id)
            WHERE is_missing AND promised.split IN (SELECT unnest($splits)) ORDER BY row LIMIT {EXAMPLES}""",
        {"splits": list(lacking)},
    ).fetchall()
    raise CleaningError(
        f"answers are missing from the delivery. {'; '.join(found.told(split) for split, found in lacking.items())}. "
        f"For example {'; '.join(row[0] for row in examples)}. Figures over the questions that are left would not be "
        "comparable with any others, so nothing is published. Deliver the corpus whole, mend the ids, or raise "
        f"`cleaning.max_missing_answers` (now {settings.max_missing_answers:g}) if so many are known to be missing"
    )
