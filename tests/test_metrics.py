"""Metrics against their definitions, differences against enumeration and a hand-worked example."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from retrieval_ray.metrics import (
    METRICS,
    NO_DIFFERENCE,
    holm,
    mean,
    paired_difference,
    per_query,
    spearman,
    spearman_p,
)
from tests import oracles

PASSAGES = [f"p{n}" for n in range(130)]
JUDGED = st.dictionaries(st.sampled_from(PASSAGES[:25]), st.integers(0, 3), min_size=1, max_size=15)
RANKING = st.permutations(PASSAGES[:25]).flatmap(lambda order: st.integers(0, 25).map(lambda k: order[:k]))


def _naive(judged, ranking, threshold):
    relevant = {passage for passage, relevance in judged.items() if relevance >= threshold}
    return {
        "ndcg@5": oracles.ndcg(judged, ranking, 5),
        "ndcg@10": oracles.ndcg(judged, ranking, 10),
        "recall@100": oracles.recall(relevant, ranking, 100),
        "mrr@10": oracles.reciprocal_rank(relevant, ranking, 10),
        "map@100": oracles.average_precision(relevant, ranking, 100),
    }


@given(st.dictionaries(st.sampled_from("qrst"), st.tuples(JUDGED, RANKING), min_size=1), st.integers(1, 3))
def test_every_metric_is_its_definition(queries, threshold):
    qrels = {query: judged for query, (judged, _) in queries.items()}
    run = {query: ranking for query, (_, ranking) in queries.items()}
    values = per_query(qrels, run, relevance_threshold=threshold)
    assert values.keys() == qrels.keys()
    for query, (judged, ranking) in queries.items():
        assert values[query] == pytest.approx(_naive(judged, ranking, threshold), abs=1e-6)
        assert all(0 <= value <= 1 for value in values[query].values())


@pytest.mark.parametrize("place", [0, 4, 5, 9, 10, 99, 100])
def test_cutoffs(place):
    order = [*PASSAGES[1:]]
    order.insert(place, "p0")
    values = per_query({"q": {"p0": 1}}, {"q": order})["q"]
    assert values == pytest.approx(_naive({"p0": 1}, order, 1), abs=1e-6)
    assert (values["ndcg@5"] > 0) == (place < 5)
    assert (values["mrr@10"] > 0) == (place < 10)
    assert (values["recall@100"] > 0) == (place < 100)


def test_the_order_of_the_run_is_kept_whatever_the_ids():
    """trec_eval sorts ties by id, falling; a ranking is not a tie."""
    for ranking in (["a", "z"], ["z", "a"]):
        values = per_query({"q": {"a": 1}}, {"q": ranking})["q"]
        assert values["mrr@10"] == 1 / (ranking.index("a") + 1)


def test_unanswered_queries_and_queries_without_anything_relevant_count_zero():
    qrels = {"answered": {"a": 1}, "missing": {"a": 1}, "empty": {"a": 1}, "hopeless": {"b": 0}}
    values = per_query(qrels, {"answered": ["a"], "empty": [], "hopeless": ["b"], "unjudged": ["a"]})
    assert values.keys() == qrels.keys()
    zero = dict.fromkeys(METRICS, 0.0)
    assert values["missing"] == values["empty"] == values["hopeless"] == zero
    assert mean(values) == dict.fromkeys(METRICS, 0.25)
    assert mean({}) == zero and per_query({}, {"q": ["a"]}) == {}


def test_the_threshold_is_for_binary_metrics_only():
    values = per_query({"q": {"a": 1, "b": 2}}, {"q": ["a", "b"]}, relevance_threshold=2)["q"]
    assert (values["mrr@10"], values["recall@100"], values["map@100"]) == (0.5, 1.0, 0.5)
    expected = (1 / np.log2(2) + 2 / np.log2(3)) / (2 / np.log2(2) + 1 / np.log2(3))
    assert values["ndcg@10"] == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.integers(-4, 4).map(lambda n: n / 8), min_size=1, max_size=9))
def test_p_is_the_exact_randomisation_test(differences):
    found = paired_difference([0.5] * len(differences), [0.5 + d for d in differences])
    if any(differences):
        # 10,000 draws: four standard errors, and the one that is added
        assert found.p == pytest.approx(oracles.sign_flip_p(differences), abs=0.0201)
    else:
        assert found == NO_DIFFERENCE


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(0, 3))
def test_the_interval_holds_the_mean_and_swapping_mirrors_it(differences, seed):
    zeros = [0.0] * len(differences)
    found = paired_difference(zeros, differences, seed=seed, rounds=400)
    mirrored = paired_difference(differences, zeros, seed=seed, rounds=400)
    assert found.mean == pytest.approx(np.mean(differences))
    assert found.low - 1e-12 <= found.mean <= found.high + 1e-12
    assert (mirrored.mean, mirrored.p) == pytest.approx((-found.mean, found.p))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    assert 0 < found.p <= 1


def test_the_interval_is_as_wide_as_theory_says():
    differences = np.random.default_rng(0).normal(0.02, 0.1, 400)
    found = paired_difference(np.zeros(400), differences)
    error = differences.std() / np.sqrt(400)
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)
    assert paired_difference(np.zeros(400), differences) == found
    assert paired_difference(np.zeros(400), differences, seed=1) != found


def test_p_never_reaches_zero_and_nothing_to_compare_is_no_difference():
    assert paired_difference([0.0] * 50, [1.0] * 50, rounds=99).p == 1 / 100
    assert paired_difference([], []) == NO_DIFFERENCE
    assert paired_difference([0.3, 0.2], [0.3, 0.2]) == NO_DIFFERENCE


def test_holm_by_hand():
    """.005 x 4, .01 x 3, .03 x 2; .04 x 1 may not be below the one before it."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1), max_size=8))
def test_holm_lies_between_the_raw_p_and_bonferroni_and_keeps_the_order(p_values):
    found = holm(p_values)
    assert found.keys() == p_values.keys()
    for name, p in p_values.items():
        assert p <= found[name] <= min(1.0, p * len(p_values)) + 1e-12
    for first in p_values:
        for second in p_values:
            assert p_values[first] > p_values[second] or found[first] <= found[second]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_spearman_is_scipys_and_zero_where_it_has_no_value(pairs):
    one, other = np.array(pairs, dtype=float).T
    constant = len(set(one)) == 1 or len(set(other)) == 1
    expected = 0.0 if constant else stats.spearmanr(one, other).statistic
    assert spearman(one, other) == pytest.approx(expected, abs=1e-9)


def test_its_p_is_the_share_of_permutations_that_are_as_extreme():
    """Of the 24 orders of four values, those at rho = 1 and -1: two."""
    rising = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman_p(rising, rising**2, seed=1) == pytest.approx(2 / 24, abs=0.01)
    assert spearman_p(rising, np.ones(4)) == 1.0
    many = np.arange(100.0)
    assert spearman_p(many, -many) == 1 / 10_001
