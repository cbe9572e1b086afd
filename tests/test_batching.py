"""Epochs, unique passages and chunks: nothing lost, nothing twice, the same every time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.batching import (
    cut_chunks,
    deal,
    drawn,
    epoch_batches,
    excluded_mask,
    judged_places,
    rectangular,
    unique_passages,
)

SIZES = st.lists(st.integers(0, 60), max_size=4)
LENGTHS = st.lists(st.integers(1, 40), max_size=40)
LISTS = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(st.sampled_from("abcdefg"), min_size=k, max_size=k), max_size=6)
)


@given(SIZES, st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_holds_every_row_of_every_corpus_once(sizes, batch, seed, epoch):
    batches = epoch_batches(sizes, batch, seed=seed, epoch=epoch)
    rows = [(corpus, int(i)) for corpus, indices in batches for i in indices]
    assert sorted(rows) == [(corpus, i) for corpus, size in enumerate(sizes) for i in range(size)]


@given(SIZES, st.integers(1, 20), st.integers(0, 5))
def test_corpora_take_turns_until_each_is_exhausted(sizes, batch, seed):
    order = [corpus for corpus, _ in epoch_batches(sizes, batch, seed=seed, epoch=0)]
    left = {corpus: order.count(corpus) for corpus in range(len(sizes))}
    expected = []
    while any(left.values()):
        for corpus in range(len(sizes)):
            if left[corpus]:
                left[corpus] -= 1
                expected.append(corpus)
    assert order == expected


@given(st.integers(1, 300), st.integers(1, 40))
def test_batches_are_full_but_for_a_last_one_of_at_least_a_quarter(size, batch):
    lengths = [len(indices) for _, indices in epoch_batches([size], batch, seed=0, epoch=0)]
    if size % batch == 0 or size < batch:
        assert lengths == [batch] * (size // batch) or lengths == [size]
    elif size % batch >= batch / 4:
        assert lengths == [batch] * (size // batch) + [size % batch]
    else:  # the few left over are spread
        assert len(lengths) == size // batch and max(lengths) - min(lengths) <= 1


def test_epochs_depend_on_seed_epoch_and_corpus_and_on_nothing_else():
    def rows(sizes, **more):
        return [(corpus, indices.tolist()) for corpus, indices in epoch_batches(sizes, 8, **more)]

    assert rows([50, 50], seed=1, epoch=2) == rows([50, 50], seed=1, epoch=2)
    assert rows([50], seed=1, epoch=2) != rows([50], seed=2, epoch=1)
    assert rows([50], seed=1, epoch=2) != rows([50], seed=1, epoch=3)
    first, second = rows([8, 8], seed=1, epoch=2)
    assert first[1] != second[1]
    assert first == rows([8], seed=1, epoch=2)[0]  # another corpus beside it changes nothing


@given(SIZES.filter(any), st.integers(1, 20), st.integers(0, 5), st.data())
def test_an_epoch_goes_on_where_it_was(sizes, batch, seed, data):
    """With the same batches; and cut in other sizes with what is left, once each."""
    whole = epoch_batches(sizes, batch, seed=seed, epoch=1)
    done = data.draw(st.integers(0, len(whole)))
    seen = [sum(len(i) for corpus, i in whole[:done] if corpus == c) for c in range(len(sizes))]
    turn = (whole[done - 1][0] + 1) % len(sizes) if done else 0
    where = {"seed": seed, "epoch": 1, "seen": seen, "turn": turn}
    rest = [(corpus, i.tolist()) for corpus, i in epoch_batches(sizes, batch, **where)]
    assert rest == [(corpus, i.tolist()) for corpus, i in whole[done:]]
    other = data.draw(st.integers(1, 20))
    left = sorted((corpus, int(i)) for corpus, rows in whole[done:] for i in rows)
    assert sorted((c, int(i)) for c, rows in epoch_batches(sizes, other, **where) for i in rows) == left


@given(LISTS)
def test_unique_passages_give_the_lists_back(lists):
    unique = unique_passages(lists)
    assert len(set(unique.passage_ids)) == len(unique.passage_ids)
    assert [[unique.passage_ids[n] for n in row] for row in unique.index_BK] == lists
    flat = [passage for row in lists for passage in row]
    assert unique.counts_N.tolist() == [flat.count(passage) for passage in unique.passage_ids]


@given(LISTS.filter(bool), st.data())
def test_the_mask_is_by_id_over_the_whole_batch(lists, data):
    ids = st.lists(st.sampled_from("abcdefgxyz"), max_size=5)
    excluded = [data.draw(ids) for _ in lists]
    unique = unique_passages(lists)
    mask = excluded_mask(unique, excluded)
    for b, left_out in enumerate(excluded):
        assert mask[b].tolist() == [passage in left_out for passage in unique.passage_ids]


@given(LISTS.filter(bool), st.data())
def test_of_what_was_judged_the_batch_s_own_passages_are_found(lists, data):
    """Each with its score; behind them nothing but minus infinity."""
    more = st.dictionaries(st.sampled_from("abcdefgxyz"), st.floats(-5, 5), max_size=6)
    judged = [dict.fromkeys(row, 1.0) | data.draw(more) for row in lists]
    unique = unique_passages(lists)
    places, scores = judged_places(unique, judged)
    assert places.shape == scores.shape
    for row, at, found in zip(judged, places, scores, strict=True):
        there = {p: s for p, s in row.items() if p in unique.passage_ids}
        assert {unique.passage_ids[n]: s for n, s in zip(at, found, strict=True) if s > -math.inf} == there
        assert np.isinf(found).sum() == len(found) - len(there)


def test_rows_of_several_lengths_are_filled_up():
    assert rectangular([[1.0], [2.0, 3.0]], -1.0).tolist() == [[1.0, -1.0], [2.0, 3.0]]
    assert rectangular([], 0.0).shape == (0, 0)


@given(st.integers(1, 60), st.integers(2, 20), st.integers(0, 5))
def test_the_first_is_drawn_and_one_of_each_part_of_the_others(count, size, seed):
    places = drawn(count, size, np.random.default_rng(seed))
    assert places[0] == 0 and len(places) == min(size, count)
    assert all(a < b for a, b in zip(places, places[1:], strict=False)) and places[-1] < count
    if size < count:
        part = (count - 1) / (size - 1)
        assert all((n - 1) * part - 1 <= at - 1 < n * part + 1 for n, at in enumerate(places[1:], start=1))


def test_every_place_of_a_list_is_drawn_now_and_then():
    rng = np.random.default_rng(0)
    assert {int(n) for _ in range(300) for n in drawn(50, 8, rng)} == set(range(50))


@given(LENGTHS, st.integers(1, 120))
def test_chunks_hold_each_row_once_and_stay_in_the_budget_unless_a_single_row(lengths, budget):
    chunks = cut_chunks(lengths, budget)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= budget
    in_order = [lengths[i] for chunk in chunks for i in chunk]
    assert in_order == sorted(lengths, reverse=True)


@given(LENGTHS.filter(bool), st.integers(1, 120))
def test_no_chunk_could_have_taken_the_row_after_it(lengths, budget):
    chunks = cut_chunks(lengths, budget)
    for chunk, _ in zip(chunks, chunks[1:], strict=False):
        assert (len(chunk) + 1) * max(lengths[i] for i in chunk) > budget


@given(LENGTHS.filter(bool), st.integers(1, 120), st.integers(1, 9))
def test_with_rounded_lengths_a_chunk_holds_what_its_width_allows(lengths, budget, multiple):
    """As if each row had the rounded length, but for the order of rows that round alike."""
    chunks = cut_chunks(lengths, budget, multiple=multiple)
    rounded = [math.ceil(length / multiple) * multiple for length in lengths]
    assert [len(chunk) for chunk in chunks] == [len(chunk) for chunk in cut_chunks(rounded, budget)]
    in_order = [lengths[i] for chunk in chunks for i in chunk]
    assert in_order == sorted(lengths, reverse=True)


def test_rows_of_equal_length_keep_their_order():
    assert [chunk.tolist() for chunk in cut_chunks([5, 9, 5, 9, 5], 18)] == [[1, 3], [0, 2, 4]]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 6))
def test_workers_loads_differ_by_no_more_than_one_chunk(costs, workers):
    owner = deal(costs, workers)
    assert len(owner) == len(costs)
    load = np.bincount(owner, weights=costs, minlength=workers)
    assert len(load) == workers
    assert load.max() - load.min() <= max(costs, default=0)


@pytest.mark.parametrize(
    ("costs", "workers", "owner"),
    [([3, 3, 2, 2, 2], 2, [0, 1, 0, 1, 0]), ([1, 9], 3, [1, 0]), ([1, 9, 2, 3], 2, [1, 0, 1, 1])],
)
def test_dealing_by_hand(costs, workers, owner):
    assert deal(costs, workers) == owner
