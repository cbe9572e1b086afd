"""Sorting on disk gives what ``sorted`` gives, in bounded memory."""

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray import sorting
from retrieval_ray.sorting import sort_on_disk

ROWS = st.lists(st.tuples(st.text("aé東\U0001f600", max_size=3), st.integers(-3, 3)), max_size=40)


@given(ROWS, st.integers(1, 1000))
@settings(max_examples=60, deadline=None)
def test_any_size_of_runs_gives_what_sorted_gives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], run_bytes: int
) -> None:
    folder = str(tmp_path_factory.mktemp("runs"))
    assert list(sort_on_disk(rows, folder, run_bytes=run_bytes)) == sorted(rows)


def test_more_runs_than_files_may_be_open_are_merged_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "_MOST_RUNS", 3)
    rows = [(n * 7919 % 500, str(n)) for n in range(500)]
    assert list(sort_on_disk(rows, str(tmp_path), run_bytes=2000)) == sorted(rows)


def test_few_rows_never_touch_the_disk(tmp_path: Path) -> None:
    assert list(sort_on_disk([("b", 1), ("a", 2)], str(tmp_path))) == [("a", 2), ("b", 1)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [10_000, 40_000])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, count: int) -> None:
    """Forty thousand rows are about 12 MiB of Python's objects; runs are 256 KiB."""
    rng = random.Random(0)

    def rows() -> Iterator[tuple[str, str]]:
        for n in range(count):
            yield f"{rng.random()} {'x' * 100}", f"p{n}"

    tracemalloc.start()
    try:
        last = ("", "")
        for row in sort_on_disk(rows(), str(tmp_path), run_bytes=2**18):
            assert last < row
            last = row
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()
