"""What a delivery can get wrong without anybody noticing, and what becomes of it: each lie told once, on real files.

Every test delivers parquet files to a pipeline, runs its first stages, and looks at what a user would see: which row
went where, for which reason, and that nothing is left of the leak.
"""
# ruff: noqa: RUF001 - characters that look alike are what some of it is about

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from embed_pipeline.artifacts import PipelineStore
from embed_pipeline.errors import CleaningError
from embed_pipeline.orchestration.checks import answers_are_in_the_corpus
from embed_pipeline.tables import (
    QUERIES_FILE,
    SPLITS,
)
from tests.deliveries import ALL_SPLITS, Delivery, Row, beir, by_tens, clean_delivery, passage, sound

RUN, MOST_OVERLAP = 13, 0.2


@pytest.fixture
def deliver(tmp_path: Path) -> Callable[..., Delivery]:
    """`deliver(pairs=[...], **cleaning)`, or with corpus, queries and qrels."""

    def build(
        model: Path = Path("model"), cleaning: Mapping[str, Any] | None = None, **files: Sequence[Row]
    ) -> Delivery:
        return clean_delivery(tmp_path / "lies", files, model, **(cleaning or {}))

    return build


# ------------------------------------------------------------------------------- the same question in two splits

QUESTION = "How do I sort the values of a frame?"
SPELLINGS: dict[str, tuple[str, str]] = {
    "letter case": (QUESTION, "how do i SORT the Values of a FRAME?"),
    "no question mark": ("What is a frame made of?", "What is a frame made of"),
    "more question marks": ("Which frame is the widest?", "Which frame is the widest ???"),
    "commas and dashes": ("Is a frame, or a series, faster?", "is a frame - or a series - faster?"),
    "quotes": ("What does the word frame mean?", "“What does the word 'frame' mean?”"),
    "backticks": ("Where does append put a row?", "Where does `append` put a row?"),
    "apostrophes": ("What's the index of a frame?", "What’s the index of a frame"),
    "apostrophe that is a letter": ("Who's the author?", "who\u02bcs the author"),
    "apostrophe left out": ("Why doesn't my frame print?", "why doesnt my frame print"),
    "full width": ("Who wrote pandas 2 first?", "Ｗｈｏ　ｗｒｏｔｅ　ｐａｎｄａｓ　２　ｆｉｒｓｔ？"),
    "ligature": ("Can a filter find offline files?", "Can a ﬁlter ﬁnd oﬄine ﬁles?"),
    "composed and decomposed": ("Où est le café ?", "Ou\u0300 est le cafe\u0301 ?"),
    "sharp s": ("Wie heißt die Straße?", "WIE HEISST DIE STRASSE?"),
    "invisible characters": ("When was numpy founded?", "When\u200b was num\u00adpy founded?"),
    "word order": ("sort values of a frame", "of a frame sort values"),
    "word order and case": ("Frame to csv: how?", "how frame to CSV"),
    "one word or two": ("log in with a token", "login with a token"),
    "hyphenated": ("send a chart by e-mail", "send a chart by email"),
    "Chinese word order": ("怎么对数据框排序？", "数据框怎么对排序"),
    "Chinese, full width and spaces": ("怎么打开PDF文件？", "怎么 打开 ＰＤＦ 文件"),
    "Chinese brackets": ("「索引」是什么？", "索引是什么"),
    "Japanese": ("データをどう並べ替えますか？", "どうデータを並べ替えますか"),
    "half-width katakana": ("データ型とは何ですか", "ﾃﾞｰﾀ型とは何ですか"),
    "Korean spacing": ("데이터를 어떻게 정렬하나요?", "데이터를 어떻게정렬하나요"),
    "Thai": ("จัดเรียงข้อมูลอย่างไร?", "อย่างไรจัดเรียงข้อมูล"),
    "one word": ("Broadcasting?", "broadcasting"),
    "only punctuation": ("?!?!", "？！？！"),
    "emoji with and without its selector": ("Does \u2764\ufe0f sell?", "does \u2764 sell"),
    "text selector": ("What is \u260e\ufe0e for?", "what is \u260e for"),
    "keycap": ("Who won 1\ufe0f\u20e3?", "who won 1\u20e3"),
    "ideographic selector": ("\u845b\U000e0100\u57ce\u5e02", "\u845b\u57ce\u5e02"),
    "joiner of an emoji": ("Is \U0001f469\u200d\U0001f4bb free?", "is \U0001f469\U0001f4bb free"),
    "joiner in Persian": ("می\u200cخواهم بدانم", "میخواهم بدانم"),
    "joiner in Hindi": ("क्\u200dष अक्षर", "क्ष अक्षर"),
    "grapheme joiner": ("Where is Zu\u034frich?", "where is Zurich"),
    "Hangul filler": ("Where\u3164 is\uffa0 Seoul?", "where is Seoul"),
    "tags": ("Which flag \U0001f3f4\U000e0067\U000e007f?", "which flag \U0001f3f4"),
    "word joiner": ("Was re\u2060do fixed?", "was redo fixed"),
}


