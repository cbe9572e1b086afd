"""Batches, memory that runs out, and pairs that make a model fail."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.errors import UserError
from retrieval_ray.teachers import pairs
from retrieval_ray.teachers.pairs import in_chunks, judge, padded, whole

LENGTHS = st.lists(st.integers(1, 40), max_size=40)


@given(LENGTHS, st.integers(1, 200))
def test_every_row_is_scored_once_in_its_place_and_chunks_keep_the_budget(lengths, budget):
    seen = []

    def forward(chunk):
        assert len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= budget
        seen.extend(chunk.tolist())
        return torch.tensor([float(10 * i) for i in chunk])

    scores = in_chunks(lengths, forward, token_budget=budget)
    assert scores.dtype == np.float32 and sorted(seen) == list(range(len(lengths)))
    assert scores.tolist() == [10.0 * i for i in range(len(lengths))]


@given(LENGTHS.filter(len), st.integers(40, 200), st.sampled_from(["gpu", "cpu", "python"]))
def test_where_memory_runs_out_smaller_chunks_are_tried(lengths, fits, where):
    errors = {
        "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        "python": MemoryError(),
    }

    def forward(chunk):
        if len(chunk) * max(lengths[i] for i in chunk) > fits:
            raise errors[where]
        return torch.tensor([float(i) for i in chunk])

    scores = in_chunks(lengths, forward, token_budget=10_000)
    assert scores.tolist() == [float(i) for i in range(len(lengths))]


def test_a_row_that_never_fits_and_errors_of_another_kind_are_raised():
    def no_memory(chunk):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        in_chunks([3, 3], no_memory, token_budget=100)

    def broken(chunk):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_chunks([3, 3], broken, token_budget=100)


@given(st.lists(st.sampled_from(["good", "raises", "nan", "inf"]), max_size=60), st.integers(1, 20))
def test_judge_finds_exactly_the_pairs_that_fail_and_scores_all_others(kinds, window):
    def score(queries, passages):
        assert len(queries) == len(passages) <= window
        if any(p.startswith("raises") for p in passages):
            raise ValueError("cannot read this")
        values = {"good": 1.0, "nan": np.nan, "inf": np.inf}
        return np.array([values[p.split()[0]] * int(p.split()[1]) for p in passages], dtype=np.float32)

    passages = [f"{kind} {n + 1}" for n, kind in enumerate(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "WINDOW", window)
        patch.setattr(pairs, "_HOPELESS", 10_000)
        scores, reasons = judge(score, ["q"] * len(kinds), passages)
    expected = {"raises": "failed", "nan": "not_finite", "inf": "not_finite"}
    assert {at: why for at, (why, _) in reasons.items()} == {
        at: expected[kind] for at, kind in enumerate(kinds) if kind != "good"
    }
    for at, kind in enumerate(kinds):
        assert scores[at] == at + 1 if kind == "good" else np.isnan(scores[at])
    assert all("cannot read this" in what for why, what in reasons.values() if why == "failed")


def test_one_pair_that_fails_costs_few_calls():
    sizes = []

    def score(queries, passages):
        sizes.append(len(queries))
        if "bad" in passages:
            raise ValueError
        return np.zeros(len(queries), dtype=np.float32)

    _, reasons = judge(score, ["q"] * 1024, ["bad" if n == 700 else "p" for n in range(1024)])
    assert list(reasons) == [700] and sum(sizes) <= 3 * 1024 and len(sizes) == 21


def test_a_model_that_judges_nothing_is_given_up_and_a_mistake_of_the_user_is_raised_at_once():
    calls = []

    def broken(queries, passages):
        calls.append(len(queries))
        raise ValueError("no such layer")

    with pytest.raises(UserError, match="no such layer"):
        judge(broken, ["q"] * 4096, ["p"] * 4096)
    assert calls.count(1) == pairs._HOPELESS

    def refused(queries, passages):
        calls.clear()
        raise UserError("the endpoint refuses the key")

    with pytest.raises(UserError, match="refuses the key"):
        judge(refused, ["q"] * 9, ["p"] * 9)


@pytest.mark.parametrize("last", [1, 31, 32, 5000])
def test_a_model_that_dies_on_the_way_is_given_up_and_its_pairs_are_no_bad_pairs(last):
    """However few pairs are left for it, and though it may have answered in an earlier call."""
    dead = []

    def score(queries, passages):
        if dead or "last" in passages:
            dead.append(len(queries))
            raise RuntimeError("the engine has died")
        return np.zeros(len(queries), dtype=np.float32)

    with pytest.raises(UserError, match="answers no more.*the engine has died"):
        judge(score, ["q"] * (4096 + last), ["p"] * 4096 + ["last"] * last)
    with pytest.raises(UserError, match="answers no more"):
        judge(score, ["q"], ["new"], answered=("q", "p"))


def test_memory_that_is_gone_for_good_shows_on_the_longest_pair():
    gone = []

    def score(queries, passages):
        if gone and max(map(len, passages)) > 4:
            raise MemoryError
        gone.extend(passages[-1:] if passages[-1] == "end" else [])
        return np.zeros(len(queries), dtype=np.float32)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="answers no more"):
        patch.setattr(pairs, "WINDOW", 3)
        judge(score, ["q"] * 6, ["a", "longest", "end", "b", "c", "longer"])


def test_many_bad_pairs_in_a_row_are_rejects_of_a_model_that_still_answers():
    def score(queries, passages):
        if "bad" in passages:
            raise ValueError
        return np.zeros(len(queries), dtype=np.float32)

    _, reasons = judge(score, ["q"] * 300, ["p"] * 100 + ["bad"] * 200)
    assert sorted(reasons) == list(range(100, 300))


@given(st.text(st.characters(codec=None), max_size=20))
def test_texts_reach_the_model_whole(text):
    found = whole(text)
    found.encode()
    assert len(found) == len(text)
    assert all(a == b or (b == "?" and "\ud800" <= a <= "\udfff") for a, b in zip(text, found, strict=True))


def test_rows_are_filled_up_on_one_side():
    ids, mask = padded([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = padded([[1, 2, 3], [4]], 9, torch.device("cpu"), left=True)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
