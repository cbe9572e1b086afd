"""Warm-up, decay and batch size against the papers' formulas (method: CADET's hyper-parameters)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.batching import epoch_batches
from retrieval_ray.schedule import batch_size, learning_rate_scale

CADET = {"min_warmup_steps": 10, "floor": 0.1}


def _scales(per_epoch, epochs, **more):
    steps = per_epoch * epochs
    return [
        learning_rate_scale(step, steps_per_epoch=per_epoch, steps=steps, **{**CADET, **more})
        for step in range(steps)
    ]


def test_the_schedule_of_the_paper_by_hand():
    """40 steps an epoch, 2 epochs: warm-up 20 = half an epoch, decay over the 60 steps that are left."""
    scales = _scales(40, 2)
    assert scales[:20] == pytest.approx([n / 20 for n in range(1, 21)])
    assert scales[20:75] == pytest.approx([1 - n / 60 for n in range(55)])
    assert scales[75:] == [0.1] * 5
    assert _scales(8, 30)[:10] == pytest.approx([n / 10 for n in range(1, 11)])  # 10 are more than half of 8


@given(st.integers(1, 50), st.integers(1, 30), st.integers(0, 30), st.floats(0, 1))
def test_it_rises_to_the_peak_once_then_falls_to_its_floor(per_epoch, epochs, warmup, floor):
    scales = _scales(per_epoch, epochs, min_warmup_steps=warmup, floor=floor)
    peak = max(warmup, per_epoch // 2)
    assert all(0 < scale <= 1 for scale in scales[:peak]) and scales[:peak] == sorted(scales[:peak])
    after = scales[peak:]
    assert after == sorted(after, reverse=True) and all(floor <= scale <= 1 for scale in after)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4).filter(any), st.integers(1, 4096))
def test_no_corpus_trains_zero_steps(sizes, wanted):
    """The papers' code drops what does not fill a batch, and divides by zero."""
    batch = batch_size(sizes, wanted)
    assert 1 <= batch <= wanted
    assert batch == wanted or batch == max(1, sum(sizes) // 8)
    trained = {corpus for corpus, _ in epoch_batches(sizes, batch, seed=0, epoch=1)}
    assert trained == {corpus for corpus, size in enumerate(sizes) if size}
    assert len(epoch_batches(sizes, batch, seed=0, epoch=1)) >= min(8, sum(sizes)) // 2


def test_a_batch_is_scaled_down_to_an_eighth_of_what_there_is():
    assert batch_size([4096 * 8], 4096) == 4096
    assert batch_size([4096 * 8 - 1], 4096) == 4095
    assert batch_size([800, 0, 10], 4096) == 101
