"""Amounts by stage: counted by hand on small cases, and what must hold of any."""

import math

from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray import amounts
from retrieval_ray.amounts import Student, Workers
from retrieval_ray.batching import epoch_batches
from retrieval_ray.forecast import Rate, Work
from retrieval_ray.schedule import batch_size
from retrieval_ray.teachers.listwise import windows

MINILM = Student(dimension=384, layers=6, bytes=90e6)


def test_encoding_by_hand() -> None:
    work = amounts.encode(
        "query", 1000, MINILM, Rate(0.02, 5.0, 12.0), Workers(4, 0.5), at_most=True, note=", adapted"
    )
    assert (work.stage, work.label, work.unit) == ("encode-query", "encode queries, adapted", "queries")
    assert work.seconds == 5 + 1000 * 0.02 / 4 and work.tokens_in == 12_000
    assert work.stored == 1000 * (768 + 24)
    assert work.worker_hours == 10 * 4 / 3600


def test_pools_end_with_the_corpus() -> None:
    assert amounts.pairs(80, 640, 20) == 1600
    assert amounts.pairs(80, 7, 20) == 560
    assert amounts.late_texts(80, 640, 1600) == 720
    assert amounts.late_texts(80, 640, 100) == 180  # no more passages than pairs


def test_steps_and_texts_of_training() -> None:
    """797 lists in batches of 48: the demo's 17 steps an epoch."""
    work = amounts.train([797], 48, 2, 8, 1000, MINILM, Rate(0.1, 10.0), Rate(0.01), Workers(2, 0.0))
    assert work.rows == 2 * math.ceil(797 / 48)
    assert work.calls == 2 * 797 * 9 + 3 * 1000
    assert work.seconds == 10 + 2 * 797 * 9 * 0.1 / 2 + 3 * 1000 * 0.01 / 2
    assert amounts.held_out(885, 0.1, 500) == 88 and amounts.held_out(20_000, 0.1, 500) == 500


def test_windows_of_a_listwise_teacher() -> None:
    work = amounts.listwise(
        "llm", 10, 50, windows(50, 20, 10), passage_tokens=100, max_tokens=80, at_most=False
    )
    assert work.calls == 10 * 4 and work.rows == 500  # 30-50, 20-40, 10-30, 0-20
    assert work.tokens_in == 40 * 150 + 10 * 80 * 100
    assert work.tokens_out == min(40 * 80, 5 * 800) and work.paid and work.seconds is None


@given(st.integers(1, 200), st.integers(1, 60))
def test_refreshes_are_those_that_training_waits_for(steps: int, between: int) -> None:
    counted = 0
    for start in range(0, steps, between):  # as stages/train.py goes
        if start and start + between < steps:
            counted += 1
    assert amounts.refreshes(steps, between) == counted


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3), st.integers(1, 512), st.integers(1, 4))
def test_training_has_as_many_steps_as_its_batches(lists: list[int], batch: int, epochs: int) -> None:
    work = amounts.train(lists, batch, epochs, 8, 0, MINILM, Rate(1.0), Rate(1.0), Workers())
    size = batch_size(lists, batch)
    assert work.rows == epochs * len(epoch_batches(lists, size, seed=3, epoch=1))  # whatever the seed


def all_of(passages: int, queries: int, depth: int) -> list[Work]:
    rate, workers, pool = Rate(0.01, 1.0, 100.0), Workers(2, 1.0), min(depth, passages)
    pairs = amounts.pairs(queries, passages, depth)
    late = amounts.late_texts(queries, passages, pairs)
    return [
        amounts.corpus(passages, 600),
        amounts.queries(queries, at_most=True),
        amounts.encode("passage", passages, MINILM, rate, workers, at_most=False),
        amounts.retrieve(queries, passages, 2, 100, rate, workers, at_most=True),
        amounts.looked_up("bm25", "bm25", pairs, at_most=True),
        amounts.score("late", "late", pairs, late, rate, workers, at_most=True),
        amounts.groups(queries, pool, 20, at_most=True),
        amounts.train([queries], 48, 2, 20, passages, MINILM, rate, rate, workers),
        amounts.evaluate(queries, 4, 100, at_most=True),
        amounts.drift(min(300, queries), min(600, passages), MINILM, rate, workers),
        amounts.reranker(pairs, 1, queries, MINILM, rate, workers),
        amounts.kept(pairs, queries),
    ]  # fmt: skip


@given(
    st.integers(1, 10**8),
    st.integers(0, 10**8),
    st.integers(1, 10**5),
    st.integers(0, 10**5),
    st.integers(1, 99),
)
def test_more_passages_or_queries_never_mean_less(
    passages: int, more_passages: int, queries: int, more_queries: int, depth: int
) -> None:
    few = all_of(passages, queries, depth)
    many = all_of(passages + more_passages, queries + more_queries, depth)
    for one, other in zip(few, many, strict=True):
        for name in ("calls", "tokens_in", "tokens_out", "seconds", "stored"):
            assert getattr(one, name) <= getattr(other, name), (one.stage, name)
        if one.stage != "train":  # batches grow first: 15 lists make 15 steps, 16 make 8
            assert one.rows <= other.rows


def test_search_is_a_product_and_its_rows() -> None:
    dense = amounts.search_seconds(10**6, 384, ["dense"], 100, flops=1e9, bm25=1e-6)
    assert dense == 2 * 384 * 1e6 / 1e9 + 200 * 3.58e-6
    both = amounts.search_seconds(10**6, 384, ["dense", "bm25"], 100, flops=1e9, bm25=1e-6)
    assert math.isclose(both - dense, 1e6 * 1e-6 + 100 * 3.58e-6)


def test_a_share_of_the_lists_is_trained_in_batches_of_the_whole() -> None:
    """As ``stages/train.py`` makes them: 100 of 1,000 lists are 2 batches of about 48, not 9 of 12."""
    rate = Rate(1.0)
    assert amounts.train([100], 48, 1, 8, 0, MINILM, rate, rate, Workers(), share=0.1).rows == 2
    assert amounts.train([100], 48, 1, 8, 0, MINILM, rate, rate, Workers()).rows == 9
