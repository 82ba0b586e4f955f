"""Looks at finished hard negatives with other eyes than those that chose them: SQL over the written tables."""

from __future__ import annotations

from pathlib import Path

from embed_pipeline.settings import MiningSettings
from embed_pipeline.tables import HARD_NEGATIVES_FILE, PASSAGES_FILE, QRELS_FILE, QUERIES_FILE, WITHHELD_FILE, connect

_NEGATIVES = """
CREATE TEMP TABLE negative AS
SELECT query_id, unnest(negative_ids) AS passage_id, unnest(negative_scores) AS score,
       unnest(negative_origins) AS origin, list_min(positive_scores)::DOUBLE AS lowest_positive
FROM hard_negatives
"""
_POSITIVES = "CREATE TEMP TABLE positive AS SELECT query_id, passage_id FROM qrels WHERE relevance > 0"

_KNOWN = "CREATE TEMP TABLE known AS FROM positive UNION SELECT query_id, passage_id FROM withheld"

_CHECKS = {
    "negative is a known positive of its query": """
        SELECT query_id, passage_id FROM negative SEMI JOIN known USING (query_id, passage_id)""",
    "negative is a near-duplicate of a positive of its query": """
        SELECT DISTINCT n.query_id, n.passage_id FROM negative n
        JOIN passages np ON np.passage_id = n.passage_id
        JOIN known p ON p.query_id = n.query_id
        JOIN passages pp ON pp.passage_id = p.passage_id AND pp.cluster_id = np.cluster_id
        WHERE n.passage_id <> p.passage_id""",
    "negative is not in the corpus": """
        SELECT query_id, passage_id FROM negative ANTI JOIN passages USING (passage_id)""",
    "query is not in the cleaned pairs": """
        SELECT query_id, NULL AS passage_id FROM hard_negatives
        ANTI JOIN queries USING (query_id)""",
    "query stands in more than one row": """
        SELECT query_id, NULL AS passage_id FROM hard_negatives GROUP BY query_id HAVING count(*) > 1""",
    "negative stands twice in one row": """
        SELECT query_id, passage_id FROM negative GROUP BY query_id, passage_id HAVING count(*) > 1""",
    "listed positive is not a known positive": """
        SELECT l.query_id, l.passage_id
        FROM (SELECT query_id, unnest(positive_ids) AS passage_id FROM hard_negatives) l
        ANTI JOIN positive USING (query_id, passage_id)""",
    "given negative was not judged as not relevant": """
        SELECT query_id, passage_id FROM (SELECT * FROM negative WHERE origin = 'given')
        ANTI JOIN (SELECT * FROM qrels WHERE relevance <= 0) USING (query_id, passage_id)""",
    "teacher's scores are not one a text": """
        SELECT query_id, NULL AS passage_id FROM hard_negatives
        WHERE (positive_teacher_scores IS NULL) <> (negative_teacher_scores IS NULL)
            OR len(positive_teacher_scores) <> len(positive_ids) OR len(negative_teacher_scores) <> len(negative_ids)
            OR list_contains(list_transform(
                list_concat(positive_teacher_scores, negative_teacher_scores), lambda s: NOT isfinite(s)), true)""",
    "mined negative scores above the threshold": """
        SELECT query_id, passage_id FROM negative WHERE origin = 'mined' AND (
            score::DOUBLE > lowest_positive - (1.0 - $ratio::DOUBLE) * abs(lowest_positive)
            OR score::DOUBLE > lowest_positive - $margin::DOUBLE)""",
}


def verify(folder: Path, cleaned: Path, settings: MiningSettings) -> list[str]:
    """Violations of what mining promises, one line a kind with its count and an example; empty when all is well.

    `folder` holds `hard_negatives.parquet`, `cleaned` the tables it was mined from, `settings` how.
    """
    tables = {
        "hard_negatives": folder / HARD_NEGATIVES_FILE,
        "passages": cleaned / PASSAGES_FILE,
        "queries": cleaned / QUERIES_FILE,
        "qrels": cleaned / QRELS_FILE,
        "withheld": cleaned / WITHHELD_FILE,
    }
    limits = {"ratio": settings.max_score_ratio, "margin": settings.absolute_margin}
    violations = []
    with connect() as connection:
        for name, path in tables.items():
            connection.sql("SELECT * FROM stored($path)", params={"path": str(path)}).create_view(name)
        connection.execute(_NEGATIVES)
        connection.execute(_POSITIVES)
        connection.execute(_KNOWN)
        for what, check in _CHECKS.items():
            found = connection.execute(
                f"SELECT count(*), any_value(query_id), any_value(passage_id) FROM ({check})",
                limits if "$ratio" in check else None,
            ).fetchall()[0]
            if found[0]:
                example = f"query '{found[1]}'" + (f", passage '{found[2]}'" if found[2] is not None else "")
                violations.append(f"{what}: {found[0]} times, for example {example}")
    return violations
