"""What a model has seen of a later test split."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from cleaned_folder import write_cleaned, write_examples

from embed_pipeline.evaluation.held_out import (
    held_out_pairs_among,
    held_out_queries_among,
    seen_by,
    seen_in_training,
)
from embed_pipeline.tables import HARD_NEGATIVES, HARD_NEGATIVES_FILE, extra_folder, write


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


@pytest.mark.parametrize(("split", "held_out"), [("train", []), ("dev", ["q1", "q2"]), ("test", ["q1", "q2"])])
def test_dev_and_test_are_held_out_of_training(trained: Path, tmp_path: Path, split: str, held_out: list[str]) -> None:
    questions = [("q2", "Two?"), ("q1", "One?"), ("q3", "Nobody trained on it?")]
    cleaned = write_cleaned(tmp_path / "cleaned", questions, [("p1", "I")], [], split=split)
    assert held_out_queries_among(trained, cleaned) == held_out


def test_seen_in_every_source_that_was_trained_on(trained: Path, tmp_path: Path) -> None:
    """A question that stood in an extra source of examples, or among the negatives of an extra retrieval source."""
    then = write_cleaned(
        tmp_path / "then", [("q1", "One?"), ("q2", "Two?")], [("p1", "I"), ("p2", "II"), ("p3", "III")], []
    )
    write_examples(extra_folder(then, "pairs"), [("What is a heap?", "A kind of tree.", 1.0, None)], splits=["train"])
    write_examples(extra_folder(then, "held_out"), [("What is a stack?", "A list.", 1.0, None)], splits=["test"])
    write_cleaned(extra_folder(then, "faq"), [("q1", "What is a queue?")], [("p1", "A line.")], [])
    mined = tmp_path / "mined"
    for folder in (mined, extra_folder(mined, "faq")):
        folder.mkdir(parents=True)
        shutil.copy2(trained, folder / HARD_NEGATIVES_FILE)
    now = write_cleaned(
        tmp_path / "now",
        [
            ("one", "one"),
            ("heap", "what is a HEAP"),
            ("tree", "Which tree?"),
            ("stack", "What is a stack?"),
            ("q", "a queue: what is?"),
        ],
        [("x", "A kind of tree"), ("y", "Else.")],
        [("one", "y", 1.0), ("heap", "y", 1.0), ("tree", "x", 1.0), ("stack", "y", 1.0), ("q", "y", 1.0)],
        split="test",
    )
    assert seen_by(then, [mined], now) == {"one", "heap", "tree", "q"}


def test_seen_pairs_stand_together_in_either_order(trained: Path, tmp_path: Path) -> None:
    then = write_examples(
        tmp_path / "then", [("A cat.", "A dog.", 0.5, None), ("A hen.", "A fox.", 0.1, None)], splits=["train"]
    )
    write_cleaned(
        extra_folder(then, "faq"),
        [("q1", "Who barks?"), ("q2", "?")],
        [("p1", "The dog."), ("p2", "2"), ("p3", "3")],
        [],
    )
    mined = tmp_path / "mined"
    extra_folder(mined, "faq").mkdir(parents=True)
    shutil.copy2(trained, extra_folder(mined, "faq") / HARD_NEGATIVES_FILE)
    rows = [
        ("a dog", "A CAT!", 0.9, None),  # the same two texts
        ("A cat.", "A fox.", 0.2, None),  # never together
        ("the dog", "who barks", 1.0, None),  # a question and its answer
    ]
    now = write_examples(tmp_path / "now", rows)
    assert seen_by(then, [mined], now) == {"test0000", "test0002"}
    assert held_out_pairs_among(now) == []
    leaky = write_examples(tmp_path / "leaky", rows[:1], splits=["train", "test"])
    assert held_out_pairs_among(leaky) == ["test0000"]
