"""Tokens of many texts, made once, in a flat file that is mapped, not read; and how many teachers read."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import numpy.typing as npt

from retrieval_ray.ranks import once_a_machine, wait_for_all

Tokens = npt.NDArray[np.integer]
_AT_ONCE = 4096
_count: ContextVar[list[int] | None] = ContextVar("count", default=None)


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Tells how many tokens teachers have read since it was entered."""
    read = [0]
    before = _count.set(read)
    try:
        yield lambda: read[0]
    finally:
        _count.reset(before)


def count_read(tokens: int) -> None:
    """A teacher is about to read so many; nothing where nobody counts."""
    if (read := _count.get()) is not None:
        read[0] += tokens


class TokenRows(Mapping[str, Tokens]):
    """Rows of token ids by text id, as int32 in a temporary file that all ranks of a machine map.

    The first of them writes it, and reads the texts; so every rank makes the same rows, at the same time.
    ids: of texts; one given twice is kept once. tokenize: ids of some texts to their rows.
    """

    def __init__(self, ids: Iterable[str], tokenize: Callable[[Sequence[str]], Sequence[Tokens]]) -> None:
        wanted = sorted(set(ids))
        self._place = {text_id: n for n, text_id in enumerate(wanted)}
        folder = once_a_machine(lambda: _written(wanted, tokenize))
        self._ends = np.load(f"{folder}/ends.npy")
        empty = np.zeros(0, dtype=np.int32)  # no empty file can be mapped
        self._flat = np.memmap(f"{folder}/tokens", dtype=np.int32, mode="r") if self._ends[-1] else empty
        wait_for_all()  # now every rank has the file open, and it goes with the last of them
        shutil.rmtree(folder, ignore_errors=True)

    def __getitem__(self, text_id: str) -> Tokens:
        n = self._place[text_id]
        return self._flat[self._ends[n] : self._ends[n + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def _written(ids: Sequence[str], tokenize: Callable[[Sequence[str]], Sequence[Tokens]]) -> str:
    """The folder that the rows were written to, one behind the other, and where each ends."""
    folder = tempfile.mkdtemp(prefix="retrieval_ray-tokens-")
    ends = np.zeros(len(ids) + 1, dtype=np.int64)
    try:
        with open(f"{folder}/tokens", "wb") as file:
            for start in range(0, len(ids), _AT_ONCE):
                rows = tokenize(ids[start : start + _AT_ONCE])
                ends[start + 1 : start + 1 + len(rows)] = [len(row) for row in rows]
                file.write(b"".join(row.astype(np.int32).tobytes() for row in rows))
        np.save(f"{folder}/ends.npy", np.cumsum(ends))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
