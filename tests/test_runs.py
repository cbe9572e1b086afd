"""Rankings: any cut into shards gives the ranking of the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.runs import exact_dot, fuse, merge, top_k, without_ids
from tests import oracles

PASSAGES = st.text("ab01", min_size=1, max_size=3)
# few different scores, so that most examples have ties
SHARDED = st.dictionaries(PASSAGES, st.tuples(st.integers(-2, 2).map(float), st.integers(0, 4)), max_size=20)


@given(SHARDED, st.integers(1, 25))
def test_merging_any_split_gives_the_top_k_of_the_whole(rows, k):
    shards = [
        top_k([p for p, (_, s) in rows.items() if s == n], [x for x, s in rows.values() if s == n], k)
        for n in range(5)
    ]
    whole = oracles.top_k([(passage, score) for passage, (score, _) in rows.items()], k)
    assert merge(shards, k) == whole


@given(SHARDED, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(rows, random):
    pairs = [(passage, score) for passage, (score, _) in rows.items()]
    shuffled = random.sample(pairs, len(pairs))
    assert merge([pairs], 7) == merge([shuffled], 7) == merge([[pair] for pair in shuffled], 7)


def test_ties_go_to_the_smaller_passage_id():
    assert top_k(["p2", "p10", "p1"], [1.0, 1.0, 1.0], 2) == [("p1", 1.0), ("p10", 1.0)]


def test_reciprocal_rank_fusion_by_hand():
    first = [("a", 9.0), ("b", 8.0), ("c", 7.0)]
    second = [("c", 0.3), ("a", 0.2), ("d", 0.1)]
    assert fuse([first, second], 10) == [
        ("a", pytest.approx(1 / (60 + 1) + 1 / (60 + 2), abs=1e-15)),
        ("c", pytest.approx(1 / (60 + 3) + 1 / (60 + 1), abs=1e-15)),
        ("b", pytest.approx(1 / (60 + 2), abs=1e-15)),
        ("d", pytest.approx(1 / (60 + 3), abs=1e-15)),
    ]
    assert [p for p, _ in fuse([first, second], 2, rrf_k=1)] == ["a", "c"]
    assert dict(fuse([first], 1, rrf_k=0)) == {"a": 1 / 1}


def test_fusing_one_ranking_keeps_its_order():
    ranking = [("z", 3.0), ("a", 2.0), ("m", 1.0)]
    assert [p for p, _ in fuse([ranking], 3)] == ["z", "a", "m"]


def test_fused_ties_go_to_the_smaller_passage_id_whatever_the_order_of_the_retrievers():
    """Ranks (1, 2, 7), (2, 7, 1) and (7, 1, 2) are worth the same, also in floating point."""
    places = {"c": (1, 2, 7), "b": (2, 7, 1), "a": (7, 1, 2)}
    rankings = []
    for retriever in range(3):
        ids = [f"z{retriever}{rank}" for rank in range(1, 8)]
        for passage, ranks in places.items():
            ids[ranks[retriever] - 1] = passage
        rankings.append([(passage, -float(rank)) for rank, passage in enumerate(ids)])
    assert [passage for passage, _ in fuse(rankings, 3)] == ["a", "b", "c"]


def test_without_ids_closes_up():
    ranking = [("a", 3.0), ("b", 2.0), ("c", 1.0)]
    assert without_ids(ranking, {"b"}) == [("a", 3.0), ("c", 1.0)]
    assert without_ids(ranking, {"x": 1}) == ranking


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_exact_dot_is_the_same_number_in_any_batch(dtype, order):
    rng = np.random.default_rng(0)
    query = rng.standard_normal(384).astype(dtype)
    passages = np.asarray(rng.standard_normal((60, 384)), dtype=dtype, order=order)
    together = exact_dot(query, passages)
    assert together.dtype == np.float64
    for size in (1, 2, 7, 33):
        cut = [exact_dot(query, passages[i : i + size]) for i in range(0, 60, size)]
        assert np.array_equal(np.concatenate(cut), together), size
    np.testing.assert_allclose(together, passages.astype(np.float64) @ query.astype(np.float64))
