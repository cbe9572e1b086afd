"""Exact dense search: FAISS may only propose, float64 decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.runs import merge
from retrieval_ray.search import Shard
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
    found = [Shard([ids[n] for n in cut], vectors[cut]).search(queries, k) for cut in cuts]
    for q, query in enumerate(queries):
        assert merge([of_shard[q] for of_shard in found], k) == _naive(ids, vectors, query, k)


@pytest.mark.parametrize("k", [1, 10, 100])
def test_random_vectors_rank_as_in_float64(k):
    rng = np.random.default_rng(k)
    vectors, queries = _unit(rng, 300, 48), _unit(rng, 5, 48)
    ids = [f"p{n}" for n in range(300)]
    for ranking, query in zip(Shard(ids, vectors).search(queries, k), queries, strict=True):
        expected = _naive(ids, vectors, query, k)
        assert [p for p, _ in ranking] == [p for p, _ in expected]
        np.testing.assert_allclose([s for _, s in ranking], [s for _, s in expected], atol=1e-14)


def test_differences_below_float32_still_decide_the_order():
    """400 passages that float32 cannot tell apart: the search has to widen until it has them all."""
    rng = np.random.default_rng(0)
    vectors = np.tile(_unit(rng, 1, 16), (400, 1)) + 1e-10 * rng.standard_normal((400, 16))
    queries = _unit(rng, 2, 16)
    ids = [f"p{n}" for n in range(400)]
    for ranking, query in zip(Shard(ids, vectors).search(queries, 5), queries, strict=True):
        expected = [ids[n] for n in np.argsort(-(vectors @ query))[:5]]
        assert [passage for passage, _ in ranking] == expected


def test_shards_agree_to_the_last_bit_on_half_precision_vectors():
    rng = np.random.default_rng(1)
    vectors = _unit(rng, 200, 384).astype(np.float16)
    vectors[50:100] = vectors[:50]  # exact duplicates, in other shards
    queries = _unit(rng, 4, 384).astype(np.float16)
    ids = [f"p{n:03}" for n in rng.permutation(200)]
    whole = Shard(ids, vectors).search(queries, 60)
    for count in (2, 7, 200):
        found = [
            Shard([ids[n] for n in cut], vectors[cut]).search(queries, 60)
            for cut in np.array_split(np.arange(200), count)
        ]
        for q in range(4):
            assert merge([of_shard[q] for of_shard in found], 60) == whole[q]


def test_k_larger_than_the_shard_returns_each_passage_once():
    vectors = np.eye(3, dtype=np.float32)
    (ranking,) = Shard(["c", "b", "a"], vectors).search(vectors[:1], 50)
    assert ranking == [("c", 1.0), ("a", 0.0), ("b", 0.0)]


def test_what_faiss_cannot_place_is_left_out():
    """It returns -1 for a vector of NaN; as a position that would be the last passage, again."""
    vectors = np.array([[1, 0], [np.nan, 0], [0, 1]], dtype=np.float32)
    (ranking,) = Shard(["a", "broken", "b"], vectors).search(vectors[:1], 3)
    assert ranking == [("a", 1.0), ("b", 0.0)]


def test_no_queries_and_no_passages():
    assert Shard(["a"], np.ones((1, 2), np.float32)).search(np.zeros((0, 2), np.float32), 3) == []
    empty = Shard([], np.zeros((0, 2), np.float32))
    assert empty.search(np.ones((2, 2), np.float32), 3) == [[], []]
