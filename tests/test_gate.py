"""The gate: a teacher must prove itself on queries its weights were not fitted on."""

import numpy as np
import pytest

from retrieval_ray.gate import JudgedPool, judge, rerank, unproven
from retrieval_ray.metrics import per_query

DEPTH = 12


def _world(queries, seed, *, noise_teachers=2, perfect=False):
    """Queries with one relevant passage somewhere in a random pool, and teachers."""
    rng = np.random.default_rng(seed)
    pools, qrels, student = {}, {}, {}
    for q in range(queries):
        ids = [f"p{n}" for n in rng.permutation(DEPTH)]
        teachers = {f"noise{n}": rng.standard_normal(DEPTH) for n in range(noise_teachers)}
        if perfect:
            teachers["perfect"] = np.array([float(passage == "p0") for passage in ids])
        pools[f"q{q}"] = JudgedPool(ids, teachers)
        qrels[f"q{q}"] = {"p0": 1}
        student[f"q{q}"] = ids
    return pools, qrels, student


def _judge(pools, qrels, student, fixed_weights=None, seed=0):
    return judge(pools, qrels, student, fixed_weights=fixed_weights, seed=seed)


def test_noise_rarely_passes_although_the_best_of_many_weights_is_taken():
    """About 1 in 40 in theory. Judged on the queries they were chosen on, the same weights look
    good."""
    worlds = [_world(40, seed) for seed in range(40)]
    verdicts = [_judge(*world) for world in worlds]
    assert sum(bool(verdict.passed) for verdict in verdicts) <= 3
    honest = np.mean([verdict.difference.mean for verdict in verdicts])
    assert abs(honest) < 0.03
    flattered = [
        _judge(*world, fixed_weights=verdict.weights).difference.mean
        for world, verdict in zip(worlds, verdicts, strict=True)
    ]
    assert np.mean(flattered) > honest + 0.02


def test_a_perfect_teacher_passes_and_gets_the_weight():
    verdict = _judge(*_world(40, 1, noise_teachers=1, perfect=True))
    assert verdict.passed is True
    assert verdict.weights["perfect"] >= 0.5  # already enough
    assert verdict.teacher == pytest.approx(1.0)
    assert verdict.difference.mean == pytest.approx(verdict.teacher - verdict.student)
    assert verdict.queries == 40
    students, teachers = zip(*verdict.by_query.values(), strict=True)
    assert (np.mean(students), np.mean(teachers)) == pytest.approx((verdict.student, verdict.teacher))


def test_a_teacher_no_better_than_the_student_does_not_pass():
    pools, qrels, _ = _world(40, 2, noise_teachers=0, perfect=True)
    verdict = _judge(pools, qrels, {query: rerank(pools[query], {}) for query in pools})
    assert verdict.passed is False
    assert (verdict.student, verdict.teacher, verdict.difference.mean) == (1.0, 1.0, 0.0)


def test_a_harmful_teacher_does_not_pass():
    pools, qrels, student = _world(30, 3, noise_teachers=0, perfect=True)
    worst = {q: JudgedPool(p.passage_ids, {"x": -p.teachers["perfect"]}) for q, p in pools.items()}
    verdict = _judge(worst, qrels, student)
    assert verdict.passed is False and verdict.difference.high < 0


def test_equal_teachers_get_even_weights():
    pools, qrels, student = _world(30, 4, noise_teachers=1)
    alike = {
        q: JudgedPool(p.passage_ids, {name: p.teachers["noise0"] for name in "abcd"})
        for q, p in pools.items()
    }
    assert _judge(alike, qrels, student).weights == dict.fromkeys("abcd", 0.25)


def test_weights_are_the_best_on_all_queries_and_sum_to_one():
    pools, qrels, student = _world(30, 5, noise_teachers=2)
    verdict = _judge(pools, qrels, student)
    assert sum(verdict.weights.values()) == pytest.approx(1.0)

    def ndcg(weights):
        values = per_query(qrels, {query: rerank(pools[query], weights) for query in pools})
        return np.mean([row["ndcg@10"] for row in values.values()])

    grid = [{"noise0": n / 8, "noise1": 1 - n / 8} for n in range(9)]
    assert ndcg(verdict.weights) == pytest.approx(max(ndcg(weights) for weights in grid))


def test_fixed_weights_are_kept_and_judged():
    pools, qrels, student = _world(20, 6, noise_teachers=1, perfect=True)
    verdict = _judge(pools, qrels, student, fixed_weights={"noise0": 1.0, "perfect": 0.0})
    assert verdict.weights == {"noise0": 1.0, "perfect": 0.0}
    alone = {q: rerank(pools[q], {"noise0": 1.0}) for q in pools}
    expected = np.mean([row["ndcg@10"] for row in per_query(qrels, alone).values()])
    assert verdict.teacher == pytest.approx(expected)


def test_the_verdict_depends_on_nothing_but_its_input_and_seed():
    pools, qrels, student = _world(25, 7)
    first = _judge(pools, qrels, student)
    turned = dict(reversed(qrels.items()))
    assert _judge(dict(reversed(pools.items())), turned, student) == first
    other = _judge(pools, qrels, student, seed=1)
    assert other.weights == first.weights and other.difference.mean == first.difference.mean
    assert other.difference != first.difference


def test_one_judged_query_proves_nothing():
    """Nothing is left to fit on, so weights chosen on that query must not pass on it."""
    verdicts = [_judge(*_world(1, seed, noise_teachers=3)) for seed in range(10)]
    assert not any(verdict.passed for verdict in verdicts)


def test_a_query_with_an_empty_pool_counts_zero():
    pools, qrels, student = _world(10, 8, noise_teachers=0, perfect=True)
    pools["q3"] = JudgedPool([], {"perfect": np.zeros(0)})
    assert rerank(pools["q3"], {"perfect": 1.0}) == []
    assert _judge(pools, qrels, student).teacher == pytest.approx(0.9)


def test_reranking_breaks_ties_by_id():
    pool = JudgedPool(["c", "a", "b"], {"x": np.array([1.0, 0.0, 1.0])})
    assert rerank(pool, {"x": 1.0}) == ["b", "c", "a"]


def test_unproven_is_neither_passed_nor_failed():
    verdict = unproven({"late": 1.0})
    assert verdict.passed is None and verdict.difference is None and verdict.queries == 0
