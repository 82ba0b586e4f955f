"""Deliveries that nobody would write by hand, on real files: each is cleaned rightly, or refused with one message."""
# ruff: noqa: RUF001 - characters that look alike are what some of it is about

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from embed_pipeline.errors import CleaningError
from embed_pipeline.evaluation.metrics import per_query
from embed_pipeline.orchestration.assets.cleaned_pairs import cleaning_metadata
from embed_pipeline.tables import PASSAGES_FILE, QRELS_FILE, QUERIES_FILE
from tests.deliveries import ALL_SPLITS, Delivery, Row, beir, by_tens, clean_delivery, passage, sound

Deliver = Callable[..., Delivery]


@pytest.fixture
def deliver(tmp_path: Path) -> Deliver:
    """`deliver(pairs=[...], cleaning={...})`, or with corpus, queries and qrels."""

    def build(cleaning: dict[str, Any] | None = None, **files: Sequence[Row]) -> Delivery:
        return clean_delivery(tmp_path / "hostile", files, **(cleaning or {}))

    return build


def one(query: str | None = "why so", text: str | None = None, **columns: Any) -> Row:
    return {"query": query, "passage": passage(0) if text is None else text, "split": "train", **columns}


# ------------------------------------------------------------------------------------- one row, what becomes of it

LONG = " ".join(f"word{n}" for n in range(150_000))
BLANK = {
    "joiners": "\u200c\u200d",
    "Hangul filler": "\u3164",
    "half-width filler": "\uffa0\u115f\u1160",
    "empty Braille": "\u2800 \u2800",
    "selectors": "\ufe0f\U000e0100",
    "grapheme joiner": "\u034f",
    "Mongolian vowel separator": "\u180e",
    "tags": "\U000e0041\U000e007f",
    "marks of direction": "\u200e\u202e\u2066\u061c",
    "controls": "\x00\x01\x7f\x85",
    "spaces of all kinds": " \u00a0\u2003\u3000\u2028\t\r\n",
    "annotation anchors": "\ufff9\ufffb",
    "byte-order mark": "\ufeff",
    "musical control": "\U0001d173",
}
KEPT: dict[str, tuple[str, str]] = {
    "mixed scripts": ("Что такое β-Test 测试 של מילה?", "что"),
    "right to left": ("\u200fמה זה\u200f?", "מה זה?"),
    "Arabic with signs": ("ما هُوَ الإطار؟", "ما هُوَ الإطار؟"),
    "many combining marks": ("why" + "\u0301\u0323\u0336" * 30 + " so", "why"),
    "HTML": ("<b>What</b> is &amp; <script>alert(1)</script>?", "<b>What</b> is &amp; <script>alert(1)</script>?"),
    "SQL": ("'; DROP TABLE rows; --", "'; DROP TABLE rows; --"),
    "braces and percent": ("{{env.HOME}} %s {0} \\x41 $raw", "{{env.HOME}} %s {0} \\x41 $raw"),
    "NUL in the middle": ("where\x00 is it", "where is it"),
    "emoji alone": ("\u2764\ufe0f\U0001f525", "\u2764\ufe0f\U0001f525"),
    "unassigned and private": ("what is \U000e1234 or \ue000", "what is \U000e1234 or \ue000"),
    "digits only": ("4711", "4711"),
    "a word that starts as a missing one": ("nan bread", "nan bread"),
    "none in lower case": ("none", "none"),
}


