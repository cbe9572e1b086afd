"""What a training step holds, and how it is cut: all of it deterministic, none of it knows a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def epoch_batches(
    sizes: Sequence[int], batch: int, *, seed: int, epoch: int, seen: Sequence[int] = (), turn: int = 0
) -> list[tuple[int, Indices]]:
    """The batches of one epoch as (corpus, indices into its lists), the same for the same seed.

    Each batch holds one corpus only; corpora take turns until each is exhausted (method of the
    general CADET trainer). The last batch of a corpus is short rather than dropped, unless it would
    hold less than a quarter of a batch: then it is spread over the batches before it.
    seen, turn: how many lists of each corpus the epoch has had already, and the corpus whose turn it is;
    what is left of the epoch comes back, cut anew where the batch is of another size.
    """
    queues: list[list[Indices]] = []
    for corpus, size in enumerate(sizes):
        order = np.random.default_rng([seed, epoch, corpus]).permutation(size).astype(np.int64)
        left = order[seen[corpus] if seen else 0 :]
        whole, rest = divmod(len(left), batch)
        if whole and rest < batch / 4:
            queues.append(np.array_split(left, whole))
        else:
            queues.append([left[start : start + batch] for start in range(0, len(left), batch)])
    batches: list[tuple[int, Indices]] = []
    while any(queues):
        if queues[turn]:
            batches.append((turn, queues[turn].pop(0)))
        turn = (turn + 1) % len(queues)
    return batches


@dataclass(frozen=True)
class Unique:
    """The different passages of a batch of lists."""

    passage_ids: list[str]  # N
    index_BK: Indices  # where each list's passages stand among N
    counts_N: Indices  # in how many list places each stands

    @cached_property
    def position(self) -> dict[str, int]:
        """Where each passage stands among N."""
        return {passage: n for n, passage in enumerate(self.passage_ids)}


def unique_passages(lists: Sequence[Sequence[str]]) -> Unique:
    """Each different passage once, in the order of first appearance."""
    position: dict[str, int] = {}
    index_BK = np.array(
        [[position.setdefault(passage, len(position)) for passage in row] for row in lists],
        dtype=np.int64,
    )
    counts_N = np.bincount(index_BK.ravel(), minlength=len(position)).astype(np.int64)
    return Unique(list(position), index_BK, counts_N)


def excluded_mask(unique: Unique, excluded: Sequence[Sequence[str]]) -> npt.NDArray[np.bool_]:
    """excluded_BN: True where passage n of the batch is excluded for query b, by id."""
    position = unique.position
    mask_BN = np.zeros((len(excluded), len(position)), dtype=np.bool_)
    for b, ids in enumerate(excluded):
        mask_BN[b, [position[passage] for passage in ids if passage in position]] = True
    return mask_BN


def rectangular(rows: Sequence[Sequence[float] | npt.NDArray[np.floating]], fill: float) -> Floats:
    """The rows as one array, filled up to the longest."""
    found = np.full((len(rows), max(map(len, rows), default=0)), fill)
    for whole, row in zip(found, rows, strict=True):
        whole[: len(row)] = row
    return found


def judged_places(unique: Unique, judged: Sequence[Mapping[str, float]]) -> tuple[Indices, Floats]:
    """(place_BW, teacher_BW): for each query the passages of the batch that were judged for it, and scores.

    judged: passages and scores by query; W: the most that any query has in the batch. Rows are filled up with
    scores of minus infinity, of the batch's first passage.
    """
    position = unique.position
    rows = [[(position[p], score) for p, score in row.items() if p in position] for row in judged]
    place_BW = rectangular([[place for place, _ in row] for row in rows], 0).astype(np.int64)
    return place_BW, rectangular([[score for _, score in row] for row in rows], -np.inf)


def drawn(count: int, size: int, rng: np.random.Generator) -> Indices:
    """``size`` places of a list of ``count``: the first, and one of each even part of the others."""
    if size >= count:
        return np.arange(count)
    edges = np.linspace(1, count, size).round().astype(int)
    return np.concatenate([[0], rng.integers(edges[:-1], edges[1:])])


def cut_chunks(lengths: Sequence[int], token_budget: int, *, multiple: int = 1) -> list[Indices]:
    """Sort by length, then cut so that a chunk's rows times its longest row stay in the budget.

    Longest first, so that what does not fit in memory fails at once. A single row over the budget
    is a chunk of its own. Ties keep their order. multiple: the longest row counts as rounded up to one.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    chunks: list[list[int]] = []
    for i in order:
        longest = -(-lengths[chunks[-1][0]] // multiple) * multiple if chunks else 0
        if chunks and (len(chunks[-1]) + 1) * longest <= token_budget:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return [np.array(chunk, dtype=np.int64) for chunk in chunks]


def deal(costs: Sequence[int], workers: int) -> list[int]:
    """The owner of each chunk: the dearest first, each to the worker with the least so far."""
    load = [0] * workers
    owner = [0] * len(costs)
    for chunk in sorted(range(len(costs)), key=lambda c: (-costs[c], c)):
        least = min(range(workers), key=lambda worker: (load[worker], worker))
        owner[chunk] = least
        load[least] += costs[chunk]
    return owner
