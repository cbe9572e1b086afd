"""Measures of movement and geometry, against plain loops, scipy, and cases worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from retrieval_ray.drift import (
    HEAD,
    Sample,
    alignment,
    compare,
    cosines,
    hubness,
    linear_cka,
    occurrences,
    skewness,
    uniformity,
)

SEED = st.integers(0, 2**32 - 1)


def _unit(rng, rows, width):
    vectors = rng.normal(size=(rows, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def _naive_hsic(one, other):
    """Mean over all ordered fours of different texts: HSIC as a U-statistic (Song et al. 2012, theorem 2)."""
    k = [[float(a @ b) for b in one] for a in one]
    m = [[float(a @ b) for b in other] for a in other]
    fours = list(itertools.permutations(range(len(one)), 4))
    return sum(k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q]) for i, j, q, r in fours) / len(fours)


@given(SEED, st.integers(4, 7))
def test_cka_is_the_u_statistic_over_all_fours(seed, rows):
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))
    own = _naive_hsic(one, one) * _naive_hsic(other, other)
    assert linear_cka(one, other) == pytest.approx(_naive_hsic(one, other) / math.sqrt(own), abs=1e-6)


@given(SEED, st.floats(0.01, 100), st.integers(5, 30))
def test_cka_of_a_rotated_scaled_and_shifted_copy_is_one(seed, scale, rows):
    rng = np.random.default_rng(seed)
    vectors = _unit(rng, rows, 4)
    copy = scale * (vectors @ _rotation(rng, 4)) + scale * rng.normal(size=4)
    assert linear_cka(vectors, copy) == pytest.approx(1.0)


@given(SEED)
def test_cka_has_no_sides_and_at_most_one(seed):
    rng = np.random.default_rng(seed)
    one, other = _unit(rng, 12, 4), _unit(rng, 12, 6)
    found = linear_cka(one, other)
    assert found == pytest.approx(linear_cka(other, one)) and found <= 1 + 1e-9


def test_cka_of_unrelated_vectors_is_about_zero_where_there_are_more_dimensions_than_texts():
    """Where the biased estimate is over a half."""
    rng = np.random.default_rng(0)
    one, other = _unit(rng, 200, 384), _unit(rng, 200, 384)
    assert abs(linear_cka(one, other)) < 0.05
    k, m = (x - x.mean(0) for x in (one, other))
    biased = np.linalg.norm(k.T @ m) ** 2 / (np.linalg.norm(k.T @ k) * np.linalg.norm(m.T @ m))
    assert biased > 0.5


def test_cka_is_undefined_of_few_texts_and_of_one_point():
    rng = np.random.default_rng(0)
    vectors, point = _unit(rng, 8, 4), np.tile(_unit(rng, 1, 4), (8, 1))
    assert linear_cka(vectors[:3], vectors[:3]) is None
    assert linear_cka(vectors, point) is None and linear_cka(point, vectors) is None


@given(SEED)
def test_cosines_are_of_row_and_row(seed):
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(2, 5, 3))
    expected = [a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)) for a, b in zip(one, other, strict=True)]
    assert cosines(one, other) == pytest.approx(expected)
    assert cosines(one, one) == pytest.approx(1.0) and cosines(one, -one) == pytest.approx(-1.0)


@given(SEED, st.integers(2, 8))
def test_uniformity_is_the_log_of_the_mean_over_pairs(seed, rows):
    vectors = _unit(np.random.default_rng(seed), rows, 3)
    pairs = [math.exp(-2 * sum((a - b) ** 2)) for a, b in itertools.combinations(vectors, 2)]
    found = uniformity(vectors)
    assert found == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert -8 <= found <= 1e-12  # the furthest pair is 2 apart


def test_uniformity_and_alignment_by_hand():
    east, north, west = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert uniformity(np.array([east, west])) == pytest.approx(-8)
    assert uniformity(np.array([east, north])) == pytest.approx(-4)
    assert uniformity(np.array([east, east])) == 0 and uniformity(east[None]) is None
    assert alignment(np.array([east, east]), np.array([west, east])) == pytest.approx(2)  # of 4 and 0


@given(SEED)
def test_a_rotation_changes_no_geometry(seed):
    rng = np.random.default_rng(seed)
    base = Sample(_unit(rng, 6, 4), _unit(rng, 30, 4))
    turn = _rotation(rng, 4)
    trained = Sample(base.queries_QD @ turn, base.passages_PD @ turn)
    found = compare(base, trained, np.arange(6))
    assert found["trained"] == pytest.approx(found["base"])
    assert found["cka"] == pytest.approx({"passages": 1.0, "queries": 1.0})


@given(SEED, st.integers(1, 12))
def test_occurrences_count_the_passages_of_every_querys_first_k(seed, k):
    rng = np.random.default_rng(seed)
    queries, passages = rng.integers(-2, 3, size=(7, 2)), rng.integers(-2, 3, size=(9, 2))  # with ties
    expected = [0] * 9
    for query in queries:
        for place in sorted(range(9), key=lambda p: (-int(query @ passages[p]), p))[:k]:
            expected[place] += 1
    assert occurrences(queries, passages, k).tolist() == expected


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30))
def test_skewness_is_scipys(values):
    found = skewness(np.array(values))
    assert (found is None) if len(set(values)) == 1 else found == pytest.approx(stats.skew(values), abs=1e-9)


def test_a_hub_is_seen():
    """All queries alike: the same few passages stand in every list, the others in none."""
    rng = np.random.default_rng(0)
    passages, queries = _unit(rng, 500, 16), _unit(rng, 200, 16)
    one_place = np.tile(queries[:1], (200, 1))
    share = HEAD / 500
    assert hubness(one_place, passages) == pytest.approx((1 - 2 * share) / math.sqrt(share * (1 - share)))
    assert hubness(queries, passages) < hubness(one_place, passages)
    assert hubness(queries, np.tile(passages[:1], (500, 1))) is None


def test_a_layer_is_compared_by_role_and_its_positives():
    rng = np.random.default_rng(0)
    base = Sample(_unit(rng, 5, 3), _unit(rng, 20, 3))
    trained = Sample(base.passages_PD[10:15], base.passages_PD)  # every query moved onto its passage
    found = compare(base, trained, np.arange(10, 15))
    assert found["cosine"]["passages"] == pytest.approx(1) == found["cka"]["passages"]
    expected = cosines(base.queries_QD, trained.queries_QD).mean()
    assert found["cosine"]["queries"] == pytest.approx(expected)
    assert found["trained"]["alignment"] == 0 < found["base"]["alignment"]
    assert found["trained"]["uniformity_passages"] == uniformity(base.passages_PD)
    assert found["trained"]["uniformity_queries"] == uniformity(base.passages_PD[10:15])
