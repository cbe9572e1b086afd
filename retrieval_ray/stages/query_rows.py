"""Single rows of tables that lie by part of queries, for workers that go through the corpus."""

import atexit
import functools
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from retrieval_ray.artifacts import Location, Stage, part_name

_OPEN = 256  # tables kept mapped at a time


class QueryRows:
    """Rows by (part, row) of a stage of Arrow parts, memory-mapped.

    Where the store is no disk, a part that is needed is copied to a temporary folder once by each worker.
    """

    def __init__(self, stage: Stage, prefix: str) -> None:
        self.stage, self.prefix = stage, prefix
        self._local: Location | None = None
        if not stage.folder.is_local:
            folder = tempfile.mkdtemp(prefix="retrieval_ray-rows-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            self._local = Location.of(folder)
        self._table = functools.lru_cache(maxsize=_OPEN)(self._mapped)

    def take(self, places: Iterable[tuple[int, int]], column: str) -> dict[tuple[int, int], pa.Array]:
        """One value of a column for each different place."""
        by_part: dict[int, list[int]] = defaultdict(list)
        for part, row in sorted(set(places)):
            by_part[part].append(row)
        found: dict[tuple[int, int], pa.Array] = {}
        for part, rows in by_part.items():
            values = self._table(part).column(column).combine_chunks().take(pa.array(rows))
            found.update(((part, row), value) for row, value in zip(rows, values, strict=True))
        return found

    def _mapped(self, number: int) -> pa.Table:
        name = part_name(self.prefix, number, "arrow")
        if self._local is None:
            return self.stage.read(name)
        if not Path((self._local / name).path).exists():
            (self._local / name).write((self.stage.folder / name).read())
        return (self._local / name).read_table()