@pytest.fixture(scope="module")
def odd_texts(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    """Each blank text as a query and as a passage, each kept text as a query and in a passage."""
    rows = list(ALL_SPLITS)
    for n, text in enumerate(BLANK.values()):
        rows += [one(text, passage(n)), one(f"who is {n}", text)]
    for n, (text, _) in enumerate(KEPT.values()):
        rows += [one(text, f"{passage(100 + n)} {text}")]
    return clean_delivery(tmp_path_factory.mktemp("odd") / "hostile", {"pairs": rows})


@pytest.mark.parametrize("case", BLANK)
def test_a_text_in_which_nothing_is_drawn_is_empty(odd_texts: Delivery, case: str) -> None:
    number = len(ALL_SPLITS) + 2 * list(BLANK).index(case)
    found = [odd_texts.reasons["raw/pairs.parquet", n] for n in (number, number + 1)]
    assert found == ["null_or_empty_query", "null_or_empty_passage"]


@pytest.mark.parametrize("case", KEPT)
def test_an_odd_text_is_kept_as_it_is(odd_texts: Delivery, case: str) -> None:
    text, start = KEPT[case]
    (query,) = [q for q in odd_texts.split_of if q.startswith(unicodedata.normalize("NFC", start)[:20])][:1]
    assert [answer.endswith(query) for answer in odd_texts.answers[query]] == [True]
    if case in ("HTML", "SQL", "emoji alone", "many combining marks"):
        assert query == unicodedata.normalize("NFC", text)


def test_only_blank_texts_are_dropped(odd_texts: Delivery) -> None:
    assert odd_texts.report.rejected_by_reason == {
        "null_or_empty_query": len(BLANK),
        "null_or_empty_passage": len(BLANK),
    }


ROWS: dict[str, tuple[list[Row], dict[int, str]]] = {
    "a passage of a million characters": ([one(text=LONG)], {0: "passage_too_long"}),
    "a question of a million characters": ([one(LONG)], {0: "query_too_long"}),
    "composed and decomposed": ([one("Où est-il ?"), one("Ou\u0300 est-il ?")], {1: "duplicate"}),
    "the answer is the question": (
        [one("Is this it? \u2764", "is THIS\nit? \u2764\ufe0f")],
        {0: "query_equals_passage"},
    ),
    "the answer is the question in full width": ([one("ABC why", "\uff21\uff22\uff23 why")], {}),
    "conflicting labels": (
        [one(relevance=1.0), one("Why so?", relevance=-2.0)],
        {0: "contradiction", 1: "contradiction"},
    ),
    "a damaged relevance": ([one(relevance=1e-320), one(text=passage(1), relevance=1.0)], {0: "invalid_relevance"}),
    "the smallest sound relevance": ([one(relevance=2.3e-308)], {}),
    "a huge relevance": ([one(relevance=1e308), one(text=passage(1), relevance=1.0)], {}),
    "relevance that is no number": ([one(relevance=float("nan"))], {0: "invalid_relevance"}),
    "minus infinity": ([one(relevance=float("-inf"))], {0: "invalid_relevance"}),
    "below zero only": ([one(relevance=-1.0)], {0: "query_without_positive"}),
    "minus zero": ([one(relevance=-0.0), one(text=passage(1), relevance=1.0)], {}),
    "one character again and again": ([one(text="a" * 50_000)], {}),
    "words of nothing but punctuation": ([one(text="... --- ...")], {}),
    "ids with spaces in and around them": (
        [one(query_id=" a b ", passage_id="c  d"), one(query_id="a b", passage_id=" c  d")],
        {1: "duplicate"},
    ),
    "an id in which nothing is drawn": ([one(query_id="\u3164"), one("how so", passage(1), query_id="\u200b")], {}),
    "short passages that differ in a selector": (
        [one(text="\u2764\ufe0f yes"), {**one("how so", "\u2764 yes"), "split": "test"}],
        {0: "split_leak"},
    ),
    "near-duplicates that differ in joiners": (
        [one(text=passage(0).replace(" ", "\u200d ")), {**one("how so"), "split": "test"}],
        {0: "split_leak"},
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_odd_rows(deliver: Deliver, case: str) -> None:
    rows, expected = ROWS[case]
    graded = any("relevance" in row for row in rows)
    others = [{**row, "relevance": 1.0} if graded else row for row in ALL_SPLITS]
    delivery = deliver(odd=rows, pairs=others)
    assert delivery.reasons == {("raw/odd.parquet", n): reason for n, reason in expected.items()}


@pytest.mark.parametrize("grades", [(1e-320, 1e-310), (1e308, 1.0), (1e308, 1e-320), (0.5, 1e-300), (5e-324, -1.0)])
def test_any_grade_can_be_measured(grades: tuple[float, float]) -> None:
    values = per_query({"q": dict(zip("ab", grades, strict=True))}, {"q": {"a": 2.0, "b": 1.0}})
    assert values["recall_at_10"]["q"] == 1.0
    assert 0.0 < values["ndcg_at_10"]["q"] <= 1.0


# -------------------------------------------------------------------------------- texts that stand for missing ones


@pytest.mark.parametrize("text", ["nan", "None", "NULL", "null", "N/A", "<NA>", "NaN", "NA", " nan\n"])
def test_a_text_that_stands_for_a_missing_one_answers_nothing(
    deliver: Deliver, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**one(f"who knows {n}", text), "title": text if n else "A title"} for n in range(20)]
    with caplog.at_level(logging.WARNING):
        delivery = deliver(odd=[*rows, one(text, passage(3))], pairs=ALL_SPLITS)
    assert delivery.report.rejected_by_reason == {"missing_text": 21}
    assert delivery.detail["raw/odd.parquet", 0] == f'passage "{text.strip()}"'
    told = text.strip()
    assert delivery.report.read_as_missing == {"passage": {told: 20}, "query": {told: 1}, "title": {told: 19}}
    assert text.strip() not in {row["text"] for row in delivery.table(PASSAGES_FILE)}
    assert f"passage: '{told}' in 20 rows" in caplog.text
    shown = cleaning_metadata(delivery.pipeline, delivery.cleaned)
    assert "| 20 |" in shown["read_as_missing"].value
    assert "missing_text" in shown["rejected_by_reason"].value


def test_who_means_it_can_keep_such_texts(deliver: Deliver) -> None:
    rows = [one("what is not a number", "nan"), one("what is nothing", "None")]
    delivery = deliver(odd=rows, pairs=ALL_SPLITS, cleaning={"missing_texts": ["None"]})
    assert delivery.reasons == {("raw/odd.parquet", 1): "missing_text"}
    assert delivery.answers["what is not a number"] == {"nan"}


def test_ids_documents_and_titles_that_stand_for_missing_ones_link_nothing(deliver: Deliver) -> None:
    columns = {"document_id": "nan", "query_id": "None", "passage_id": "<NA>", "title": "nan", "split": "NaN"}
    delivery = deliver(pairs=sound(0, 20, **columns))
    assert delivery.reasons == {}
    assert delivery.report.groups == 20
    assert {row["title"] for row in delivery.table(PASSAGES_FILE)} == {None}
    assert {row["document_id"] for row in delivery.table(PASSAGES_FILE)} == {None}
    assert delivery.report.read_as_missing == {name: {text: 20} for name, text in sorted(columns.items())}


def test_an_id_may_be_called_na(deliver: Deliver) -> None:
    """Namibia's, and the sodium of a table of elements."""
    files = beir(20)
    files["corpus"][3]["passage_id"] = files["qrels"][3]["passage_id"] = "NA"
    files["queries"][3]["query_id"] = files["qrels"][3]["query_id"] = "NULL"
    assert deliver(**files).reasons == {}


def test_a_corpus_with_missing_texts_is_told_where_answers_are_lost(deliver: Deliver) -> None:
    files = beir(100, by_tens)
    for number in (8, 9):
        files["corpus"][number]["text"] = "nan"
    with pytest.raises(CleaningError, match=r"passage_id c8 \(dropped as missing_text\)"):
        deliver(**files)


# ------------------------------------------------------------------------------------------------- delivered splits


def test_common_names_of_splits_are_read_and_told(deliver: Deliver, caplog: pytest.LogCaptureFixture) -> None:
    names = {"training": "train", " VALID": "dev", "Testing": "test", "development": "dev", "TRAIN\u200b": "train"}
    rows = [row for n, name in enumerate(names) for row in sound(900 + 20 * n, split=name)]
    with caplog.at_level(logging.INFO):
        delivery = deliver(pairs=rows)
    assert delivery.reasons == {}
    for n, split in enumerate(names.values()):
        assert {delivery.split_of[row["query"]] for row in sound(900 + 20 * n)} == {split}
    assert delivery.report.split_values == {
        "train": {"TRAIN\u200b": 4, "training": 4},
        "dev": {" VALID": 4, "development": 4},
        "test": {"Testing": 4},
    }
    assert "read as split test: 'Testing' in 4 rows" in caplog.text
    assert "Testing" in cleaning_metadata(delivery.pipeline, delivery.cleaned)["delivered_splits"].value


@pytest.mark.parametrize("name", ["holdout", "eval", "0", "test_1", "tes t", "trаin"])
def test_an_unknown_split_is_refused(deliver: Deliver, name: str) -> None:
    with pytest.raises(CleaningError) as refused:
        deliver(pairs=[*sound(0, 3, split=name), *ALL_SPLITS])
    told = str(refused.value)
    assert f"{name!r} in 3 row(s), the first is raw/pairs.parquet row 0" in told
    assert "3 of 15 rows" in told
    for accepted in ("train, training for train", "valid", "testing for test"):
        assert accepted in told


def test_many_unknown_splits_are_cut_short(deliver: Deliver) -> None:
    with pytest.raises(CleaningError, match="and 25 other values") as refused:
        deliver(pairs=[row for n in range(30) for row in sound(n, 1, split=f"fold {n} " + "x" * 200)])
    assert len(str(refused.value)) < 1_200


@pytest.mark.parametrize(("given", "empty"), [("test", "train"), ("dev", "train")])
def test_a_split_column_of_one_value_is_explained(deliver: Deliver, given: str, empty: str) -> None:
    with pytest.raises(CleaningError) as refused:
        deliver(pairs=sound(0, 20, split=given))
    told = str(refused.value)
    assert f"no query is left in {empty} after cleaning 20 rows" in told
    assert (
        f"Delivered: {', '.join(f'{20 * (split == given)} as {split}' for split in ('train', 'dev', 'test'))}" in told
    )
    assert "remove the split column" in told


def test_a_split_column_that_says_train_only_is_cut(deliver: Deliver) -> None:
    assert set(deliver(pairs=sound(0, 30, split="train")).split_of.values()) == {"train", "dev", "test"}


# -------------------------------------------------------------------------------------------------- too much of one

ALL_OF_ONE: dict[str, tuple[list[Row], str]] = {
    "all rows are one": (
        sound(0, 1) * 50,
        r"its 1 queries form 1 group.*49 duplicate \(.*the first is raw/pairs\.parquet row 1: query ",
    ),
    "one question": (
        [one("why so", passage(n)) for n in range(20)],
        r"its 1 queries form 1 group.*the passage '.*deliver",
    ),
    "one passage": (
        [one(f"who is {n}") for n in range(20)],
        r"its 20 queries form 1 group.*What links most of them is the passage '.*' \(20 queries\)",
    ),
    "one document": (
        sound(0, 20, document_id="x"),
        r"its 20 queries form 1 group.*the document 'x' \(20 queries\).*`columns\.document_id`",
    ),
    "one query_id": (
        sound(0, 20, query_id="x"),
        r"19 duplicate_id \(.*row 1: query_id x stands for another text since raw/pairs\.parquet row 0",
    ),
    "one passage_id": (
        sound(0, 20, passage_id="0"),
        r"19 duplicate_id \(.*row 1: passage_id 0 stands for another text since raw/pairs\.parquet row 0",
    ),
    "one row": (sound(0, 1), r"its 1 queries form 1 group"),
    "nothing that is not blank": (
        [one("\u3164", "\u2800")],
        r"no query is left in train after cleaning 1 rows.*1 null_or_empty_query",
    ),
}


@pytest.mark.parametrize("case", ALL_OF_ONE)
def test_too_much_of_one_thing_is_explained(deliver: Deliver, case: str) -> None:
    rows, said = ALL_OF_ONE[case]
    with pytest.raises(CleaningError, match=said):
        deliver(pairs=[{**row, "split": None} for row in rows])


def test_a_word_that_is_all_there_is_ends(deliver: Deliver) -> None:
    """Hundreds of passages of one word each, and of the same word: near-duplicates of nothing, or one cluster."""
    rows = [one(f"who is {n}", "word " * (n + 1)) for n in range(60)]
    assert len(deliver(pairs=[*rows, *ALL_SPLITS]).answers) == 60 + len(ALL_SPLITS)


# ---------------------------------------------------------------------------------------------- ids that do not match

IDS: dict[str, tuple[Callable[[int], str], str, str]] = {
    "zero padding": (lambda n: f"c{n:05}", "'c00008'", "'c8'"),
    "letter case": (lambda n: f"C{n}", "'C8'", "'c8'"),
    "fractions": (lambda n: f"c{n}.0", "'c8.0'", "'c8'"),
    "a tab behind": (lambda n: f"c{n}\t", r"'c8\t'", "'c8'"),
    "a space of another kind": (lambda n: f"c{n}\u00a0", r"'c8\xa0'", "'c8'"),
    "zero-width space": (lambda n: f"\u200bc{n}", r"'\u200bc8'", "'c8'"),
    "Hangul filler": (lambda n: f"c{n}\u3164", r"'c8\u3164'", "'c8'"),
    "byte-order mark": (lambda n: f"\ufeffc{n}", r"'\ufeffc8'", "'c8'"),
    "full width": (lambda n: f"\uff43{n}", r"'\uff438'", "'c8'"),
    "a separator": (lambda n: f"c-{n}", "'c-8'", "'c8'"),
    "a letter of another script": (lambda n: f"с{n}", r"'\u04418'", "'c0'"),
    "a prefix": (lambda n: f"doc-{n}", "'doc-8'", "'c0'"),
}


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("whose", ["passage_id", "query_id"])
def test_ids_that_do_not_match_stand_side_by_side(deliver: Deliver, case: str, whose: str) -> None:
    spelled, judged, there = IDS[case]
    files = beir(100, by_tens)
    for n in range(100):
        files["queries"][n]["query_id"], files["corpus"][n]["passage_id"] = f"c{n}", f"c{n}"
        files["qrels"][n] |= {"query_id": f"c{n}", "passage_id": f"c{n}", whose: spelled(n)}
    with pytest.raises(CleaningError) as refused:
        deliver(**files)
    told = str(refused.value)
    assert f"{whose} {judged}, while {there} is there" in told
    assert "test: 20 of 20 answers (100.0%) are missing" in told
    if "'c8'" in there:
        assert f"is there (raw/{'corpus' if whose == 'passage_id' else 'queries'}.parquet row 8)" in told


def test_ids_of_another_type_in_another_file_match(deliver: Deliver) -> None:
    """Whole numbers here, text there."""
    files = beir(20)
    for n in range(20):
        files["corpus"][n]["passage_id"] = n
        files["qrels"][n]["passage_id"] = f" {n}"
    delivery = deliver(**files)
    assert delivery.reasons == {}
    assert len(delivery.table(QRELS_FILE)) == len(delivery.table(QUERIES_FILE)) == 20
