"""What a model has seen of a later test split."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from cleaned_folder import write_cleaned

from embed_pipeline.evaluation.held_out import held_out_queries_among, seen_in_training
from embed_pipeline.tables import HARD_NEGATIVES, HARD_NEGATIVES_FILE, write


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Trained on q1 (its answer p1) and q2 (p2, p3)."""
    rows = [
        {"query_id": id, "positive_ids": positives, "negative_ids": [], "positive_scores": [], "negative_scores": []}
        for id, positives in (("q1", ["p1"]), ("q2", ["p2", "p3"]))
    ]
    table = pa.Table.from_pylist([{**row, "negative_origins": []} for row in rows], schema=HARD_NEGATIVES)
    write(table, HARD_NEGATIVES, tmp_path / HARD_NEGATIVES_FILE)
    return tmp_path / HARD_NEGATIVES_FILE


def test_seen_are_own_questions_and_answers_by_id_and_by_text(trained: Path, tmp_path: Path) -> None:
    then = write_cleaned(
        tmp_path / "then",
        [("q1", "How to sort?"), ("q2", "How to merge?"), ("q9", "Held out then?")],
        [("p1", "By sort."), ("p2", "By merge."), ("p3", "Or by join."), ("p9", "Yes.")],
        [("q1", "p1", 1.0), ("q2", "p2", 1.0), ("q2", "p3", 1.0), ("q9", "p9", 1.0)],
    )
    now = write_cleaned(
        tmp_path / "now",
        [
            ("q1", "How to sort quickly?"),  # the id of a question that it was trained on
            ("new_id", "To merge: HOW??"),  # its words in another order
            ("other_question", "What joins tables?"),  # answered by a passage that it was trained on, by id
            ("same_text", "What sorts?"),  # and by text
            ("unseen", "What is yes?"),  # its answer was in the corpus, but no positive of a trained question
            ("judged", "Is it p2?"),  # p2 does not answer it
        ],
        [("p2", "By merge."), ("p3", "Or by join."), ("x1", "by SORT."), ("p9", "Yes."), ("y", "Else.")],
        [
            ("q1", "y", 1.0),
            ("new_id", "y", 1.0),
            ("other_question", "p3", 1.0),
            ("same_text", "x1", 2.0),
            ("unseen", "p9", 1.0),
            ("judged", "p2", 0.0),
            ("judged", "y", 1.0),
        ],
        split="test",
    )
    assert seen_in_training(trained, then, now) == ["new_id", "other_question", "q1", "same_text"]
    assert held_out_queries_among(trained, now) == ["q1"]
