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
KEPT = {
    "mixed scripts": "Что такое β-Test 测试 של מילה?",
    "right to left": "מה זה \u05d0\u05b8?",
    "Arabic with signs": "ما هُوَ الإطار؟",
    "Persian with joiners": "می\u200cخواهم بدانم",
    "many combining marks": "why" + "\u0301\u0323\u0336" * 30 + " so",
    "HTML": "<b>What</b> is &amp; <script>alert(1)</script>?",
    "SQL": "'; DROP TABLE rows; --",
    "braces and percent": "{{env.HOME}} %s {0} \\x41 $raw",
    "emoji alone": "\u2764\ufe0f\U0001f525",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "unassigned and private": "what is \U000f1234 or \ue000",
    "digits only": "4711",
    "a word that starts as a missing one": "nan bread",
    "none in lower case": "none",
}


@pytest.fixture(scope="module")
def odd_texts(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    """Each blank text as a query and as a passage, each kept text as a query and in a passage."""
    rows = list(ALL_SPLITS)
    for n, text in enumerate(BLANK.values()):
        rows += [one(text, passage(n)), one(f"who is {n}", text)]
    for n, text in enumerate(KEPT.values()):
        rows += [one(text, f"{passage(100 + n)} {text}")]
    return clean_delivery(tmp_path_factory.mktemp("odd") / "hostile", {"pairs": rows})


@pytest.mark.parametrize("case", BLANK)
def test_a_text_in_which_nothing_is_drawn_is_empty(odd_texts: Delivery, case: str) -> None:
    number = len(ALL_SPLITS) + 2 * list(BLANK).index(case)
    found = [odd_texts.reasons["raw/pairs.parquet", n] for n in (number, number + 1)]
    assert found == ["null_or_empty_query", "null_or_empty_passage"]


@pytest.mark.parametrize("case", KEPT)
def test_an_odd_text_is_kept_as_it_is(odd_texts: Delivery, case: str) -> None:
    kept = unicodedata.normalize("NFC", KEPT[case])
    assert odd_texts.answers[kept] == {f"{passage(100 + list(KEPT).index(case))} {kept}"}


def test_only_blank_texts_are_dropped(odd_texts: Delivery) -> None:
    assert odd_texts.report.rejected_by_reason == {
        "null_or_empty_query": len(BLANK),
        "null_or_empty_passage": len(BLANK),
    }


def odd_rows(number: int) -> dict[str, tuple[list[Row], dict[int, str]]]:
    """Rows, and which are dropped for which reason. `number` keeps the rows of one case apart from those of others."""

    def answer(n: int) -> str:
        return passage(1_000 + 3 * number + n)

    def row(query: str | None = None, text: str | None = None, **columns: Any) -> Row:
        return one(query or f"why so {number}", text or answer(0), **columns)

    return {
        "a passage of a million characters": ([row(text=LONG)], {0: "passage_too_long"}),
        "a question of a million characters": ([row(LONG)], {0: "query_too_long"}),
        "NUL and marks of direction": ([row("where\x00 \u200fis it\u202e"), row("where is it")], {1: "duplicate"}),
        "composed and decomposed": ([row("Où est-il ?"), row("Ou\u0300 est-il ?")], {1: "duplicate"}),
        "the answer is the question": (
            [row("Is this it? \u2764", "is THIS\nit? \u2764\ufe0f")],
            {0: "query_equals_passage"},
        ),
        "the answer is the question in full width": ([row("ABC why", "\uff21\uff22\uff23 why")], {}),
        "conflicting labels": (
            [row(relevance=1.0), row(f"Why so, {number}?", relevance=-2.0)],
            {0: "contradiction", 1: "contradiction"},
        ),
        "a damaged relevance": ([row(relevance=1e-320), row(text=answer(1), relevance=1.0)], {0: "invalid_relevance"}),
        "the smallest sound relevance": ([row(relevance=2.3e-308)], {}),
        "a huge relevance": ([row(relevance=1e308), row(text=answer(1), relevance=1.0)], {}),
        "relevance that is no number": ([row(relevance=float("nan"))], {0: "invalid_relevance"}),
        "minus infinity": ([row(relevance=float("-inf"))], {0: "invalid_relevance"}),
        "below zero only": ([row(relevance=-1.0)], {0: "query_without_positive"}),
        "minus zero": ([row(relevance=-0.0), row(text=answer(1), relevance=1.0)], {}),
        "one character again and again": ([row(text="a" * 50_000)], {}),
        "words of nothing but punctuation": ([row(text="... --- ...")], {}),
        "ids with spaces in and around them": (
            [row(query_id=" a b ", passage_id="c  d"), row(query_id="a b", passage_id=" c  d")],
            {1: "duplicate"},
        ),
        "an id in which nothing is drawn": (
            [row(query_id="\u3164"), row(f"how so {number}", answer(1), query_id="\u200b")],
            {},
        ),
        "short passages that differ in a selector": (
            [row(text="\u2764\ufe0f yes"), {**row(f"how so {number}", "\u2764 yes"), "split": "test"}],
            {0: "split_leak"},
        ),
        "near-duplicates that differ in joiners": (
            [row(text=answer(0).replace(" ", "\u200d ")), {**row(f"how so {number}"), "split": "test"}],
            {0: "split_leak"},
        ),
    }


ODD_ROWS = list(odd_rows(0))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    """A file each case: one that gives a relevance gives it for every row."""
    files = {f"odd{n}": odd_rows(n)[case][0] for n, case in enumerate(ODD_ROWS)}
    return clean_delivery(tmp_path_factory.mktemp("rows") / "hostile", {**files, "pairs": ALL_SPLITS})


@pytest.mark.parametrize("case", ODD_ROWS)
def test_odd_rows(odd: Delivery, case: str) -> None:
    number = ODD_ROWS.index(case)
    rows, expected = odd_rows(number)[case]
    found = {n: odd.reasons.get((f"raw/odd{number}.parquet", n)) for n in range(len(rows))}
    assert {n: reason for n, reason in found.items() if reason} == expected


@pytest.mark.parametrize("grades", [(1e-320, 1e-310), (1e308, 1.0), (1e308, 1e-320), (0.5, 1e-300), (5e-324, -1.0)])
def test_any_grade_can_be_measured(grades: tuple[float, float]) -> None:
    values = per_query({"q": dict(zip("ab", grades, strict=True))}, {"q": {"a": 2.0, "b": 1.0}})
    assert values["recall_at_10"]["q"] == 1.0
    assert 0.0 < values["ndcg_at_10"]["q"] <= 1.0


# -------------------------------------------------------------------------------- texts that stand for missing ones


def test_texts_that_stand_for_missing_ones_are_dropped(deliver: Deliver) -> None:
    texts = ["nan", "NaN", "NaT", "None", "NULL", "null", "N/A", "n/a", "NA", "<NA>", "#N/A", "\ufeffnan\n"]
    rows = [row for n, text in enumerate(texts) for row in (one(f"who knows {n}", text), one(text, passage(n)))]
    assert deliver(odd=rows, pairs=ALL_SPLITS).report.rejected_by_reason == {"missing_text": 24}


def test_one_passage_that_is_missing_does_not_answer_twenty_questions(
    deliver: Deliver, caplog: pytest.LogCaptureFixture
) -> None:
    text = " nan"
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


@pytest.mark.parametrize("name", ["holdout", "tes t", "trаin"])
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


@pytest.mark.parametrize("given", ["test", "dev"])
def test_a_split_column_of_one_value_is_explained(deliver: Deliver, given: str) -> None:
    with pytest.raises(CleaningError) as refused:
        deliver(pairs=sound(0, 20, split=given))
    told = str(refused.value)
    assert "no query is left in train after cleaning 20 rows" in told
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

# How qrels spell the id, how that is shown, and the id beside it ("c0": no id is like it).
IDS: dict[str, tuple[Callable[[int], str], str, str]] = {
    "zero padding": (lambda n: f"c{n:05}", "'c000{n:02}'", "c{n}"),
    "letter case": (lambda n: f"C{n}", "'C{n}'", "c{n}"),
    "fractions": (lambda n: f"c{n}.0", "'c{n}.0'", "c{n}"),
    "a tab behind": (lambda n: f"c{n}\t", r"'c{n}\t'", "c{n}"),
    "a space of another kind": (lambda n: f"c\u00a0{n}", r"'c\xa0{n}'", "c{n}"),
    "zero-width space": (lambda n: f"\u200bc{n}", r"'\u200bc{n}'", "c{n}"),
    "Hangul filler": (lambda n: f"c{n}\u3164", r"'c{n}\u3164'", "c{n}"),
    "byte-order mark": (lambda n: f"\ufeffc{n}", r"'\ufeffc{n}'", "c{n}"),
    "full width": (lambda n: f"\uff43{n}", r"'\uff43{n}'", "c{n}"),
    "a separator": (lambda n: f"c-{n}", "'c-{n}'", "c{n}"),
    "a letter of another script": (lambda n: f"с{n}", r"'\u0441{n}'", "c0"),
    "a prefix": (lambda n: f"doc-{n}", "'doc-{n}'", "c0"),
}


@pytest.fixture(scope="module")
def odd_ids(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    """Every case once in qrels, for a passage_id and for a query_id."""
    files = beir(100)
    for n in range(100):
        files["queries"][n]["query_id"], files["corpus"][n]["passage_id"] = f"c{n}", f"c{n}"
        files["qrels"][n] |= {"query_id": f"c{n}", "passage_id": f"c{n}"}
    for n, (spelled, _, _) in enumerate(IDS.values()):
        files["qrels"][20 + n]["passage_id"] = spelled(20 + n)
        files["qrels"][50 + n]["query_id"] = spelled(50 + n)
    return clean_delivery(tmp_path_factory.mktemp("ids") / "hostile", files, max_missing_answers=0.5)


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("whose", ["passage_id", "query_id"])
def test_ids_that_do_not_match_stand_side_by_side(odd_ids: Delivery, case: str, whose: str) -> None:
    _, judged, there = IDS[case]
    number = list(IDS).index(case) + (20 if whose == "passage_id" else 50)
    detail = odd_ids.detail["raw/qrels.parquet", number]
    assert detail.startswith(f"{whose} {judged.format(n=number)}, while '{there.format(n=number)}' is there")
    if there != "c0":
        file = "corpus" if whose == "passage_id" else "queries"
        assert detail.endswith(f" (raw/{file}.parquet row {number})")


def test_a_delivery_in_which_no_id_matches_is_refused_with_two_ids(deliver: Deliver) -> None:
    files = beir(20)
    for n in range(20):
        files["qrels"][n]["passage_id"] = f"C{n:04}"
    said = r"20 of 20 answers .* missing.*passage_id 'C0000', while 'c0' is there \(raw/corpus\.parquet row 0\)"
    with pytest.raises(CleaningError, match=said):
        deliver(**files)


def test_ids_of_another_type_in_another_file_match(deliver: Deliver) -> None:
    """Whole numbers here, text there."""
    files = beir(20)
    for n in range(20):
        files["corpus"][n]["passage_id"] = n
        files["qrels"][n]["passage_id"] = f" {n}"
    delivery = deliver(**files)
    assert delivery.reasons == {}
    assert len(delivery.table(QRELS_FILE)) == len(delivery.table(QUERIES_FILE)) == 20
