"""Sums, money and the table against numbers counted by hand; what must hold of any."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.forecast import GIB, Ledger, Prices, Rate, Total, Work, compared, left, money, table

ENCODE = Work(
    "encode-passage", "encode passages", "passages", 1000, calls=1000, tokens_in=150_000, seconds=1800.0,
    workers=4, gpus=1.0, stored=2 * GIB,
)  # fmt: skip
ASK = Work(
    "generate", "generate", "requests", 500, calls=500, tokens_in=400_000, tokens_out=10_000, paid=True,
    seconds=None,
)  # fmt: skip
LISTS = Work("groups", "groups", "lists", 80, at_most=True, seconds=7.2)
PRICES = Prices(worker_hour=3.0, tokens_in_million=0.5, tokens_out_million=10.0, gib_month=0.25)

amount = st.floats(0, 1e12)
works = st.lists(
    st.builds(
        Work,
        stage=st.sampled_from(["encode-passage", "train", "score-late"]),
        label=st.sampled_from("abc"),
        unit=st.just("rows"),
        rows=amount,
        at_most=st.booleans(),
        calls=amount,
        tokens_in=amount,
        tokens_out=amount,
        paid=st.booleans(),
        seconds=st.none() | amount,
        workers=st.integers(1, 64),
        gpus=st.sampled_from([0.0, 0.5, 1.0]),
        stored=amount,
    ),
    max_size=6,
)


def test_totals_and_money_by_hand() -> None:
    total = Total.of([ENCODE, ASK, LISTS])
    assert total.gpu_hours == 2.0  # half an hour of four workers with a GPU each
    assert total.cpu_hours == pytest.approx(0.002)
    assert (total.calls, total.tokens_in, total.tokens_out) == (1500, 550_000, 10_000)
    assert total.at_most and total.unknown  # of lists, and of the endpoint's hours
    assert money(ENCODE, PRICES) == pytest.approx(4 * 0.5 * 3.0 + 2 * 0.25)  # its own tokens cost nothing
    assert money(ASK, PRICES) == pytest.approx(0.4 * 0.5 + 0.01 * 10)
    assert money(ENCODE, Prices(gib_month=0.25)) == 0.5
    assert money(ENCODE, Prices()) == 0


def test_a_table_with_what_is_done_unknown_and_at_most() -> None:
    lines = table([ENCODE, ENCODE.finished(), replace(LISTS, label="x").finished(), ASK, LISTS], PRICES)
    assert [line.split("  ")[0] for line in lines] == [
        "stage", "encode passages", "x", "generate", "groups", "total, at most",
    ]  # fmt: skip
    assert lines[1].split() == [
        "encode", "passages", "1,000", "passages", "1,000", "150,000", "2.000", "GPU", "2.0", "GiB", "6.50",
    ]  # fmt: skip
    assert lines[2].split() == ["x", "done"]
    assert "?" in lines[3] and "at most 80 lists" in lines[4]
    assert lines[5].split()[-4:] == ["?", "2.0", "GiB", "6.81"]
    assert not any("money" in line for line in table([ENCODE], Prices()))


@given(works, works)
def test_the_whole_is_the_sum_of_its_parts(one: list[Work], other: list[Work]) -> None:
    whole, parts = Total.of([*one, *other]), (Total.of(one), Total.of(other))
    for name in ("calls", "tokens_in", "tokens_out", "gpu_hours", "cpu_hours", "stored"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(part, name) for part in parts))
    assert whole.unknown == any(part.unknown for part in parts)
    assert whole.at_most == any(part.at_most for part in parts)
    assert money_of([*one, *other]) == pytest.approx(money_of(one) + money_of(other))
    assert len(table([*one, *other], PRICES)) == 2 + len({work.label for work in [*one, *other]})


@given(works, st.integers(0, 4))
def test_what_is_done_costs_nothing_and_more_done_never_costs_more(found: list[Work], done: int) -> None:
    before, after = left(found, {"train": done}), left(found, {"train": done + 1})
    assert money_of(after) <= money_of(before) <= money_of(found)
    assert sum(work.done for work in before) == min(done, sum(work.stage == "train" for work in found))
    assert money_of([work.finished() for work in found]) == 0


@given(st.floats(0, 1e6), st.floats(0, 100), st.integers(1, 64), st.floats(0, 1e9), st.floats(0, 1e9))
def test_more_rows_take_longer_and_more_workers_do_not(
    seconds: float, start: float, workers: int, some: float, more: float
) -> None:
    rate = Rate(seconds, start)
    few, many = (rate.of(rows, workers) or 0.0 for rows in sorted((some, more)))
    assert few <= many
    assert (rate.of(more, workers + 1) or 0.0) <= (rate.of(more, workers) or 0.0)
    assert Rate(None).of(more) is None


def money_of(found: list[Work]) -> float:
    return sum(money(work, PRICES) for work in found)


def test_how_close_it_came() -> None:
    found = compared(replace(ENCODE, seconds=900.0), {"rows": 1000, "seconds": 1350.0, "bytes": GIB})
    assert found["rows"] == {"foreseen": 1000, "happened": 1000, "ratio": 1.0}
    assert found["seconds"]["ratio"] == 1.5 and found["bytes"]["ratio"] == 0.5
    assert compared(ASK, {"seconds": 3.0})["seconds"] == {"foreseen": None, "happened": 3.0, "ratio": None}


def test_a_run_finds_its_stages_in_the_order_in_which_they_were_foreseen() -> None:
    """Base and adapted model; what one stage makes within another belongs to that one."""
    score, train = Work("score-late", "", "pairs", 10, stored=100), Work("train", "", "steps", 4)
    first, again = (Work("encode-passage", "", "passages", 5, stored=size) for size in (1, 2))
    queries = Work("encode-query", "", "queries", 3)
    ledger = Ledger([first, queries, score, train, again])
    ledger.reused("encode-passage")
    ledger.begun("encode-query", "q")
    found = ledger.ended("q", 7, {"rows": 3})
    assert found is not None and found["rows"]["ratio"] == 1.0
    ledger.begun("score-late", "s")
    ledger.begun("pool", "p")
    assert ledger.ended("p", 30, {"rows": 10}) is None  # not foreseen
    found = ledger.ended("s", 80, {"rows": 9})
    assert found is not None and found["bytes"] == {"foreseen": 100, "happened": 110, "ratio": 1.1}
    ledger.begun("train", "t")
    ledger.begun("encode-passage", "fresh")  # by a refresh, within training
    assert ledger.ended("fresh", 9, {"rows": 5}) is None
    assert ledger.ended("t", 1, {"rows": 4}) is not None
    ledger.begun("encode-passage", "a")
    found = ledger.ended("a", 2, {"rows": 5})
    assert found is not None and found["bytes"]["foreseen"] == 2
    ledger.begun("encode-passage", "more")  # than was foreseen
    assert ledger.ended("more", 2, {"rows": 5}) is None


def test_both_sides_of_encoding_are_worked_on_together() -> None:
    sides = [Work("encode-passage", "", "", 5), Work("encode-query", "", "", 3)]
    ledger = Ledger(sides)
    for side in sides:
        ledger.begun(side.stage, side.stage)
    assert [ledger.ended(side.stage, 0, {"rows": side.rows}) is not None for side in sides] == [True, True]