@pytest.fixture(scope="module")
def asked_in_test_and_train(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    """Each question is test's, and its other spelling train's, with an answer of its own."""
    rows = list(ALL_SPLITS)
    for n, (asked, again) in enumerate(SPELLINGS.values()):
        rows += [
            {"query": asked, "passage": passage(2 * n), "split": "test"},
            {"query": again, "passage": passage(2 * n + 1), "split": "train"},
        ]
    return clean_delivery(tmp_path_factory.mktemp("delivered") / "lies", {"pairs": rows})


@pytest.fixture(scope="module")
def asked_twice(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    """The same without a delivered split."""
    rows = sound(900, 20)
    for n, spellings in enumerate(SPELLINGS.values()):
        rows += [{"query": query, "passage": passage(2 * n + i)} for i, query in enumerate(spellings)]
    return clean_delivery(tmp_path_factory.mktemp("cut") / "lies", {"pairs": rows})


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_test_question_in_train_in_another_spelling_leaves_train(
    asked_in_test_and_train: Delivery, case: str
) -> None:
    number = len(ALL_SPLITS) + 2 * list(SPELLINGS).index(case) + 1
    row = ("raw/pairs.parquet", number)
    assert asked_in_test_and_train.reasons[row] == "split_leak"
    assert re.match(r'shares query ".+" with test query ', asked_in_test_and_train.detail[row])
    asked = unicodedata.normalize("NFC", SPELLINGS[case][0])
    assert asked_in_test_and_train.split_of[asked] == "test"


def test_of_a_question_in_two_spellings_only_trains_is_dropped(asked_in_test_and_train: Delivery) -> None:
    assert asked_in_test_and_train.report.rejected_by_reason == {"split_leak": len(SPELLINGS)}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings_of_a_question_stand_in_one_split_and_stay_two_questions(asked_twice: Delivery, case: str) -> None:
    asked, again = (re.sub("[\u200b\u00ad]", "", unicodedata.normalize("NFC", query)) for query in SPELLINGS[case])
    splits = [asked_twice.split_of[re.sub(r"\s", " ", query)] for query in (asked, again)]
    assert splits[0] == splits[1]


def test_no_spelling_of_a_question_is_dropped_where_no_split_was_delivered(asked_twice: Delivery) -> None:
    assert asked_twice.reasons == {}
    groups = {row["group_id"] for row in asked_twice.table(QUERIES_FILE)}
    assert len(groups) == 20 + len(SPELLINGS)  # two spellings a group, and nothing glued to anything else


def same_words(query: str) -> tuple[str, ...]:
    """A question's words in any order; what is written without spaces by its characters."""
    words = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFKC", query).casefold()).split()
    return tuple(sorted("".join(words) if not query.isascii() else words))


@pytest.mark.parametrize("which", ["asked_in_test_and_train", "asked_twice"])
def test_no_two_splits_share_the_words_of_a_question(which: str, request: pytest.FixtureRequest) -> None:
    splits: dict[tuple[str, ...], set[str]] = {}
    for query, split in request.getfixturevalue(which).split_of.items():
        splits.setdefault(same_words(query), set()).add(split)
    assert [words for words, found in splits.items() if len(found) > 1] == []


def test_questions_that_are_not_the_same_are_not_linked(deliver: Callable[..., Delivery]) -> None:
    """Short ones, and those that differ by a symbol or by a single word: each may stand in a split of its own."""
    alike = ["c", "c++", "c#", "c?!a", "r", "go", "ab", "ba", "上", "下", "上海", "股票", "frame", "frames", "a frame"]
    alike += ["install a package", "uninstall a package", "type 1 error", "type 2 error", "1.5", "1.6", "π", "Δ"]
    rows = [{"query": query, "passage": passage(n)} for n, query in enumerate(alike)]
    delivery = deliver(pairs=[*rows, *sound(900, 20)], cleaning={"query_min_characters": 1})
    groups = [row["group_id"] for row in delivery.table(QUERIES_FILE)]
    assert delivery.reasons == {}
    assert len(set(groups)) == len(rows) + 20


def test_what_answers_one_spelling_is_no_negative_of_another(
    deliver: Callable[..., Delivery], tiny_bert_folder: Path
) -> None:
    rows = [{"query": QUESTION, "passage": passage(1)}, {"query": QUESTION.upper(), "passage": passage(2)}]
    spelled = [{**row, "split": "train"} for row in rows]
    delivery = deliver(model=tiny_bert_folder, pairs=[*spelled, *ALL_SPLITS])
    assert delivery.withheld == {QUESTION: {passage(2)}, QUESTION.upper(): {passage(1)}}
    assert delivery.answers[QUESTION] == {passage(1)}
    for query in (QUESTION, QUESTION.upper()):
        assert delivery.negatives[query]
        assert not delivery.negatives[query] & {passage(1), passage(2)}


# ------------------------------------------------------------------------------------------ one passage, two ids


@pytest.mark.parametrize("action", ["merge", "keep"])
@pytest.mark.parametrize("copy", ["word for word", "nearly"])
def test_a_passage_that_stands_twice_stays_once_and_is_no_negative_of_its_question(
    deliver: Callable[..., Delivery], tiny_bert_folder: Path, copy: str, action: str
) -> None:
    """The user knows that c0 answers k0; its copy is called c0b, and answers k1."""
    files = beir(40, by_tens)
    again = passage(0) if copy == "word for word" else passage(0, 1)
    files["corpus"].append({"passage_id": "c0b", "text": again})
    files["qrels"][1]["passage_id"] = "c0b"
    delivery = deliver(model=tiny_bert_folder, cleaning={"near_duplicates": {"action": action}}, **files)

    if copy == "word for word":
        expected, standing = {("raw/corpus.parquet", 40): "duplicate_passage"}, (passage(0), passage(0))
    elif action == "merge":
        expected, standing = {("raw/corpus.parquet", 0): "near_duplicate_passage"}, (again, again)
    else:
        expected, standing = {}, (passage(0), again)
    assert delivery.reasons == expected
    assert delivery.answers["where is number 0"] == {standing[0]}
    assert delivery.answers["where is number 1"] == {standing[1]}
    assert delivery.split_of["where is number 0"] == delivery.split_of["where is number 1"] == "train"
    for query in ("where is number 0", "where is number 1"):
        assert delivery.negatives[query]
        assert not delivery.negatives[query] & {passage(0), again}


# ------------------------------------------------------------------------------------ one document, two splits


def chunks(number: int) -> list[str]:
    """A document of 240 words cut every 30 words, 60 words a chunk: neighbours share a half of each other."""
    words = [f"w{number * 1_000 + i}" for i in range(240)]
    return [" ".join(words[start : start + 60]) for start in range(0, 181, 30)]


def of_documents(count: int, split_of: Callable[[int], str | None], named: bool) -> list[Row]:
    """A question for each chunk; its split goes by the chunk's place in the document."""
    return [
        {
            "query": f"what stands on page {part} of book b{number}",
            "passage": text,
            "document_id": f"book {number}" if named else None,
            "split": split_of(part),
        }
        for number in range(count)
        for part, text in enumerate(chunks(number))
    ]


def words_in_common(left: str, right: str) -> float:
    """The share of `right`'s runs of 13 words that `left` holds."""
    runs = [{tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)} for words in (left.split(), right.split())]
    return len(runs[0] & runs[1]) / len(runs[1])


def overlaps(delivery: Delivery) -> list[tuple[str, str]]:
    """Questions of train and of a held-out split whose answers repeat each other, found the long way."""
    held = [query for query, split in delivery.split_of.items() if split != "train"]
    trained = [query for query, split in delivery.split_of.items() if split == "train"]
    return [
        (query, other)
        for query in trained
        for other in held
        for left in delivery.answers[query]
        for right in delivery.answers[other]
        if words_in_common(left, right) > MOST_OVERLAP
    ]


def test_chunks_of_a_named_document_stand_in_one_split(deliver: Callable[..., Delivery]) -> None:
    delivery = deliver(pairs=of_documents(30, lambda part: None, named=True))
    assert delivery.reasons == {}
    for number in range(30):
        assert len({delivery.split_of[f"what stands on page {part} of book b{number}"] for part in range(7)}) == 1
    assert set(delivery.split_of.values()) == set(SPLITS)


def test_chunks_of_a_named_document_in_two_delivered_splits_leave_train(deliver: Callable[..., Delivery]) -> None:
    rows = of_documents(6, lambda part: "test" if part == 0 else "train", named=True)
    delivery = deliver(pairs=[*rows, *ALL_SPLITS])
    trained = {("raw/pairs.parquet", n): "split_leak" for n, row in enumerate(rows) if row["split"] == "train"}
    assert delivery.reasons == trained
    assert delivery.detail["raw/pairs.parquet", 1].startswith('shares document "book 0" with test query')
    assert delivery.report.queries_by_split["test"] == 6 + 4


@pytest.mark.parametrize("split", ["delivered", "cut"])
def test_overlapping_chunks_of_a_document_that_nobody_named_leave_train(
    deliver: Callable[..., Delivery], split: str
) -> None:
    """Chunk 2 shares nothing with 0 and 4, and a half with 1 and 3."""
    told = (lambda part: "test" if part == 2 else "train") if split == "delivered" else (lambda part: None)
    rows = of_documents(12, told, named=False)
    delivery = deliver(pairs=[*rows, *(ALL_SPLITS if split == "delivered" else sound(900, 20))])
    assert set(delivery.reasons.values()) == {"overlap_leak"}
    assert all(" % of the 13-word runs of passage " in detail for detail in delivery.detail.values())
    assert overlaps(delivery) == []
    if split == "delivered":
        assert set(delivery.reasons) == {("raw/pairs.parquet", n) for n in range(len(rows)) if n % 7 in (1, 3)}
        assert delivery.report.queries_by_split["test"] == 12 + 4


# --------------------------------------------------------------------------------------- a delivered split leaks


def test_a_delivered_split_that_leaks_is_mended_at_the_cost_of_train(deliver: Callable[..., Delivery]) -> None:
    leaks = {
        "query": [{"query": "Why is it so?"}, {"query": "so is it, why"}],
        "document": [{"document_id": "manual.pdf"}, {"document_id": "manual.pdf"}],
        "cluster": [{"passage": passage(1)}, {"passage": passage(1, 1)}],
    }
    rows = []
    for n, (held, trained) in enumerate(leaks.values()):
        for split, own in (("test", held), ("train", trained)):
            rows.append({"query": f"{split} asks {n}", "passage": passage(100 + len(rows)), "split": split, **own})
    # What dev shares with test leaves dev, and what train shares with dev leaves train.
    rows += [
        {"query": "dev asks", "passage": passage(1, 2), "split": "validation"},
        {"query": "dev asks something else", "passage": passage(200), "split": "dev"},
        {"query": "train asks dev's", "passage": passage(200, 1), "split": "train"},
    ]
    delivery = deliver(pairs=[*rows, *ALL_SPLITS])
    assert delivery.reasons == {("raw/pairs.parquet", n): "split_leak" for n in (1, 3, 5, 6, 8)}
    assert [delivery.detail["raw/pairs.parquet", n].split('"')[0] for n in (1, 3, 5, 6, 8)] == [
        "shares query ",
        "shares document ",
        *["shares cluster "] * 3,
    ]
    assert delivery.report.split_leaks == 5
    assert delivery.report.queries_by_split == {"train": 4, "dev": 5, "test": 7}
    assert delivery.report.delivered_splits == ["train", "dev", "test"]
    for left, right in combinations(delivery.split_of, 2):
        if delivery.split_of[left] != delivery.split_of[right]:
            assert same_words(left) != same_words(right)
            assert not delivery.answers[left] & delivery.answers[right]


# ------------------------------------------------------------------------------------------------ lost answers


def without(rows: Sequence[Row], ids: Iterable[str]) -> list[Row]:
    gone = set(ids)
    return [row for row in rows if row["passage_id"] not in gone]


def test_a_truncated_corpus_is_refused_and_nothing_is_published(
    deliver: Callable[..., Delivery], tmp_path: Path
) -> None:
    """Of 20 test questions two have lost their answer: over the other 18 the figures would look the same, or better."""
    files = beir(100, by_tens)
    lost = [f"c{n}" for n in (8, 9)]
    said = (
        r"answers are missing from the delivery\. test: 2 of 20 answers \(10\.0%\) are missing, and with them 2 of 20 "
        r"questions\. For example raw/qrels\.parquet row 8: unknown_passage, passage_id c8;.*`cleaning\.max_missing_a"
    )
    with pytest.raises(CleaningError, match=said):
        deliver(**{**files, "corpus": without(files["corpus"], lost)})
    assert not PipelineStore(tmp_path / "lies" / "store", "lies").has_current("cleaned_pairs")


def test_single_answers_that_are_missing_are_counted_and_told(deliver: Callable[..., Delivery]) -> None:
    files = beir(300, by_tens)
    delivery = deliver(**{**files, "corpus": without(files["corpus"], ["c8", "c0"])})

    assert delivery.reasons == {
        ("raw/qrels.parquet", 0): "unknown_passage",
        ("raw/qrels.parquet", 8): "unknown_passage",
        ("raw/queries.parquet", 0): "query_without_positive",
        ("raw/queries.parquet", 8): "query_without_positive",
    }
    assert delivery.detail["raw/qrels.parquet", 8] == "passage_id c8"
    of_test = delivery.report.answers_by_split["test"]
    assert (of_test.answers, of_test.missing, of_test.queries, of_test.queries_lost) == (60, 1, 60, 1)
    assert delivery.report.queries_by_split == {"train": 209, "dev": 30, "test": 59}
    assert answers_are_in_the_corpus(delivery.pipeline) == [
        "train: 1 of 210 answers (0.5%) are missing, and with them 1 of 210 questions",
        "test: 1 of 60 answers (1.7%) are missing, and with them 1 of 60 questions",
    ]


def test_a_whole_corpus_gives_no_cause_for_complaint(deliver: Callable[..., Delivery]) -> None:
    assert answers_are_in_the_corpus(deliver(**beir(100, by_tens)).pipeline) == []


def test_who_knows_that_answers_are_missing_can_say_so(deliver: Callable[..., Delivery]) -> None:
    files = beir(100, by_tens)
    corpus = without(files["corpus"], [f"c{n}" for n in range(8, 100, 10)])  # half of test's
    delivery = deliver(cleaning={"max_missing_answers": 0.5}, **{**files, "corpus": corpus})
    assert delivery.report.answers_by_split["test"].missing == 10
    assert delivery.report.queries_by_split["test"] == 10
    assert answers_are_in_the_corpus(delivery.pipeline) != []


def test_few_lost_answers_can_be_many_lost_questions(deliver: Callable[..., Delivery]) -> None:
    """One question has 60 answers, 20 have one: two lost answers are 2.5 % of all, and 9.5 % of the questions."""
    files = beir(100, by_tens)
    extra = [f"e{n}" for n in range(60)]
    files["corpus"] += [{"passage_id": id, "text": passage(500 + n)} for n, id in enumerate(extra)]
    files["queries"].append({"query_id": "many", "text": "what is there"})
    files["qrels"] += [{"query_id": "many", "passage_id": id, "score": 1.0, "split": "test"} for id in extra]
    with pytest.raises(CleaningError, match=r"test: 2 of 80 answers \(2\.5%\) are missing, and with them 2 of 21"):
        deliver(**{**files, "corpus": without(files["corpus"], ["c8", "c9"])})


def nowhere(column: str, value: str | None) -> dict[str, list[Row]]:
    """Every tenth judgement, two of test's, points nowhere."""
    files = beir(100, by_tens)
    for number in (8, 9):
        files["qrels"][number][column] = value
    return files


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (nowhere("query_id", "k999"), "row 8: unknown_query, query_id 'k999', while 'k0' is there"),
        (nowhere("passage_id", "c999"), "row 8: unknown_passage, passage_id 'c999', while 'c0' is there"),
        (
            nowhere("passage_id", "C8 "),
            "row 8: unknown_passage, passage_id 'C8', while 'c8' is there",
        ),
        (nowhere("query_id", None), "row 8: missing_id, no query_id"),
    ],
    ids=["unknown query", "unknown passage", "id in another spelling", "no id"],
)
def test_qrels_that_point_nowhere_are_refused(
    deliver: Callable[..., Delivery], files: dict[str, list[Row]], said: str
) -> None:
    with pytest.raises(CleaningError, match=rf"test: 2 of 20 answers .* For example raw/qrels\.parquet {said}"):
        deliver(**files)


