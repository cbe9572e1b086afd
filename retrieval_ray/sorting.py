"""Sort more rows than memory holds: sorted runs on disk, then merged (Knuth, TAOCP vol. 3, section 5.4)."""

import heapq
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa

RUN_BYTES = 64 * 2**20
_MOST_RUNS = 100  # open files of one merge
_STEPS = 100  # a run is read back in about so many steps

Row = TypeVar("Row", bound=tuple[Any, ...])


def sort_on_disk(rows: Iterable[Row], folder: str, *, run_bytes: int = RUN_BYTES) -> Iterator[Row]:
    """The rows in ascending order, as ``sorted`` gives them; fewer than ``run_bytes`` never leave memory.

    rows: tuples of text and whole numbers, all of the same types. folder: a place for temporary files,
    which stay there and are about as large as the rows. Memory: ``run_bytes``, counted as Python's objects,
    and as much again at most to merge.
    """
    runs: list[str] = []
    held: list[Row] = []
    size = 0
    for row in rows:
        held.append(row)
        size += sys.getsizeof(row) + sum(map(sys.getsizeof, row))
        if size >= run_bytes:
            if len(runs) == _MOST_RUNS:
                runs = [_write(heapq.merge(*map(_read, runs)), folder, len(held) // _STEPS + 1)]
            held.sort()
            runs.append(_write(held, folder, len(held) // _STEPS + 1))
            held.clear()
            size = 0
    held.sort()
    yield from heapq.merge(*map(_read, runs), held)


def _write(rows: Iterable[Row], folder: str, step: int) -> str:
    """Write a run, so many rows at a time; where it lies."""
    left, writer = iter(rows), None
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        while some := list(islice(left, step)):
            columns = enumerate(zip(*some, strict=True))
            batch = pa.record_batch({str(n): list(column) for n, column in columns})
            writer = writer or pa.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        if writer:
            writer.close()
    return file.name


def _read(run: str) -> Iterator[Any]:
    with pa.OSFile(run) as file:
        for batch in pa.ipc.open_stream(file):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
