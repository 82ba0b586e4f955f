"""Scored, labelled and parallel rows: what is dropped and why, and splits in which test is not seen in train."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embed_pipeline.cleaning.examples import ExamplesReport, clean_examples
from embed_pipeline.cleaning.verify import verify_examples
from embed_pipeline.errors import CleaningError
from embed_pipeline.settings import CleaningSettings, SourceSettings
from embed_pipeline.sources.read import read_sources
from embed_pipeline.sources.sample import sample_rows
from embed_pipeline.tables import (
    EXAMPLES,
    EXAMPLES_FILE,
    RAW_EXAMPLES,
    RAW_EXAMPLES_FILE,
    REJECTED_EXAMPLES_FILE,
    write,
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cleaned:
    report: ExamplesReport
    examples: list[dict[str, Any]]
    reasons: dict[int, str]
    violations: list[str]
    content: bytes

    def splits_of(self, text: str) -> set[str]:
        return {row["split"] for row in self.examples if text in (row["sentence1"], row["sentence2"])}


def cleaned(rows: Iterable[Row], kind: str = "scored", cleaning: Any = None, **told: Any) -> Cleaned:
    full = [
        {**dict.fromkeys(RAW_EXAMPLES.names), "source": "a.parquet", "row_number": number, **row}
        for number, row in enumerate(rows)
    ]
    settings = SourceSettings(kind=kind, path="a.parquet", **told)  # type: ignore[arg-type]
    with TemporaryDirectory() as folder:
        raw, out = Path(folder) / RAW_EXAMPLES_FILE, Path(folder) / "out"
        out.mkdir()
        write(pa.Table.from_pylist(full, schema=RAW_EXAMPLES), RAW_EXAMPLES, raw)
        told_cleaning = CleaningSettings.model_validate(cleaning or {})
        report = clean_examples(raw, settings, told_cleaning, 42, out)
        examples = pq.read_table(out / EXAMPLES_FILE)
        rejected = pq.read_table(out / REJECTED_EXAMPLES_FILE).to_pylist()
        assert report.raw_rows == len(full) == report.kept_rows + len(rejected)
        assert sorted(path.name for path in out.iterdir()) == [EXAMPLES_FILE, REJECTED_EXAMPLES_FILE]
        return Cleaned(
            report,
            examples.to_pylist(),
            {row["row_number"]: row["reason"] for row in rejected},
            verify_examples(out, settings, report.apart, raw, told_cleaning.missing_texts),
            (out / EXAMPLES_FILE).read_bytes(),
        )


def pairs(count: int = 40, **columns: Any) -> list[dict[str, Any]]:
    """Sentences that stand once."""
    return [
        {"sentence1": f"the first of pair {i}", "sentence2": f"and number {i} second", "score": i / count, **columns}
        for i in range(count)
    ]


def classes(count: int = 40, names: tuple[str, ...] = ("yes", "no"), single: bool = False) -> list[dict[str, Any]]:
    rows = [{**row, "label": names[i % len(names)], "score": None} for i, row in enumerate(pairs(count))]
    return [{**row, "sentence2": None} for row in rows] if single else rows


A, B = "A man is eating.", "Somebody eats"
BAD = {
    "nothing visible": (
        "scored",
        [{"sentence1": " \u200b", "sentence2": B, "score": 1.0}],
        {0: "null_or_empty_sentence"},
    ),
    "no second": ("parallel", [{"sentence1": A}], {0: "null_or_empty_sentence"}),
    "one text among pairs": ("labelled", [{"sentence1": A, "label": "yes"}], {0: "null_or_empty_sentence"}),
    "short": ("scored", [{"sentence1": "x", "sentence2": B, "score": 1.0}], {0: "sentence_too_short"}),
    "long": ("scored", [{"sentence1": "x" * 201, "sentence2": B, "score": 1.0}], {0: "sentence_too_long"}),
    "no label": ("labelled", [{"sentence1": A, "sentence2": B, "label": " "}], {0: "missing_label"}),
    "no score": ("scored", [{"sentence1": A, "sentence2": B}], {0: "invalid_score"}),
    "NaN": ("scored", [{"sentence1": A, "sentence2": B, "score": float("nan")}], {0: "invalid_score"}),
    "outside": ("scored", [{"sentence1": A, "sentence2": B, "score": 1.2}], {0: "score_out_of_range"}),
    "a missing sentence": ("scored", [{"sentence1": "nan", "sentence2": B, "score": 1.0}], {0: "missing_text"}),
    "a missing second": ("parallel", [{"sentence1": A, "sentence2": " <NA> "}], {0: "missing_text"}),
    "a missing label": ("labelled", [{"sentence1": A, "sentence2": B, "label": "nan"}], {0: "missing_label"}),
    "blank": ("scored", [{"sentence1": "\u3164", "sentence2": B, "score": 1.0}], {0: "null_or_empty_sentence"}),
    "again, the other way round": (
        "scored",
        [
            {"sentence1": A, "sentence2": B, "score": 0.5},
            {"sentence1": B, "sentence2": "a man IS eating", "score": 0.5},
        ],
        {1: "duplicate"},
    ),
    "two scores": (
        "scored",
        [{"sentence1": A, "sentence2": B, "score": 0.5}, {"sentence1": B, "sentence2": A, "score": 0.6}],
        {0: "contradiction", 1: "contradiction"},
    ),
    "two classes": (
        "labelled",
        [{"sentence1": A, "sentence2": B, "label": "yes"}, {"sentence1": A, "sentence2": B, "label": "no"}],
        {0: "contradiction", 1: "contradiction"},
    ),
    "classes in both orders": (
        "labelled",
        [{"sentence1": A, "sentence2": B, "label": "yes"}, {"sentence1": B, "sentence2": A, "label": "no"}],
        {},
    ),
    "alike and not, the other way round": (
        "labelled",
        [
            {"sentence1": A, "sentence2": B, "label": "1"},
            {"sentence1": B, "sentence2": "a man IS eating", "label": "0"},
        ],
        {0: "contradiction", 1: "contradiction"},
    ),
    "alike in both orders": (
        "labelled",
        [{"sentence1": A, "sentence2": B, "label": "1"}, {"sentence1": B, "sentence2": A, "label": "1"}],
        {},
    ),
    "two translations": ("parallel", [{"sentence1": A, "sentence2": B}, {"sentence1": A, "sentence2": "Man isst"}], {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case: str) -> None:
    kind, rows, expected = BAD[case]
    names = ("0", "1") if case.startswith("alike") else ("yes", "no")
    sound = classes(names=names) if kind == "labelled" else pairs()
    result = cleaned([*rows, *sound], kind, cleaning={"passage_max_characters": 200})
    assert (result.reasons, result.violations) == (expected, [])


def test_scores_are_mapped_to_one() -> None:
    result = cleaned([{**row, "score": 1 + 4 * row["score"]} for row in pairs()], score_range=(1, 5))
    assert sorted(round(row["score"], 6) for row in result.examples) == [round(i / 40, 6) for i in range(40)]
    assert result.violations == []


def test_another_scale_names_score_range() -> None:
    with pytest.raises(CleaningError, match=r"source\.score_range: 37 of 40 .* run from 0 to 15\.6\. .*\[0, 15\.6\]"):
        cleaned([{**row, "score": 16 * row["score"]} for row in pairs()])


@pytest.mark.parametrize(
    ("scores", "given", "told"),
    [
        ([0.5] * 20 + [3.0] * 20, None, "20 of 40 scores lie outside 0 to 1"),  # half of the rows
        ([0.5] * 37 + [-1.0] * 3, None, "3 of 40"),
        ([2.0] * 40, None, "all are 2, which tells no scale"),
        ([0.0] * 40, (1, 5), "all are 0, which tells no scale"),
        ([-7.0] * 40, None, "all are -7"),
        ([1.00000012, 123456789.5] * 20, None, "run from 1.00000012 to 123456789.5"),
        ([1e-07, 3e300, 2e15, 0.1] * 10, None, "20 of 40"),
        ([float("nan"), 4.5, 3.5, float("inf")] * 10, None, "20 of 20 .* run from 3.5 to 4.5"),
    ],
)
def test_the_scale_that_is_advised_is_accepted(scores: list[float], given: Any, told: str) -> None:
    rows = [{**row, "score": score} for row, score in zip(pairs(), scores, strict=True)]
    with pytest.raises(CleaningError, match=rf"source\.score_range: .*{told}") as refused:
        cleaned(rows, **({"score_range": given} if given else {}))
    advised = yaml.safe_load(re.search(r"score_range: (\[.*\])\.", str(refused.value))[1])  # type: ignore[index]
    result = cleaned(rows, score_range=advised)
    assert (set(result.reasons.values()) - {"invalid_score"}, result.violations) == (set(), [])


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None])
def test_no_score_at_all(value: float | None) -> None:
    with pytest.raises(CleaningError, match=r"source\.columns\.score: none of the 40 scores is a number"):
        cleaned([{**row, "score": value} for row in pairs()])


SPELLINGS: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    "booleans and numbers": (("true", "false", "1", "0"), {"1": ["true"], "0": ["false"]}),
    "words and booleans": (("Yes", "No", "TRUE", "FALSE"), {"1": ["TRUE", "Yes"], "0": ["FALSE", "No"]}),
    "letter case and spaces": (("Yes", "no", "yes ", "No", "Yes", "no"), {"Yes": ["yes"], "no": ["No"]}),
    "width": (("ab", "cd", "\uff41b", "cd"), {"ab": ["\uff41b"]}),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_class_has_one_spelling(case: str) -> None:
    names, others = SPELLINGS[case]
    result = cleaned(classes(48, names), "labelled", positive_label=" yES " if "s" in names[0].lower() else None)
    assert len(result.report.classes) == 2
    assert {stands: sorted(found) for stands, found in result.report.class_spellings.items()} == others
    assert (result.reasons, result.violations) == ({}, [])
    if case != "width":
        assert {row["score"] for row in result.examples} == {0.0, 1.0}


def test_classes_that_differ_in_more_than_spelling_stay() -> None:
    names = ("-1", "1", "0", "C", "C++", "C#", "true", "maybe")
    result = cleaned(classes(48, names), "labelled")
    assert (set(result.report.classes), result.report.class_spellings) == (set(names), {})


def test_a_class_for_each_row_is_refused() -> None:
    with pytest.raises(
        CleaningError, match=r"source\.columns\.label: each of the \d+ rows of train has a class of its"
    ):
        cleaned([{**row, "label": row["sentence1"]} for row in classes()], "labelled")


def test_labels_of_two_types_in_two_files(tmp_path: Path) -> None:
    for name, label in (("a", [True, False] * 20), ("b", [1, 0] * 20)):
        rows = pairs(40)
        columns = {"sentence1": [f"{name} {r['sentence1']}" for r in rows], "sentence2": [r["sentence2"] for r in rows]}
        pq.write_table(pa.table({**columns, "label": label}), tmp_path / f"{name}.parquet")
    source = SourceSettings(kind="labelled", path="*.parquet")
    read_sources(source, tmp_path, tmp_path)
    (tmp_path / "out").mkdir()
    report = clean_examples(tmp_path / RAW_EXAMPLES_FILE, source, CleaningSettings(), 42, tmp_path / "out")
    assert set(report.classes) == {"0", "1"}


def test_the_same_rows_give_the_same_bytes_and_other_seeds_other_splits() -> None:
    result = cleaned(pairs(200))
    assert cleaned(pairs(200)).content == result.content
    counts = result.report.examples_by_split
    assert 100 < counts["train"] < 170
    assert counts["dev"] > 5
    assert counts["test"] > 15
    of_more = {row["example_id"]: row["split"] for row in cleaned(pairs(260)).examples}
    # Other scores, the same sentences: a pair stays where it was when others come.
    assert all(of_more[row["example_id"]] == row["split"] for row in result.examples)


def test_a_text_stands_in_one_split() -> None:
    rows = [
        {"sentence1": f"sentence {i} of some", "sentence2": f"neighbour {'abc'[j]} of {i}", "score": 0.5}
        for i in range(50)
        for j in range(3)
    ]
    result = cleaned([{**row, "sentence1": row["sentence1"].upper()} if i % 2 else row for i, row in enumerate(rows)])
    assert (result.report.apart, result.report.shared_texts, result.violations) == ("texts", 0.0, [])
    assert result.report.largest_group == 3
    assert result.reasons == {}


def test_where_texts_stand_in_many_pairs_no_pair_stands_in_two_splits() -> None:
    rows = [
        {"sentence1": f"sentence number {i}", "sentence2": f"sentence number {j}", "score": 0.5}
        for i in range(20)
        for j in range(20)
        if i < j
    ]
    turned = [{**row, "sentence1": row["sentence2"], "sentence2": row["sentence1"]} for row in rows]
    labelled = [{**row, "score": None, "label": str(i % 3)} for i, row in enumerate([*rows, *turned])]
    result = cleaned(labelled, "labelled")
    assert (result.report.apart, result.report.largest_group, result.violations) == ("pairs", 2, [])
    assert result.report.shared_texts > 0.5
    assert result.report.kept_rows == len(labelled)
    of_pair: dict[frozenset[str], set[str]] = {}
    for row in result.examples:
        of_pair.setdefault(frozenset((row["sentence1"], row["sentence2"])), set()).add(row["split"])
    assert {len(splits) for splits in of_pair.values()} == {1}


def test_delivered_splits_give_way_to_test() -> None:
    held_out = [{**row, "split": "test"} for row in pairs(5)]
    again = {"sentence1": "AND number 1 second", "sentence2": "the first of pair 1", "score": 0.9, "split": "train"}
    shares_a_text = {"sentence1": "the first of pair 2", "sentence2": "new to all", "score": 0.9}
    train = [{**row, "sentence1": f"more: {row['sentence1']}", "sentence2": f"or {i}"} for i, row in enumerate(pairs())]
    result = cleaned([*held_out, again, shares_a_text, *train])
    assert result.reasons == {5: "split_leak", 6: "split_leak"}
    assert (result.report.apart, result.report.delivered_splits) == ("texts", ["train", "test"])
    assert result.splits_of("the first of pair 1") == {"test"}
    assert result.violations == []
    # Where most of train shares a text, only pairs are kept apart, and the report says so.
    linked = [{**row, "sentence1": "the first of pair 2"} for row in train]
    result = cleaned([*held_out, again, *linked])
    assert result.reasons == {5: "split_leak"}
    assert (result.report.apart, result.violations) == ("pairs", [])
    assert result.report.shared_texts == pytest.approx(0.1, abs=0.09)


def test_documents_stay_together() -> None:
    rows = [{**row, "document_id": f"d{i // 8}"} for i, row in enumerate(pairs(80))]
    result = cleaned(rows)
    splits: dict[int, set[str]] = {}
    for row in result.examples:
        splits.setdefault(int(row["sentence1"].split()[-1]) // 8, set()).add(row["split"])
    assert {len(found) for found in splits.values()} == {1}
    with pytest.raises(CleaningError, match=r"form 1 group\(s\) .*columns\.document_id"):
        cleaned([{**row, "document_id": "all"} for row in pairs()])


def test_classes() -> None:
    result = cleaned(classes(names=("0", "1")), "labelled")
    assert {(row["label"], row["score"]) for row in result.examples} == {("0", 0.0), ("1", 1.0)}
    result = cleaned(classes(), "labelled", positive_label="yes")
    assert {(row["label"], row["score"]) for row in result.examples} == {("no", 0.0), ("yes", 1.0)}
    assert {row["score"] for row in cleaned(classes(), "labelled").examples} == {None}
    alone = cleaned(classes(single=True), "labelled")
    assert {(row["sentence2"], row["score"]) for row in alone.examples} == {(None, None)}
    assert (alone.report.classes, alone.report.apart) == ({"no": 20, "yes": 20}, "texts")
    with pytest.raises(CleaningError, match=r"train has one class, 'yes'.*columns\.label"):
        cleaned(classes(names=("yes",)), "labelled")
    with pytest.raises(CleaningError, match=r"positive_label: .* found 'maybe'\. The classes are: no, yes"):
        cleaned(classes(), "labelled", positive_label="maybe")


def test_a_positive_label_makes_classes_hold_in_both_orders() -> None:
    rows = [{"sentence1": A, "sentence2": B, "label": "yes"}, {"sentence1": B, "sentence2": A, "label": "no"}]
    result = cleaned([*rows, *classes()], "labelled", positive_label="yes")
    assert result.reasons == {0: "contradiction", 1: "contradiction"}


@pytest.mark.parametrize("names", [("0", "1"), ("false", "true"), ("no", "yes"), ("No", "YES")])
@pytest.mark.parametrize("written", ["1", "true", "yes", "'1'", "'true'", "'yes'", "0", "false", "no"])
def test_a_positive_label_as_yaml_reads_it(names: tuple[str, str], written: str) -> None:
    result = cleaned(classes(names=names), "labelled", positive_label=yaml.safe_load(written))
    meant = names[0] if written in ("0", "false", "no") else names[1]
    assert {row["label"] for row in result.examples if row["score"] == 1.0} == {meant}


def test_verify_sees_each_broken_promise(tmp_path: Path) -> None:
    settings = SourceSettings(kind="scored", path="a")
    raw = tmp_path / RAW_EXAMPLES_FILE
    rows = [{**dict.fromkeys(RAW_EXAMPLES.names), "source": "a", "row_number": i, **r} for i, r in enumerate(pairs())]
    write(pa.Table.from_pylist(rows, schema=RAW_EXAMPLES), RAW_EXAMPLES, raw)
    clean_examples(raw, settings, CleaningSettings(), 42, tmp_path)
    examples = pq.read_table(tmp_path / EXAMPLES_FILE).to_pylist()
    by_split = {row["split"]: row for row in examples}

    def found(*changed: dict[str, Any], without: str = "") -> str:
        kept = [row for row in examples if row["example_id"] != without]
        write(pa.Table.from_pylist([*kept, *changed], schema=EXAMPLES), EXAMPLES, tmp_path / EXAMPLES_FILE)
        return "\n".join(verify_examples(tmp_path, settings, "texts", raw))

    train, test = by_split["train"], by_split["test"]
    assert found() == ""
    turned = {**test, "sentence1": test["sentence2"], "sentence2": test["sentence1"], "split": "train"}
    assert "no two sentences, in either order, and no group stand in two splits" in found({**turned, "example_id": "x"})
    assert "no text stands in two splits" in found({**train, "sentence1": test["sentence2"].upper(), "example_id": "x"})
    assert "an example_id stands once" in found(train)
    assert "every kept row is an example, as it was delivered" in found(without=train["example_id"])
    assert "an example was delivered, once" in found({**train, "sentence1": "made up", "example_id": "x"})
    assert "a score lies between 0 and 1" in found({**train, "score": 2.0, "example_id": "x"})


def test_real_scores(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    path = shared_data("sick") / "pairs.parquet"
    settings = SourceSettings(kind="scored", path=str(path), score_range=(1, 5))
    assert read_sources(settings, tmp_path, tmp_path).rows == 9_927
    (tmp_path / "out").mkdir()
    raw = tmp_path / RAW_EXAMPLES_FILE
    report = clean_examples(raw, settings, CleaningSettings(), 42, tmp_path / "out")
    # Its splits share three quarters of test's sentences, so pairs are all that can be kept apart.
    assert (report.apart, report.delivered_splits) == ("pairs", ["train", "dev", "test"])
    assert report.shared_texts == pytest.approx(0.75, abs=0.02)
    assert report.examples_by_split["test"] > 4_800
    assert 0 < report.split_leaks < 150
    assert verify_examples(tmp_path / "out", settings, report.apart, raw) == []
    assert sample_rows(tmp_path, 200, 1)["example"] == pytest.approx(200, abs=3)
    assert {row["split"] for row in pq.read_table(raw).to_pylist()} == {"train", "dev", "test"}


def test_nothing_need_be_held_out() -> None:
    result = cleaned(pairs(), cleaning={"split": {"dev": 0.0, "test": 0.0}})
    assert result.report.examples_by_split == {"train": 40, "dev": 0, "test": 0}
    assert result.report.shared_texts == 0.0
    assert result.violations == []


def test_splits_by_other_names_and_missing_texts_are_told() -> None:
    rows = [{**row, "split": ("Training", "valid", "testing")[i % 3]} for i, row in enumerate(pairs())]
    rows[0]["sentence1"], rows[1]["sentence2"] = "nan", "None"
    result = cleaned(rows)
    assert result.reasons == {0: "missing_text", 1: "missing_text"}
    assert result.report.split_values == {"train": {"Training": 14}, "dev": {"valid": 13}, "test": {"testing": 13}}
    assert result.report.read_as_missing == {"sentence1": {"nan": 1}, "sentence2": {"None": 1}}
    assert result.violations == []
    assert cleaned(rows, cleaning={"missing_texts": []}).reasons == {}


def test_a_second_column_that_is_missing_throughout_means_single_texts() -> None:
    """As pandas' astype(str) writes a column of nothing."""
    result = cleaned([{**row, "sentence2": "nan"} for row in classes()], kind="labelled")
    assert result.reasons == {}
    assert {row["sentence2"] for row in result.examples} == {None}


def test_unknown_splits_and_a_split_without_train_are_refused() -> None:
    with pytest.raises(CleaningError, match=r"'holdout' in 40 row\(s\), the first is a\.parquet row 0"):
        cleaned(pairs(split="holdout"))
    with pytest.raises(CleaningError, match=r"left in train .*0 as train, 0 as dev, 40 as test.*split column"):
        cleaned(pairs(split="test"))


def test_an_emoji_with_its_selector_is_the_same_text() -> None:
    rows = [{**row, "split": ("train", "dev", "test")[i % 3]} for i, row in enumerate(pairs())]
    rows += [
        {"sentence1": "I \u2764\ufe0f it", "sentence2": "we \u2764\ufe0f it", "score": 1.0, "split": "test"},
        {"sentence1": "I \u2764 it", "sentence2": "they hate it", "score": 0.0, "split": "train"},
    ]
    assert cleaned(rows).reasons == {41: "split_leak"}