def test_answers_that_the_limits_on_length_dropped_are_missing_too(deliver: Callable[..., Delivery]) -> None:
    files = beir(100, by_tens)
    for number in (8, 9):
        files["corpus"][number]["text"] = "?"
    with pytest.raises(CleaningError, match=r"row 8: unknown_passage, passage_id c8 \(dropped as passage_too_short\)"):
        deliver(**files)


def test_unanswered_questions_of_train_are_only_dropped(deliver: Callable[..., Delivery]) -> None:
    unanswered = [{"query": f"who knows {n}", "passage": None, "split": "train"} for n in range(5)]
    delivery = deliver(pairs=[*unanswered, *ALL_SPLITS])
    assert delivery.reasons == {("raw/pairs.parquet", n): "null_or_empty_passage" for n in range(5)}


def test_test_pairs_without_their_passage_are_refused(deliver: Callable[..., Delivery]) -> None:
    unanswered = [{"query": f"who knows {n}", "passage": " ", "split": "test"} for n in range(5)]
    with pytest.raises(CleaningError, match=r"test: 5 of 9 answers \(55\.6%\) are missing, and with them 5 of 9"):
        deliver(pairs=[*unanswered, *ALL_SPLITS])


# ------------------------------------------------------------------------------------------------ contradictions

