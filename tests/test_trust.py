"""Signs of a teacher that cannot be trusted, against plain loops and scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from retrieval_ray.groups import Pool
from retrieval_ray.trust import (
    Beside,
    agreement,
    by_kind,
    heaviest_losses,
    kendall_tau,
    most_inverted,
    parity,
    percentiles,
    read,
)

RAW = st.integers(-20, 20).map(lambda n: n / 4)


def _pool(scores, source=None, kind="title", query_id="q"):
    return Pool(query_id, kind, source, [f"p{n}" for n in range(len(scores))], np.array(scores, dtype=float))


@given(st.lists(RAW, min_size=2, max_size=12))
def test_tau_is_scipys_tau_b_against_the_order_of_retrieval(scores):
    expected = stats.kendalltau([-n for n in range(len(scores))], scores).statistic
    assert kendall_tau(np.array(scores)) == pytest.approx(0.0 if np.isnan(expected) else expected)


def test_tau_at_its_ends():
    assert kendall_tau(np.array([3.0, 2.0, 1.0])) == 1 and kendall_tau(np.array([1.0, 2.0, 3.0])) == -1
    assert kendall_tau(np.array([2.0, 2.0])) == 0 and kendall_tau(np.array([])) == 0


@given(st.lists(RAW, min_size=1, max_size=15), st.data())
def test_a_reading_counts_what_the_teacher_prefers(scores, data):
    source = data.draw(st.none() | st.integers(0, len(scores) - 1))
    pool = _pool(scores, None if source is None else f"p{source}")
    ranking = data.draw(st.permutations(pool.passage_ids))
    reading = read(pool, {"dense": ranking})
    anchor = 0 if source is None else source
    better = [
        p
        for p, s in zip(pool.passage_ids, scores, strict=True)
        if s > scores[anchor] or (s == scores[anchor] and p < f"p{anchor}")
    ]
    assert reading.rank == len(better) + 1 and reading.anchor_id == f"p{anchor}"
    assert reading.has_source == (source is not None)
    assert reading.gap == max(scores) - scores[anchor]
    assert reading.spread == pytest.approx(np.std(scores))
    order = sorted(pool.passage_ids, key=lambda p: (-scores[int(p[1:])], p))
    shared = sum(p in order[:10] for p in ranking[:10])
    tau, overlap = reading.agreement["dense"]
    assert overlap == shared / min(10, len(scores))
    assert tau == kendall_tau(np.array([scores[int(p[1:])] for p in ranking]))


def test_passages_outside_of_the_pool_count_for_no_tau_and_as_not_shared():
    reading = read(_pool([3.0, 2.0, 1.0]), {"bm25": ["p0", "elsewhere", "p2"]})
    assert reading.agreement["bm25"] == (1.0, pytest.approx(2 / 3))


def test_kinds_are_summed_up_by_themselves():
    readings = [
        read(_pool([1.0, 2.0, 3.0, 4.0], "p3"), {}),
        read(_pool([1.0, 2.0, 3.0, 4.0], "p0"), {}),
        read(_pool([0.0, 0.0], None, kind="log"), {}),
    ]
    kinds = by_kind(readings)
    assert kinds["title"]["queries"] == 2 and kinds["title"]["sources"] == 2
    assert kinds["title"]["not_first"] == 0.5 and kinds["title"]["inverted"] == 0.5
    assert kinds["title"]["spread"] == percentiles([np.std([1, 2, 3, 4])] * 2)
    assert kinds["log"] == {
        "queries": 1, "spread": [0.0] * 5, "sources": 0, "not_first": None, "inverted": 0.0
    }  # fmt: skip


def test_the_most_inverted_have_the_widest_gap_in_deviations():
    wide = read(_pool([0.0, 9.0, 8.9, 8.8], "p0", query_id="wide"), {})
    narrow = read(_pool([0.0, 100.0, 50.0, 1.0], "p0", query_id="narrow"), {})
    second = read(_pool([3.0, 4.0, 1.0, 1.0], "p0", query_id="second"), {})
    gaps = [r.gap / r.spread for r in most_inverted([narrow, second, wide], 5)]
    assert gaps == sorted(gaps, reverse=True) and len(gaps) == 2  # second of four is not inverted
    assert len(most_inverted([narrow, wide], 1)) == 1


def test_agreement_is_summed_up_by_retriever():
    readings = [read(_pool([3.0, 2.0, 1.0]), {"dense": ["p0", "p1", "p2"], "bm25": ["p2", "p1", "p0"]})]
    found = agreement(readings)
    assert found["dense"]["tau"] == [1.0] * 5 and found["bm25"]["tau"] == [-1.0] * 5
    assert found["dense"]["overlap@10"] == [1.0] * 5


def test_heaviest_losses_come_first_and_gains_not_at_all():
    rows = [Beside("a", 0.5, 0.4), Beside("b", 0.9, 0.1), Beside("c", 0.0, 1.0), Beside("d", 0.3, 0.3)]
    assert [row.query_id for row in heaviest_losses(rows, 5)] == ["b", "a"]


@given(st.lists(st.tuples(RAW, RAW), min_size=2, max_size=20))
def test_parity_is_what_scipy_and_plain_sums_say(values):
    one, other = zip(*values, strict=True)
    found = parity(np.array(one), np.array(other))
    apart = [abs(a - b) for a, b in values]
    assert (found.pairs, found.largest) == (len(values), max(apart))
    assert found.mean == pytest.approx(sum(apart) / len(apart))
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert found.rank_correlation == pytest.approx(stats.spearmanr(one, other).statistic)


def test_parity_of_twins_is_perfect():
    twin = parity(np.array([1.0]), np.array([1.0]))
    assert (twin.largest, twin.rank_correlation) == (0.0, 1.0)
