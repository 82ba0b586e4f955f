"""Exact search against sorting everything."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_pipeline.errors import ModelError
from embed_pipeline.models.search import merge_shares, pair_scores, read_shares, search, search_share


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def sorted_out(queries: np.ndarray, passages: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(float)[:, None] * passages.astype(float)[None]).sum(2).astype(np.float32)
    indices = np.lexsort((np.broadcast_to(np.arange(len(passages)), scores.shape), -scores), axis=1)[:, :k]
    return indices, np.take_along_axis(scores, indices, axis=1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    distinct=st.integers(1, 200),
    passages=st.integers(1, 200),
    k=st.integers(1, 60),
    steps=st.tuples(st.integers(1, 30), st.integers(1, 210)),
)
def test_equals_sorting_everything(seed: int, distinct: int, passages: int, k: int, steps: tuple[int, int]) -> None:
    """With many equal scores, whatever the block sizes."""
    draw = np.random.default_rng(seed)
    corpus = unit(draw.normal(size=(distinct, 24)))[draw.integers(0, distinct, passages)]
    queries = unit(draw.normal(size=(17, 24)))
    indices, scores = search(queries, corpus, k, queries_per_step=steps[0], passages_per_step=steps[1], device="cpu")
    expected_indices, expected_scores = sorted_out(queries, corpus, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(scores, expected_scores)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    distinct=st.integers(1, 120),
    passages=st.integers(1, 200),
    k=st.integers(1, 60),
    shares=st.integers(1, 9),
)
def test_shares_give_what_the_whole_gives(seed: int, distinct: int, passages: int, k: int, shares: int) -> None:
    """With equal scores at the k-th place on both sides of a cut, and shares with fewer passages than k, or none."""
    draw = np.random.default_rng(seed)
    corpus = unit(draw.normal(size=(distinct, 24)))[draw.integers(0, distinct, passages)]
    queries = unit(draw.normal(size=(7, 24)))
    with TemporaryDirectory() as folder:
        for share in range(shares):
            search_share(queries, corpus, k, Path(folder), share, shares, device="cpu")
        merged = merge_shares(read_shares(Path(folder)), k)
    for result, expected in zip(merged, search(queries, corpus, k), strict=True):
        np.testing.assert_array_equal(result, expected)
        assert result.dtype == expected.dtype


def test_rounding_does_not_order_equal_passages() -> None:
    """5,000 copies of one passage among others: float32 products of copies differ in their last bits."""
    draw = np.random.default_rng(0)
    corpus = unit(draw.normal(size=(8_000, 384)))
    corpus[1_000:6_000] = corpus[1_000]
    queries = np.concatenate([corpus[1_000:1_001], unit(draw.normal(size=(3, 384)))])
    indices, scores = search(queries, corpus, 100)
    np.testing.assert_array_equal(indices[0], np.arange(1_000, 1_100))
    cuts = [0, 1_050, 5_000, 8_000]  # through the copies
    shares = [search(queries, corpus[a:b], 100, first_passage=a) for a, b in pairwise(cuts)]
    merged_indices, merged_scores = merge_shares(shares, 100)
    np.testing.assert_array_equal(merged_indices, indices)
    np.testing.assert_array_equal(merged_scores, scores)


def test_scores_are_those_of_the_pairs() -> None:
    draw = np.random.default_rng(1)
    queries, corpus = unit(draw.normal(size=(40, 64))), unit(draw.normal(size=(300, 64)))
    indices, scores = search(queries, corpus, 10)
    pairs = pair_scores(queries, corpus, np.repeat(np.arange(40), 10), indices.reshape(-1))
    np.testing.assert_array_equal(scores.reshape(-1), pairs)


def test_not_finite_is_an_error() -> None:
    corpus = unit(np.random.default_rng(0).normal(size=(5, 8)))
    broken = corpus.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ModelError, match=r"1 of 5 embeddings of passages are not finite numbers \(first: row 3\)"):
        search(corpus, broken, 2)
    with pytest.raises(ModelError, match="embeddings of queries"):
        search(broken, corpus, 2)


def test_products_are_whole_whatever_the_process_allows_for_its_model() -> None:
    """2,000 passages whose scores differ in the fourth digit: bfloat16 and TF32 round by more."""
    draw = np.random.default_rng(3)
    corpus = unit(draw.normal(size=(1, 64)) + draw.normal(size=(2_000, 64)) / 1_000)
    queries = unit(draw.normal(size=(5, 64)))
    torch.set_float32_matmul_precision("medium")
    allowed = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        indices, scores = search(queries, corpus, 10, device="cpu")
        assert allowed == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected_indices, expected_scores = sorted_out(queries, corpus, 10)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(scores, expected_scores)


def test_a_search_leaves_torchs_settings_as_they_are() -> None:
    matrix = unit(np.random.default_rng(0).normal(size=(3, 8)))
    before = torch.backends.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "none"  # another test may have asked for something
    try:
        for allowed in ("tf32", "ieee"):
            torch.backends.fp32_precision = allowed
            search(matrix, matrix, 2, device="cpu")
            assert torch.backends.cuda.matmul.fp32_precision == allowed
    finally:
        torch.backends.fp32_precision = before


def test_queries_in_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    queries, corpus = unit(draw.normal(size=(50, 24))), unit(draw.normal(size=(300, 24)))
    corpus[100:200] = corpus[7]  # more equal ones than candidates are kept
    queries[13] = corpus[7]
    whole = search(queries, corpus, 10, queries_per_step=8)
    monkeypatch.setattr("embed_pipeline.models.search._CANDIDATES_PER_GROUP", 500)
    for found, expected in zip(search(queries, corpus, 10, queries_per_step=8), whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert whole[0][13].tolist() == [7, *range(100, 109)]