CONTRADICTIONS: dict[str, tuple[Row, Row]] = {
    "word for word": ({"query": "why so"}, {"query": "why so"}),
    "letter case": ({"query": "why so"}, {"query": "Why so"}),
    "punctuation": ({"query": "why so"}, {"query": "“why”, so?!"}),
    "spaces": ({"query": "why login"}, {"query": "why log-in"}),
    "full width": ({"query": "为什么ABC？"}, {"query": "为什么ＡＢＣ"}),
    "a near-duplicate": ({"query": "why so"}, {"query": "why so", "passage": passage(0, 1)}),
    "both": ({"query": "why so"}, {"query": "WHY SO?", "passage": passage(0, 1)}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_two_users_who_contradict_each_other_are_both_left_out(deliver: Callable[..., Delivery], case: str) -> None:
    one, other = ({"passage": passage(0), "split": "train", **row} for row in CONTRADICTIONS[case])
    graded = [{**row, "relevance": 1.0} for row in ALL_SPLITS]
    # The question has another answer, and the passage another question: both stay.
    more = [{"query": one["query"], "passage": passage(5)}, {"query": "how so", "passage": passage(0)}]
    first = [one, *({**row, "split": "train"} for row in more)]
    delivery = deliver(
        first_user=[*({**row, "relevance": 1.0} for row in first), *graded], second_user=[{**other, "relevance": 0.0}]
    )
    assert delivery.reasons == {
        ("raw/first_user.parquet", 0): "contradiction",
        ("raw/second_user.parquet", 0): "contradiction",
    }
    assert "are judged 0.0 and 1.0" in delivery.detail["raw/second_user.parquet", 0]
    assert delivery.report.rejected_by_reason == {"contradiction": 2}
    # Nobody learns that it answers, and nobody that it does not.
    assert delivery.answers[one["query"]] == {passage(5)}
    assert delivery.withheld == {one["query"]: delivery.answers["how so"]}


def test_the_same_words_in_another_order_do_not_contradict(deliver: Callable[..., Delivery]) -> None:
    """They are kept in one split, but "pdf to word" is not "word to pdf"."""
    rows = [
        {"query": "convert pdf to word", "passage": passage(0), "split": "train", "relevance": 1.0},
        {"query": "convert word to pdf", "passage": passage(0), "split": "train", "relevance": 0.0},
        {"query": "convert word to pdf", "passage": passage(1), "split": "train", "relevance": 1.0},
    ]
    delivery = deliver(pairs=[*rows, *({**row, "relevance": 1.0} for row in ALL_SPLITS)])
    assert delivery.reasons == {}
    assert delivery.withheld == {}


def test_spellings_may_differ_in_grade(deliver: Callable[..., Delivery]) -> None:
    rows = [
        {"query": "why so", "passage": passage(0), "split": "train", "relevance": 2.0},
        {"query": "Why so?", "passage": passage(0), "split": "train", "relevance": 1.0},
    ]
    assert deliver(pairs=[*rows, *({**row, "relevance": 1.0} for row in ALL_SPLITS)]).reasons == {}


# --------------------------------------------------------------------------------------- labels inside the text


@pytest.mark.parametrize(
    ("query", "title", "text", "expected"),
    [
        ("What is a frame?", "What is a frame?", passage(0), 1),
        ("What is a frame?", None, f"So: what IS a frame - {passage(0)}", 1),
        ("什么是数据框？", "问：什么是数据框", passage(0), 1),
        ("What is a frame?", "What is a framework", passage(0), 0),
        ("What is a frame?", "A frame: what is it", passage(0), 0),
    ],
    ids=["title", "text", "Chinese", "part of a word", "other order"],
)
def test_questions_that_stand_in_their_own_answer_are_counted(
    deliver: Callable[..., Delivery], query: str, title: str | None, text: str, expected: int
) -> None:
    delivery = deliver(pairs=[{"query": query, "title": title, "passage": text}, *sound(900, 20)])
    assert delivery.report.positives_with_their_query == expected
