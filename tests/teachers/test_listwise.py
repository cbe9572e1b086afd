"""Orders of a language model: windows, replies in every state, and what a pool becomes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.teachers.listwise import Failure, parse_order, prompt, rank, windows


@given(st.integers(0, 120), st.integers(2, 30), st.data())
def test_windows_go_from_the_back_to_the_front_and_overlap(count, window, data):
    stride = data.draw(st.integers(1, window - 1))
    found = windows(count, window, stride)
    assert {at for first, after in found for at in range(first, after)} == set(range(count))
    assert all(after - first == min(window, count) for first, after in found[:-1])
    assert all(0 < after - first <= window for first, after in found)
    for (first, after), (next_first, next_after) in zip(found, found[1:], strict=False):
        assert next_after == after - stride > first and next_first < first


def test_the_windows_of_rankgpt():
    assert windows(100, 20, 10) == [(n, n + 20) for n in range(80, -1, -10)]
    assert windows(5, 20, 10) == [(0, 5)] and windows(0, 20, 10) == []


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[2] > [1] > [3]", [1, 0, 2]),
        ("[3]>[2]", [2, 1, 0]),  # the rest in its present order
        ("[3] > [3] > [9] > [0] > [1]", [2, 0, 1]),  # twice, and no such passage
        ("Here you are: [2] > [3] > [1].", [1, 2, 0]),
        ("2 > 3 > 1", [1, 2, 0]),
        ("<think>[1] is best ... no [3]</think>[2] > [1]", [1, 0, 2]),
        ("[ 2 ], [1]", [1, 0, 2]),
        ("The order: 2, 3, 1", [1, 2, 0]),
        ("[99999999999999999999] > [2]", [1, 0, 2]),
    ],
)
def test_orders_are_repaired(reply, expected):
    order, repaired = parse_order(reply, 3)
    assert order == expected
    assert repaired == (re.findall(r"\d+", reply.rpartition("</think>")[2]) != [str(n + 1) for n in order])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I cannot rank these.", "no_order"),
        ("I'm sorry, but none of these 3 passages answers the query of 10,000 users.", "no_order"),
        ("", "no_order"),
        ("[7] > [0]", "no_order"),
        ("<think>[2] looks better than [1], and 3 > 2", "thought"),
        ("<think>so</think><thinking>[2] > [1]", "thought"),
    ],
)
def test_what_names_no_passage_or_only_thinks_is_no_order(reply, reason):
    found = parse_order(reply, 3)
    assert isinstance(found, Failure) and (found.reason, found.detail, found.passing) == (
        reason,
        reply,
        False,
    )


@given(st.one_of(st.text(), st.text("[]0123456789> ,")), st.integers(1, 30))
def test_every_reply_gives_a_permutation_or_a_reason(reply, count):
    found = parse_order(reply, count)
    assert isinstance(found, Failure) or sorted(found[0]) == list(range(count))


def test_the_prompt_numbers_the_passages_and_cuts_long_ones():
    system, user = prompt("who sells silk", ["first passage", "word " * 1000])
    assert system["role"] == "system" and user["content"].count("who sells silk") == 2
    assert "[1] first passage" in user["content"] and "[2] word word" in user["content"]
    assert user["content"].count("word") == 300


class Scripted:
    """Ranks the shown passages by the number that stands in them, the highest first."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def __call__(self, prompts):
        replies = []
        for messages in prompts:
            found = re.findall(r"^\[(\d+)\] value (\d+)", messages[-1]["content"], flags=re.M)
            self.shown.append(len(found))
            order = sorted(found, key=lambda pair: -int(pair[1]))
            replies.append(" > ".join(f"[{n}]" for n, _ in order))
        return replies


@given(st.lists(st.permutations(range(25)), min_size=1, max_size=3), st.data())
def test_the_best_of_a_pool_is_carried_to_its_top(pools, data):
    window = data.draw(st.integers(2, 12))
    stride = data.draw(st.integers(1, window - 1))
    ask = Scripted()
    texts = [[f"value {value}" for value in pool] for pool in pools]
    orders, repaired = rank(ask, [f"q{n}" for n in range(len(pools))], texts, window=window, stride=stride)
    for pool, order in zip(pools, orders, strict=True):
        assert sorted(order) == list(range(25))
        top = window - stride  # so many survive from one window to the next
        assert [pool[at] for at in order[:top]] == list(range(24, 24 - top, -1))
    assert max(ask.shown) <= window and repaired == 0


def test_a_query_without_a_reply_has_no_order_and_the_others_have_theirs():
    scripted, gone = Scripted(), Failure("no_reply", "HTTP 400: too long")

    def ask(prompts):
        return [
            gone if "broken" in m[-1]["content"] else reply
            for m, reply in zip(prompts, scripted(prompts), strict=True)
        ]

    pools = [[f"value {n}" for n in range(9)]] * 2
    orders, _ = rank(ask, ["broken", "whole"], pools, window=4, stride=2)
    assert orders[0] is gone and sorted(orders[1]) == list(range(9))


def test_repairs_are_counted_and_a_refused_window_ends_its_query():
    pools = [["value 1", "value 2"]] * 3
    replies = ["[2] > [1]", "[2]", "I cannot do that."]
    orders, repaired = rank(lambda prompts: replies, ["a", "b", "c"], pools, window=4, stride=2)
    assert orders == [[1, 0], [1, 0], Failure("no_order", "I cannot do that.")] and repaired == 1
