"""Keyword search in languages with and without spaces."""

from __future__ import annotations

import numpy as np

from embed_pipeline.evaluation.bm25 import bm25_search, tokens


def test_words_of_any_script() -> None:
    assert tokens("How do I read_csv() Naïve \uff21\uff22\uff23?") == ["how", "do", "i", "read", "csv", "naïve", "abc"]
    assert tokens("Straße STRASSE") == ["strasse", "strasse"]
    # Vowel signs are part of the word.
    assert tokens("हिन्दी में खोज") == ["हिन्दी", "में", "खोज"]
    assert tokens("한국어 검색") == ["한국어", "검색"]
    assert tokens("... !?") == []


def test_scripts_without_spaces() -> None:
    assert tokens("机器学习") == ["机", "器", "学", "习", "机器", "器学", "学习"]
    assert tokens("用PyTorch训练") == ["用", "pytorch", "训", "练", "训练"]
    assert tokens("カー") == ["カ", "ー", "カー"]
    assert "ภา" in tokens("ภาษาไทย")


def test_finds_chinese() -> None:
    passages = ["今天天气很好", "机器学习需要大量数据", "学校里的机器坏了", "深度学习和神经网络", "我们去吃饭吧"]
    indices, scores = bm25_search(["什么是机器学习"], passages, 3, progress=False)
    assert indices[0, 0] == 1
    assert set(indices[0, 1:].tolist()) == {2, 3}
    assert (np.diff(scores[0]) <= 0).all()


def test_finds_only_what_shares_a_term() -> None:
    passages = ["a red apple", "a green pear", "nothing", "red red wine"]
    indices, scores = bm25_search(["red", "unheard of", ""], passages, 10, progress=False)
    assert set(indices[0, :2].tolist()) == {0, 3}
    assert (indices[0, 2:] == -1).all()
    assert (indices[1:] == -1).all()
    assert (scores[1:] == 0).all()


def test_ties_keep_the_order_of_the_passages() -> None:
    passages = ["other words"] * 3 + ["same text here"] * 20
    indices, _ = bm25_search(["same"], passages, 5, progress=False)
    assert indices[0].tolist() == [3, 4, 5, 6, 7]


def test_a_corpus_without_a_term() -> None:
    indices, _ = bm25_search(["x"], ["...", "!!"], 2, progress=False)
    assert (indices == -1).all()
