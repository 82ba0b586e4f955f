"""Each reason a row can be dropped for, and what is kept of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from embed_pipeline.cleaning.reasons import REASONS
from embed_pipeline.errors import CleaningError

Row = dict[str, Any]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [f"{letter}{letter}{after}o" for letter, after in zip(LETTERS, LETTERS[1:] + "a", strict=True)]


def text(number: int, words: int = 12) -> str:
    """Texts that share no long run and are nowhere near each other."""
    return " ".join(f"{WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)]}{number}x{i}" for i in range(words))


def sound(count: int = 30, start: int = 0) -> list[Row]:
    """Pairs that nothing is wrong with: enough to fill three splits."""
    return [{"query": f"question {n} about {WORDS[n % 26]}", "passage": text(n)} for n in range(start, start + count)]


P, LONG = text(100), "word " * 60
BAD_ROWS: dict[str, tuple[list[Row], dict[int, str]]] = {
    "null query": ([{"query": None, "passage": P}], {0: "null_or_empty_query"}),
    "blank query": ([{"query": " \u3000\t\n", "passage": P}], {0: "null_or_empty_query"}),
    "invisible query": ([{"query": "\u200b\ufeff\u00ad\x00", "passage": P}], {0: "null_or_empty_query"}),
    "short query": ([{"query": "?", "passage": P}], {0: "query_too_short"}),
    "long query": ([{"query": "why " * 20, "passage": P}], {0: "query_too_long"}),
    "null passage": ([{"query": "why so", "passage": None}], {0: "null_or_empty_passage"}),
    "null negative": ([{"query": "why so", "passage": P, "negative": None}], {0: "null_or_empty_passage"}),
    "short passage": ([{"query": "why so", "passage": "."}], {0: "passage_too_short"}),
    "long negative": ([{"query": "why so", "passage": P, "negative": LONG}], {0: "passage_too_long"}),
    "query is the passage": ([{"query": "Same Text", "passage": "same  text\n"}], {0: "query_equals_passage"}),
    "NaN relevance": ([{"query": "why so", "passage": P, "relevance": float("nan")}], {0: "invalid_relevance"}),
    "infinite": ([{"query": "why so", "passage": P, "relevance": float("inf")}], {0: "invalid_relevance"}),
    "duplicate": (
        [{"query": "why so", "passage": P}, {"query": "why  so", "passage": f" {P}"}],
        {1: "duplicate"},
    ),
    "duplicate in Chinese": (
        [{"query": "为什么天空是蓝色的?", "passage": "因为瑞利散射。"}] * 2,
        {1: "duplicate"},
    ),
    "composed and decomposed": (
        [{"query": "caf\u00e9 where", "passage": P}, {"query": "cafe\u0301 where", "passage": P}],
        {1: "duplicate"},
    ),
    "grades differ": (
        [{"query": "why so", "passage": P, "relevance": 1.0}, {"query": "why so", "passage": P, "relevance": 2.0}],
        {0: "contradiction", 1: "contradiction"},
    ),
    "positive here, negative there": (
        [
            {"query": "why so", "passage": P, "negative": text(101)},
            {"query": "why so", "passage": text(102), "negative": P},
        ],
        {0: "contradiction", 1: "contradiction"},
    ),
    "positive is the negative": ([{"query": "why so", "passage": P, "negative": P}], {0: "contradiction"}),
    "only a negative judgement": (
        [{"query": "why so", "passage": P, "relevance": -1.0}],
        {0: "query_without_positive"},
    ),
    "one id, two queries": (
        [{"query": "why so", "passage": P, "query_id": "x"}, {"query": "how so", "passage": P, "query_id": "x"}],
        {1: "duplicate_id"},
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(cleaned: Callable[..., Any], case: str) -> None:
    rows, expected = BAD_ROWS[case]
    # Relevance is all or nothing in a file, so the sound rows come from another one.
    others = [{**row, "source": "b.parquet", "row_number": 1_000 + n} for n, row in enumerate(sound())]
    result = cleaned([*rows, *others], query_max_characters=60, passage_max_characters=250)
    assert result.reasons == expected
    assert result.violations == []
    assert result.report.raw_rows == result.report.kept_rows + len(expected)
    assert set(expected.values()) <= set(REASONS)


def beir(corpus: dict[str, Any], queries: dict[str, Any], qrels: list[tuple[Any, ...]]) -> list[Row]:
    """Raw rows as BEIR files give them; qrels are (query_id, passage_id, score[, split])."""
    rows: list[Row] = [{"kind": "passage", "passage_id": i, "passage": t, "source": "c"} for i, t in corpus.items()]
    rows += [{"kind": "query", "query_id": i, "query": t, "source": "q"} for i, t in queries.items()]
    for query_id, passage_id, score, *split in qrels:
        judged = {
            "query_id": query_id,
            "passage_id": passage_id,
            "relevance": score,
            "split": split[0] if split else None,
        }
        rows.append({"kind": "judgement", "source": "j", **judged})
    return rows


def sound_beir(count: int = 20) -> list[Row]:
    corpus = {f"c{n}": text(n) for n in range(count)}
    queries = {f"k{n}": f"question {n} about {WORDS[n % 26]}" for n in range(count)}
    return beir(corpus, queries, [(f"k{n}", f"c{n}", 1.0) for n in range(count)])


BAD_BEIR: dict[str, tuple[list[Row], dict[int, str]]] = {
    "id is null": (beir({None: P}, {None: "why so"}, [(None, "c1", 1.0)]), dict.fromkeys(range(3), "missing_id")),
    "unknown ids": (
        beir({}, {}, [("nobody", "c1", 1.0), ("k1", "nothing", 1.0)]),
        {0: "unknown_query", 1: "unknown_passage"},
    ),
    "judgement of a dropped passage": (
        beir({"x": ""}, {}, [("k1", "x", 1.0)]),
        {0: "null_or_empty_passage", 1: "unknown_passage"},
    ),
    "score is null": (beir({}, {}, [("k1", "c2", None)]), {0: "invalid_relevance"}),
    "query nobody answers": (beir({}, {"x": "why so"}, []), {0: "query_without_positive"}),
    "query judged not answered": (
        beir({}, {"x": "why so"}, [("x", "c1", 0.0)]),
        {0: "query_without_positive", 1: "query_without_positive"},
    ),
    "same text under two ids": (
        beir({"y": P, "x": P}, {"w": "why so", "v": "why so"}, [("w", "y", 1.0), ("v", "x", 1.0)]),
        {0: "duplicate_passage", 2: "duplicate_query", 5: "duplicate"},
    ),
    "near-duplicate under another id": (
        beir({"x": f"{P} end", "y": P}, {"w": "why so"}, [("w", "y", 1.0)]),
        {1: "near_duplicate_passage"},
    ),
    "one id for two passages": (
        [*beir({"x": P}, {}, []), *beir({"x": text(101)}, {}, [])],
        {1: "duplicate_id"},
    ),
}


@pytest.mark.parametrize("case", BAD_BEIR)
def test_bad_beir_rows(cleaned: Callable[..., Any], case: str) -> None:
    rows, expected = BAD_BEIR[case]
    result = cleaned([*rows, *sound_beir()], max_missing_answers=0.1)
    assert result.reasons == expected
    assert result.violations == []


def test_judgements_follow_merged_passages(cleaned: Callable[..., Any]) -> None:
    rows = beir({"x": f"{P} end", "y": P}, {"w": "why so"}, [("w", "y", 2.0)])
    result = cleaned([*rows, *sound_beir()])
    assert {"query_id": "w", "passage_id": "x", "relevance": 2.0, "teacher_score": None} in result.qrels
    assert [(row["passage_id"], row["merged_into"], row["passage"]) for row in result.merged] == [("y", "x", P)]
    kept = cleaned([*rows, *sound_beir()], near_duplicates={"action": "keep"})
    assert {"query_id": "w", "passage_id": "y", "relevance": 2.0, "teacher_score": None} in kept.qrels
    assert kept.merged == []
    assert len({row["cluster_id"] for row in kept.passages if row["passage_id"] in "xy"}) == 1


def test_chinese_near_duplicates_merge(cleaned: Callable[..., Any]) -> None:
    clauses = [
        "数据库连接失败时请先检查网络设置是否正确",
        "然后确认用户名和密码没有过期",
        "最后重新启动服务并查看日志文件中的错误信息以便进一步排查问题所在",
    ]
    rows = [
        {"query": "连接失败怎么办", "passage": "\uff0c".join(clauses)},
        {"query": "无法连接数据库", "passage": " ".join(clauses)},
    ]
    result = cleaned([*rows, *sound()])
    assert result.report.near_duplicate_clusters == 1
    assert result.split_of["连接失败怎么办"] == result.split_of["无法连接数据库"]
    assert result.violations == []


def test_triplets_judge_their_negative(cleaned: Callable[..., Any]) -> None:
    rows = [{**row, "negative": text(200 + n)} for n, row in enumerate(sound(20))]
    result = cleaned(rows)
    assert result.report.kept_rows == 20
    assert sorted(row["relevance"] for row in result.qrels) == [0.0] * 20 + [1.0] * 20


def test_texts_are_normalised(cleaned: Callable[..., Any]) -> None:
    row = {
        "query": " What\u00a0 is\n\u200bthis ? ",
        "passage": f"first\tline \r\n\r\n {P}\u2028",
        "title": " A  title ",
    }
    result = cleaned([row, *sound()])
    passage = next(p for p in result.passages if p["title"])
    assert (passage["title"], passage["text"]) == ("A title", f"first line\n{P}")
    assert "What is this ?" in result.split_of
    joined = "क्\u200dष अक्षर क्या है"  # the joiner is spelling in Devanagari, and stays
    assert joined in cleaned([{"query": joined, "passage": P}, *sound()]).split_of


def test_delivered_ids_stand_and_others_do_not_depend_on_order(cleaned: Callable[..., Any]) -> None:
    rows = [{**row, "query_id": f"mine-{n}"} for n, row in enumerate(sound(3))] + sound(20, start=3)
    result, turned = cleaned(rows), cleaned(rows[::-1])
    assert {"mine-0", "mine-1", "mine-2"} <= {row["query_id"] for row in result.queries}
    assert result.queries == turned.queries
    assert result.passages == turned.passages


def test_same_rows_and_seed_give_the_same_bytes(cleaned: Callable[..., Any]) -> None:
    rows = [*sound(40), *sound(10), {"query": None, "passage": "x"}]
    first = cleaned(rows)
    assert cleaned(rows).files == first.files
    assert cleaned(rows, seed=7).split_of != first.split_of


def test_an_extra_corpus_stays(cleaned: Callable[..., Any]) -> None:
    extra = [{"kind": "passage", "passage": text(300 + n), "source": "more.parquet"} for n in range(3)]
    result = cleaned([*sound(), *extra, {**extra[0], "row_number": 99}])
    assert len(result.passages) == 33
    assert result.reasons == {99: "duplicate_passage"}


def test_nothing_left_is_explained(cleaned: Callable[..., Any]) -> None:
    with pytest.raises(CleaningError, match=r"no query is left in train after cleaning 2 rows.*2 null_or_empty_query"):
        cleaned([{"query": None, "passage": "p"}] * 2)


def test_one_giant_group_is_explained(cleaned: Callable[..., Any]) -> None:
    rows = [{**row, "document_id": "manual.pdf"} for row in sound()]
    with pytest.raises(CleaningError, match=r"30 queries form 1 group.*document 'manual\.pdf' \(30 queries\)"):
        cleaned(rows)


def test_delivered_splits_without_train_are_explained(cleaned: Callable[..., Any]) -> None:
    with pytest.raises(CleaningError, match="no query is left in train"):
        cleaned([{**row, "split": "test"} for row in sound()])
