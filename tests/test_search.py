"""Exact dense search: a fast product may only propose, float64 decides."""

import itertools
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import retrieval_ray.search as search_module
from retrieval_ray.runs import exact_pairs, merge
from retrieval_ray.search import PRECISIONS, TopK, peak_bytes, search
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


@pytest.fixture
def small(monkeypatch):
    """Tiles of 32 passages, and 100 at hand, so that few passages fill many."""
    monkeypatch.setattr(search_module, "block_sizes", lambda device: (64, 32))
    monkeypatch.setattr(search_module, "_HELD", 100)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [1, 7, 40])
def test_any_tiles_and_blocks_give_the_same_bits(small, precision, k):
    rng = np.random.default_rng(k)
    vectors, queries = _unit(rng, 1000, 24).astype(np.float16), _unit(rng, 9, 24).astype(np.float16)
    ids = [f"p{n:04}" for n in rng.permutation(1000)]
    expected = [_naive(ids, vectors, query, k) for query in queries]
    for cuts in ([0, 1000], [0, 1, 2, 500, 1000], list(range(0, 1001, 40))):
        blocks = [(ids[a:b], vectors[a:b]) for a, b in itertools.pairwise(cuts)]
        found = search(blocks, queries, k, precision=precision)
        assert found == search([(ids, vectors)], queries, k)
        for ranking, row in zip(found, expected, strict=True):
            assert [p for p, _ in ranking] == [p for p, _ in row]
            np.testing.assert_allclose([s for _, s in ranking], [s for _, s in row], rtol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_passages_that_the_product_cannot_tell_apart(small, precision):
    """Every passage is proposed, and most have the same score: ids decide, over many tiles."""
    rng = np.random.default_rng(0)
    vectors = np.tile(_unit(rng, 1, 16), (700, 1)).astype(np.float16)
    vectors[[3, 650]] *= 2
    ids = [f"p{n:03}" for n in rng.permutation(700)]
    for ranking in search([(ids, vectors)], vectors[:2], 6, precision=precision):
        assert {p for p, _ in ranking[:2]} == {ids[3], ids[650]}
        assert [p for p, _ in ranking[2:]] == sorted(set(ids) - {ids[3], ids[650]})[:4]


@given(
    st.sampled_from(list(PRECISIONS)),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.integers(1, 3),
    st.sampled_from([1, 3, 16, 200]),
    st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    st.integers(0, 999),
)
def test_no_error_of_the_product_loses_a_passage(precision, dtype, queries, dimension, spread, seed):
    """Passages around one another, as far apart as the product's own rounding, of lengths that differ."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal(dimension) + spread * rng.standard_normal((90, dimension))
    vectors = (vectors * rng.choice([1, 1.001, 0.01], (90, 1))).astype(dtype)
    queries = rng.standard_normal((queries, dimension)).astype(dtype)
    ids = [f"p{n:02}" for n in range(90)]
    exact = exact_pairs(np.repeat(queries, 90, axis=0), np.tile(vectors, (len(queries), 1)))
    found = search([(ids, vectors)], queries, 5, precision=precision)
    for ranking, scores in zip(found, exact.reshape(-1, 90), strict=True):
        assert ranking == oracles.top_k(list(zip(ids, scores.tolist(), strict=True)), 5)


def test_the_rounding_of_the_product_itself_loses_nothing():
    """The better one's product is 258.99, rounded to 258; the other's 259, rounded to 260."""
    vectors = np.array(
        [[128, 128, 255 / 128, 1 + 2**-8, 2**-12], [128, 128, 255 / 128, 1 + 2**-8 + 2**-13, 0]]
    )
    found = search([(["a", "b"], vectors)], np.ones((1, 5)), 1, precision="bfloat16")
    assert [ranking[0][0] for ranking in found] == ["a"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_few_pairs_are_scored_in_float64(monkeypatch, precision):
    scored = []

    def counted(queries_ND, passages_ND):
        scored.append(len(queries_ND))
        return exact_pairs(queries_ND, passages_ND)

    monkeypatch.setattr(search_module, "exact_pairs", counted)
    rng = np.random.default_rng(0)
    vectors, queries = _unit(rng, 6000, 512).astype(np.float16), _unit(rng, 20, 512).astype(np.float16)
    found = search([([str(n) for n in range(6000)], vectors)], queries, 20, precision=precision)
    assert sum(scored) < 3 * 20 * 20  # three times what is found
    for ranking, query in zip(found, queries, strict=True):
        scores = exact_pairs(query, vectors)
        order = np.argsort(-scores)[:20]
        assert ranking == list(zip(map(str, order), scores[order], strict=True))


class _Live(TorchDispatchMode):
    """The peak of what tensors and NumPy hold together; what one operation uses within itself is not seen."""

    def __init__(self):
        super().__init__()
        self.wrappers: dict[int, int] = {}  # by address of the storage
        self.held = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note()
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                self.held += 0 if self.wrappers.get(address) else size
                self.wrappers[address] = self.wrappers.get(address, 0) + 1
                weakref.finalize(tensor, self._gone, address, size)
        self.note()
        return made

    def _gone(self, address, size):
        self.wrappers[address] -= 1
        self.held -= 0 if self.wrappers[address] else size

    def note(self):
        self.peak = max(self.peak, self.held + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()


def _peak(queries, dimension, tiles, k, precision):
    """Peak bytes over a stream of tiles of 256 passages in blocks of 100."""
    rng = np.random.default_rng(0)
    queries_QD = _unit(rng, queries, dimension).astype(np.float16)
    vectors = _unit(rng, 256 * tiles, dimension).astype(np.float16)
    ids = [str(n) for n in range(len(vectors))]
    tracemalloc.start()
    with _Live() as live:
        best = TopK(queries_QD, k, precision=precision)
        for start in range(0, len(ids), 100):
            best.add(ids[start : start + 100], vectors[start : start + 100])
        best.rankings()
        live.note()
    tracemalloc.stop()
    return live.peak


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("queries", "dimension", "k"), [(64, 32, 50), (64, 256, 5), (256, 16, 150), (8, 384, 10)]
)
def test_memory_is_bounded_by_the_formula_and_does_not_grow_with_the_corpus(
    monkeypatch, precision, queries, dimension, k
):
    monkeypatch.setattr(search_module, "block_sizes", lambda device: (queries, 256))
    monkeypatch.setattr(search_module, "_HELD", 1024)
    with _Live():  # what is imported at the first call
        search([(["a"], np.ones((1, 2)))], np.ones((1, 2)), 1, precision=precision)
    few, many = (_peak(queries, dimension, tiles, k, precision) for tiles in (20, 60))
    results = queries * k * 130  # of ``rankings``: tuples and floats
    held = 2 * dimension * 1024 + 1024 * 16  # views of the caller's vectors; slices of its list of ids
    assert many < peak_bytes(queries, 256, dimension, k) - held + results
    assert many < 1.15 * few
