"""Which passages become negatives: the rules against plain loops, with tied and negative scores."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.negatives import NEGATIVES, Margins, too_close

RAW = st.integers(-40, 40).map(lambda n: n / 4)  # quarters: exact in binary, often tied


@st.composite
def candidates(draw):
    """Positions in the order of retrieval, the same by falling score, the scores, how many to take."""
    scores = np.array(draw(st.lists(RAW, min_size=1, max_size=14)))
    ranked = draw(st.permutations(range(len(scores))))
    by_score = sorted(ranked, key=lambda i: (-scores[i], i))
    return ranked, by_score, scores, draw(st.integers(1, len(scores)))


@given(candidates(), st.sampled_from(sorted(NEGATIVES)))
def test_every_rule_takes_so_many_different_passages_by_falling_score(drawn, rule):
    ranked, by_score, scores, count = drawn
    chosen = NEGATIVES[rule](ranked, by_score, scores, count)
    assert len(chosen) == len(set(chosen)) == count and set(chosen) <= set(ranked)
    assert [by_score.index(i) for i in chosen] == sorted(by_score.index(i) for i in chosen)


@given(candidates())
def test_top_takes_the_head_of_retrieval(drawn):
    ranked, by_score, scores, count = drawn
    assert set(NEGATIVES["top"](ranked, by_score, scores, count)) == set(ranked[:count])


@given(candidates())
def test_spread_and_stratified_reach_from_the_first_to_the_last(drawn):
    ranked, by_score, scores, count = drawn
    for rule in ("spread", "stratified"):
        chosen = NEGATIVES[rule](ranked, by_score, scores, count)
        assert chosen[0] == by_score[0]
        assert count == 1 or scores[chosen[-1]] == scores[by_score[-1]]


@given(candidates())
def test_stratified_takes_what_is_nearest_to_even_steps_of_the_score(drawn):
    ranked, by_score, scores, count = drawn
    taken: list[int] = []
    for target in np.linspace(scores[by_score[0]], scores[by_score[-1]], count):
        found = None
        for i in by_score:
            if i not in taken and (found is None or abs(scores[i] - target) < abs(scores[found] - target)):
                found = i
        taken.append(found)
    assert sorted(NEGATIVES["stratified"](ranked, by_score, scores, count)) == sorted(taken)


def test_stratified_covers_a_skewed_range_that_spread_does_not():
    scores = np.array([10.0, 7.5, 5.0, 2.5, *np.linspace(0.9, 0.0, 16)])
    order = list(range(20))
    assert scores[NEGATIVES["stratified"](order, order, scores, 5)].tolist() == [10, 7.5, 5, 2.5, 0]
    assert (scores[NEGATIVES["spread"](order, order, scores, 5)] < 1).sum() == 4


@given(candidates(), st.data())
def test_nothing_left_scores_over_the_margins(drawn, data):
    scores = drawn[2]
    positive = data.draw(st.integers(0, len(scores) - 1))
    relative = data.draw(st.none() | st.sampled_from([0.0, 0.05, 0.5]))
    absolute = data.draw(st.none() | st.sampled_from([0.0, 0.25, 3.0]))
    close = too_close(scores, positive, Margins(relative, absolute), floor=0.0)
    for i, score in enumerate(scores):
        over = False
        if relative is not None and score > scores[positive] - relative * abs(scores[positive]):
            over = True
        if absolute is not None and score > scores[positive] - absolute:
            over = True
        assert (i in close) == (over and i != positive)


def test_the_papers_rules_on_a_similarity():
    scores = np.array([0.80, 0.77, 0.76, 0.75, 0.74])
    assert too_close(scores, 0, Margins(relative=0.05), floor=0.0) == [1]  # over .76
    assert too_close(scores, 0, Margins(absolute=0.05), floor=0.0) == [1, 2]  # over .75


def test_a_margin_lies_below_a_negative_positive_too():
    assert Margins(relative=0.05).limit(-2.0) == pytest.approx(-2.1)
    assert Margins().limit(1.0) == math.inf


def test_what_was_not_retrieved_is_never_too_close_and_a_positive_counts_as_the_lowest():
    scores = np.array([np.nan, 0.9, 0.5, np.nan])
    assert too_close(scores, 0, Margins(relative=0.05), floor=0.5) == [1, 2]
    assert too_close(scores, 1, Margins(relative=0.05), floor=0.5) == []
