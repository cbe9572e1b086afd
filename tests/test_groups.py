"""From raw scores to lists: the papers' rules, recomputed by hand."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from retrieval_ray.groups import (
    Group,
    Pool,
    Scale,
    best,
    build,
    combine,
    inconsistency,
    standardise,
    with_similarities,
)
from retrieval_ray.negatives import NEGATIVES, Margins
from tests import oracles

# quarters: exact in binary, negative and tied scores in most examples
RAW = st.integers(-40, 40).map(lambda n: n / 4)


@st.composite
def pools(draw, min_size=1, log=False):
    scores = draw(st.lists(RAW, min_size=min_size, max_size=12))
    ids = [f"p{n}" for n in draw(st.permutations(range(len(scores))))]
    source = None if log else draw(st.sampled_from(ids))
    return Pool("q", "title", source, ids, np.array(scores))


def _scale(scores, low=0.0, high=100.0, floor=None):
    return Scale.of(
        np.asarray(scores, dtype=float),
        lower_percentile=low,
        upper_percentile=high,
        min_positive_percentile=floor,
    )


def _built(pool, scale, list_size=4, ratio=0.6, negatives="top", margins=None):
    group = build(
        pool, scale, fewest=1, list_size=list_size, false_negative_ratio=ratio, negatives=negatives,
        margins=margins,
    )  # fmt: skip
    assert isinstance(group, Group)
    return group


@given(pools(), st.integers(1, 12))
def test_a_list_is_the_positive_then_the_head_of_the_ranking_by_teacher_score(pool, list_size):
    group = _built(pool, _scale(pool.scores_N), list_size)
    assert group.passage_ids[0] == pool.source_id
    assert pool.source_id not in group.passage_ids[1:]
    assert pool.source_id not in group.excluded_ids
    head = [passage for passage in pool.passage_ids if passage != pool.source_id][: list_size - 1]
    raw = dict(zip(pool.passage_ids, pool.scores_N, strict=True))
    assert group.passage_ids[1:] == sorted(head, key=lambda p: (-raw[p], p))
    normal = dict(zip(pool.passage_ids, _scale(pool.scores_N).apply(pool.scores_N), strict=True))
    assert group.teacher_scores_K.tolist() == [normal[passage] for passage in group.passage_ids]


@given(pools(min_size=2), st.data())
def test_spread_negatives_are_even_steps_of_the_teachers_order_from_first_to_last(pool, data):
    list_size = data.draw(st.integers(2, len(pool.passage_ids)))
    group = _built(pool, _scale(pool.scores_N), list_size, negatives="spread")
    raw = dict(zip(pool.passage_ids, pool.scores_N, strict=True))
    order = sorted(raw.keys() - {pool.source_id}, key=lambda p: (-raw[p], p))
    places = [order.index(passage) for passage in group.passage_ids[1:]]
    assert group.passage_ids[0] == pool.source_id and len(places) == list_size - 1
    assert places[0] == 0 and (list_size == 2 or places[-1] == len(order) - 1)
    gaps = set(np.diff(places).tolist())
    assert all(gap >= 1 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)
    # the 60 % rule looks at the whole pool, whichever of it is in the list
    assert group.excluded_ids == _built(pool, _scale(pool.scores_N), list_size).excluded_ids


@given(pools(min_size=2))
def test_all_choices_of_negatives_agree_when_the_list_is_the_pool(pool):
    lists = [
        _built(pool, _scale(pool.scores_N), len(pool.passage_ids), negatives=negatives).passage_ids
        for negatives in NEGATIVES
    ]
    assert lists[0] == lists[1] == lists[2]


@given(pools(min_size=2), st.sampled_from(sorted(NEGATIVES)), st.data())
def test_a_list_with_margins_holds_nothing_too_close_or_says_why_there_is_none(pool, negatives, data):
    list_size = data.draw(st.integers(2, len(pool.passage_ids)))
    fewest = data.draw(st.integers(2, list_size))
    share = data.draw(st.sampled_from([0.0, 0.05, 0.4]))
    scale = _scale(pool.scores_N)
    normal = dict(zip(pool.passage_ids, scale.apply(pool.scores_N), strict=True))
    close = {
        p
        for p in pool.passage_ids
        if p != pool.source_id and normal[p] > (1 - share) * normal[pool.source_id]
    }
    made = build(
        pool,
        scale,
        fewest=fewest,
        list_size=list_size,
        false_negative_ratio=1.0,
        negatives=negatives,
        margins=Margins(relative=share),
    )
    left = len(pool.passage_ids) - len(close)
    if left < fewest:
        assert isinstance(made, tuple) and made[0] == "few_negatives"
        return
    assert isinstance(made, Group) and len(set(made.passage_ids)) == min(list_size, left)
    assert not close & set(made.passage_ids) and close <= set(made.excluded_ids)
    assert made.too_close == len(close)


def test_a_deeper_rank_stands_in_for_a_passage_that_the_retriever_finds_too_close():
    ids = ["pos", "close", "near", "far", "unseen"]
    similar = np.array([0.80, 0.79, 0.70, 0.60, np.nan])
    pool = Pool("q", "log", "pos", ids, np.array([4.0, 3.0, 2.0, 1.0, 0.0]), similar, floor=0.6)
    group = _built(pool, _scale(pool.scores_N), list_size=3, ratio=1.0, margins=Margins(relative=0.05))
    assert group.passage_ids == ["pos", "near", "far"]
    assert (group.too_close, group.deeper, list(group.excluded_ids)) == (1, 1, ["close"])
    without = _built(pool, _scale(pool.scores_N), list_size=3, ratio=1.0)
    assert without.passage_ids == ["pos", "close", "near"] and without.deeper == 0
    rest = _built(pool, _scale(pool.scores_N), list_size=5, ratio=1.0, margins=Margins(relative=0.05))
    assert rest.passage_ids == ["pos", "near", "far", "unseen"]
    assert (rest.too_close, rest.deeper) == (1, 0)  # nothing stands in for it: the list is shorter
    short = build(
        pool, _scale(pool.scores_N), fewest=5, list_size=5, false_negative_ratio=1.0, negatives="top",
        margins=Margins(relative=0.05),
    )  # fmt: skip
    assert isinstance(short, tuple) and short[0] == "few_negatives" and "1 of 4" in short[1]


@given(pools(), RAW, RAW, st.sampled_from([0.6, 0.5, 0.95]))
def test_the_60_percent_rule_is_the_raw_rule_between_the_percentiles(pool, low, high, ratio):
    """s > P1 + 0.6 (s_pos - P1), on scores cut to [P1, P99]; also where all are negative."""
    assume(low < high)
    group = _built(pool, Scale(low, high, -np.inf), ratio=ratio)
    cut = np.clip(pool.scores_N, low, high)
    limit = low + ratio * (cut[pool.passage_ids.index(pool.source_id)] - low)
    for passage, score in zip(pool.passage_ids, cut, strict=True):
        if passage != pool.source_id and abs(score - limit) > 1e-9:
            assert (passage in group.excluded_ids) == (score > limit), (passage, score, limit)


def test_the_60_percent_rule_is_strict_and_reaches_beyond_the_list():
    ids = ["pos", "over", "at", "under", "far"]
    pool = Pool("q", "log", "pos", ids, np.array([0.0, -3.9, -4.0, -4.1, -1.0]))
    group = _built(pool, Scale(-10.0, 0.0, -np.inf), list_size=3)
    assert group.passage_ids == ["pos", "over", "at"]
    assert group.excluded_ids == ["far", "over"]  # 0.9 and 0.61 of the positive; 0.6 stays


@given(pools(min_size=2), st.sampled_from([0.25, 1.0, 8.0]), RAW)
def test_lists_do_not_change_when_raw_scores_are_shifted_and_scaled(pool, factor, shift):
    # range of the scores as the scale, and a ratio of a half: nothing is rounded
    moved = Pool(pool.query_id, pool.kind, pool.source_id, pool.passage_ids, pool.scores_N * factor + shift)
    before = _built(pool, _scale(pool.scores_N), ratio=0.5)
    after = _built(moved, _scale(moved.scores_N), ratio=0.5)
    assert after.passage_ids == before.passage_ids
    assert after.excluded_ids == before.excluded_ids
    np.testing.assert_allclose(after.teacher_scores_K, before.teacher_scores_K, atol=1e-12)


@given(st.lists(RAW, min_size=1, max_size=50), st.floats(0, 40), st.floats(60, 100))
def test_normalisation_is_between_global_percentiles(scores, low, high):
    scale = _scale(scores, low, high, floor=25.0)
    bottom, top = oracles.percentile(scores, low), oracles.percentile(scores, high)
    np.testing.assert_allclose([scale.low, scale.high], [bottom, top], atol=1e-12)
    assert scale.min_positive == pytest.approx(oracles.percentile(scores, 25.0))
    assume(top > bottom)
    expected = [min(max((s - bottom) / (top - bottom), 0.0), 1.0) for s in scores]
    np.testing.assert_allclose(scale.apply(np.array(scores)), expected, atol=1e-9)


def test_a_scale_without_width_gives_finite_scores_in_range():
    normal = _scale([3.0, 3.0, 3.0]).apply(np.array([2.0, 3.0, 4.0]))
    assert ((normal >= 0) & (normal <= 1)).all()


@given(pools(log=True))
def test_a_log_query_takes_the_teachers_first(pool):
    first = oracles.top_k(list(zip(pool.passage_ids, pool.scores_N, strict=True)), 1)[0][0]
    assert pool.passage_ids[best(pool)] == first
    group = _built(pool, _scale(pool.scores_N))
    assert group.passage_ids[0] == first
    assert first not in group.excluded_ids


def test_a_positive_below_the_floor_is_dropped_and_one_at_the_floor_kept():
    scale = _scale([0.0, 1.0, 2.0, 3.0, 4.0], floor=25.0)
    low = Pool("q", "title", "a", ["a", "b"], np.array([0.99, 0.0]))
    dropped = build(low, scale, fewest=2, list_size=2, false_negative_ratio=0.6, negatives="top")
    assert isinstance(dropped, tuple) and dropped[0] == "low_positive"
    at = Pool("q", "title", "a", ["a", "b"], np.array([1.0, 0.0]))
    kept = build(at, scale, fewest=2, list_size=2, false_negative_ratio=0.6, negatives="top")
    assert isinstance(kept, Group)


@pytest.mark.parametrize(
    ("source", "dense", "judged", "scores", "first", "reason"),
    [
        ("a", "abc", "abc", (3, 2, 1), True, None),
        ("b", "abc", "abc", (3, 4, 1), True, None),  # second in the ranking, first for the teacher
        ("c", "abc", "abc", (1, 2, 3), True, "not_retrieved"),  # below rank 2
        ("x", "abc", "abc", (3, 2, 1), True, "not_retrieved"),
        ("b", "abc", "acd", (3, 2, 1), True, "not_judged"),
        ("b", "abc", "abc", (3, 2, 1), True, "not_first"),
        ("b", "abc", "abc", (3, 2, 1), False, None),
        ("b", "abc", "abc", (2, 2, 1), True, "not_first"),  # a tie goes to the smaller id
        ("a", "abc", "ab", (3, 2), True, "short_list"),
        (None, "abc", "abc", (1, 2, 3), True, None),
        (None, "abc", "ab", (1, 2), True, "short_list"),
        (None, "", "", (), True, "short_list"),
    ],
)
def test_reasons_for_dropping_a_query(source, dense, judged, scores, first, reason):
    pool = Pool("q", "title", source, list(judged), np.array(scores, dtype=float))
    verdict = inconsistency(pool, {"dense": list(dense)}, fewest=3, source_rank=2, require_first=first)
    assert (verdict[0] if verdict else None) == reason


def test_every_retriever_must_have_found_the_source():
    pool = Pool("q", "title", "a", ["a", "b"], np.array([2.0, 1.0]))
    rankings = {"dense": ["a", "b"], "bm25": ["b", "a"]}
    arguments = {"fewest": 2, "require_first": True}
    assert inconsistency(pool, rankings, source_rank=2, **arguments) is None
    reason, detail = inconsistency(pool, rankings, source_rank=1, **arguments)
    assert reason == "not_retrieved" and "bm25" in detail


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 60))
def test_equal_scores_standardise_to_zeros(value, count):
    assert not standardise(np.full(count, value)).any()


@given(st.lists(RAW, min_size=2, max_size=20), st.floats(0.1, 10), RAW)
def test_standardising_forgets_shift_and_scale(scores, factor, shift):
    scores = np.array(scores)
    assume(scores.std() > 0)
    standard = standardise(scores)
    np.testing.assert_allclose([standard.mean(), standard.std()], [0, 1], atol=1e-9)
    np.testing.assert_allclose(standardise(factor * scores + shift), standard, atol=1e-7)


def test_teachers_are_averaged_by_weight_after_standardising():
    late, bm25, dense = np.array([1.0, 3.0]), np.array([50.0, 10.0]), np.array([0.7, 0.1])
    teachers = {"late": late, "bm25": bm25, "dense": dense}
    mixed = combine(teachers, {"late": 3.0, "bm25": 1.0})  # -1, 1 and 1, -1; dense has no weight
    np.testing.assert_allclose(mixed, [-0.75 + 0.25, 0.75 - 0.25])
    assert combine({"late": late}, {"late": 0.3}) is late  # raw: comparable across queries
    with pytest.raises(ValueError, match="sum to 0"):
        combine(teachers, {"other": 1.0})


@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=12),
    st.lists(st.floats(-50, 50), min_size=2, max_size=12),
)
def test_a_later_pool_is_standardised_by_the_first(first: list[float], later: list[float]) -> None:
    """So a pair that stands in both has one score: s' = (s - mean of the first) / its deviation."""
    a, b = np.array(first), np.concatenate([later, first[:1]])
    both = {"late": a, "bm25": a[::-1].copy()}, {"late": b, "bm25": np.append(later, a[-1])}
    weights = {"late": 2.0, "bm25": 1.0}
    mixed = combine(both[1], weights, both[0])
    assert mixed[-1] == pytest.approx(combine(both[0], weights)[0], abs=1e-9)
    alone = np.array([1.0, 5.0])
    assert combine({"late": alone}, weights, {"late": a}) is alone


def test_similarities_join_a_pool_by_passage() -> None:
    pool = Pool("q", "log", None, ["a", "b", "c"], np.array([3.0, 2.0, 1.0]))
    found = with_similarities(pool, [("c", 0.9), ("z", 0.8), ("a", 0.5)])
    np.testing.assert_array_equal(found.similarities_N, [0.5, np.nan, 0.9])
    assert found.floor == 0.5 and found.passage_ids == pool.passage_ids


def test_what_an_index_missed_has_the_similarity_that_a_teacher_gave_it() -> None:
    """b is nearer than the last that was found, so an exact search would have had it; d would it not."""
    pool = Pool("q", "log", None, ["a", "b", "c", "d"], np.array([4.0, 3.0, 2.0, 1.0]))
    found = with_similarities(pool, [("c", 0.9), ("a", 0.5)], np.array([0.5, 0.7, 0.9, 0.4]))
    np.testing.assert_array_equal(found.similarities_N, [0.5, 0.7, 0.9, np.nan])
    assert found.floor == 0.5
