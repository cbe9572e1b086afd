"""Exact dense search: FAISS may only propose, float64 decides."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.runs import merge
from retrieval_ray.search import TopK, peak_bytes, search
from tests import oracles


def _naive(passage_ids, vectors, query, k):
    """Each pair by itself in float64."""
    rows = [
        (passage, sum(float(a) * float(b) for a, b in zip(vector, query, strict=True)))
        for passage, vector in zip(passage_ids, vectors, strict=True)
    ]
    return oracles.top_k(rows, k)


def _unit(rng, rows, dimension):
    vectors = rng.standard_normal((rows, dimension))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@given(st.integers(1, 120), st.integers(1, 130), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_any_number_of_shards_gives_the_naive_ranking_with_many_exact_ties(
    passages, k, shards, different, seed
):
    rng = np.random.default_rng(seed)
    # quarters: every product and sum is exact, so equal vectors give equal scores everywhere
    vectors = (rng.integers(-2, 3, (different, 4)) / 4)[rng.integers(0, different, passages)]
    queries = rng.integers(-2, 3, (3, 4)) / 4
    ids = [f"p{n}" for n in rng.permutation(passages)]
    cuts = [cut for cut in np.array_split(np.arange(passages), shards) if len(cut)]
    blocks = [([ids[n] for n in cut], vectors[cut]) for cut in cuts]
    found = [search([block], queries, k) for block in blocks]
    running = TopK(queries, k)
    for block in blocks:
        running.add(*block)
    for q, query in enumerate(queries):
        expected = _naive(ids, vectors, query, k)
        assert merge([of_shard[q] for of_shard in found], k) == expected
        assert running.rankings()[q] == expected


@pytest.mark.parametrize("k", [1, 10, 100])
def test_random_vectors_rank_as_in_float64(k):
    rng = np.random.default_rng(k)
    vectors, queries = _unit(rng, 300, 48), _unit(rng, 5, 48)
    ids = [f"p{n}" for n in range(300)]
    for ranking, query in zip(search([(ids, vectors)], queries, k), queries, strict=True):
        expected = _naive(ids, vectors, query, k)
        assert [p for p, _ in ranking] == [p for p, _ in expected]
        np.testing.assert_allclose([s for _, s in ranking], [s for _, s in expected], atol=1e-14)


def test_differences_below_float32_still_decide_the_order():
    """400 passages that float32 cannot tell apart: the search has to widen until it has them all."""
    rng = np.random.default_rng(0)
    vectors = np.tile(_unit(rng, 1, 16), (400, 1)) + 1e-10 * rng.standard_normal((400, 16))
    queries = _unit(rng, 2, 16)
    ids = [f"p{n}" for n in range(400)]
    for ranking, query in zip(search([(ids, vectors)], queries, 5), queries, strict=True):
        expected = [ids[n] for n in np.argsort(-(vectors @ query))[:5]]
        assert [passage for passage, _ in ranking] == expected


def test_shards_agree_to_the_last_bit_on_half_precision_vectors():
    rng = np.random.default_rng(1)
    vectors = _unit(rng, 200, 384).astype(np.float16)
    vectors[50:100] = vectors[:50]  # exact duplicates, in other shards
    queries = _unit(rng, 4, 384).astype(np.float16)
    ids = [f"p{n:03}" for n in rng.permutation(200)]
    whole = search([(ids, vectors)], queries, 60)
    for count in (2, 7, 200):
        found = [
            search([([ids[n] for n in cut], vectors[cut])], queries, 60)
            for cut in np.array_split(np.arange(200), count)
        ]
        for q in range(4):
            assert merge([of_shard[q] for of_shard in found], 60) == whole[q]


def test_k_larger_than_the_shard_returns_each_passage_once():
    vectors = np.eye(3, dtype=np.float32)
    (ranking,) = search([(["c", "b", "a"], vectors)], vectors[:1], 50)
    assert ranking == [("c", 1.0), ("a", 0.0), ("b", 0.0)]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_has_no_score_is_left_out(k, broken):
    """NaN counts as the highest in a top k, and would push out a passage."""
    vectors = np.array([[1, 0], [broken, 0], [0, 1], [0.5, 0]], dtype=np.float32)
    (ranking,) = search([(["a", "broken", "b", "c"], vectors)], vectors[:1], k)
    assert ranking == [("a", 1.0), ("c", 0.5), ("b", 0.0)][:k]


def test_no_queries_and_no_passages():
    one = (["a"], np.ones((1, 2), np.float32))
    assert search([one], np.zeros((0, 2), np.float32), 3) == []
    assert search([], np.ones((2, 2), np.float32), 3) == [[], []]
    assert search([([], np.zeros((0, 2), np.float32)), one], one[1], 3) == [[("a", 2.0)]]


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(1, 9))
def test_joined_blocks_hold_the_same_rows_in_order(sizes, rows):
    total = sum(sizes)
    vectors = np.arange(total, dtype=np.float32)[:, None]
    cuts = np.split(np.arange(total), np.cumsum(sizes)[:-1]) if sizes else []
    blocks = list(joined([([f"p{n}" for n in cut], vectors[cut]) for cut in cuts], rows))
    assert [len(ids) for ids, _ in blocks] == [rows] * (total // rows) + [total % rows] * (total % rows > 0)
    assert [key for ids, _ in blocks for key in ids] == [f"p{n}" for n in range(total)]
    for ids, block in blocks:
        assert [f"p{int(value)}" for value in block[:, 0]] == list(ids)


def _traced_peak(queries, dimension, rows, blocks, k):
    """Peak bytes of NumPy and of the tensors that were alive, over a stream of passages."""
    rng = np.random.default_rng(0)
    queries_QD = _unit(rng, queries, dimension).astype(np.float16)
    vectors = _unit(rng, rows, dimension).astype(np.float16)
    tracemalloc.start()
    best = TopK(queries_QD, k)
    for number in range(blocks):
        ids = [f"p{number}-{n}" for n in range(rows)]
        best.add(ids, np.roll(vectors, number, axis=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_bounded_by_the_formula_and_does_not_grow_with_the_corpus():
    """Tensors are not traced, so their part (blocks, scores, mask) is taken off the formula."""
    queries, dimension, rows, k = 64, 32, 2048, 50
    tensors = 4 * dimension * (queries + rows) + 9 * queries * rows  # both blocks, scores, mask
    ids = 2 * rows * 80  # of this block and the one before
    limit = peak_bytes(queries, rows, dimension, k) - tensors + ids + 2 * rows * dimension
    few, many = (_traced_peak(queries, dimension, rows, blocks, k) for blocks in (3, 12))
    assert few < limit and many < limit
    assert many < 1.1 * few
