"""Exact dense search: passages stream by in blocks, float32 proposes, float64 ranks.

A float32 inner product depends on the batch it is computed in. So whatever could be in the top k by
float32 and its largest possible error is scored again pair by pair in float64, and only that ranks:
the ranking is the same for any number of shards and any size of blocks.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from retrieval_ray.runs import Ranking, exact_pairs

Vectors = npt.NDArray[np.floating]
Block = tuple[Sequence[str], Vectors]  # passage ids and their vectors_PD
_RESCORED = 4096  # pairs that are scored in float64 at once
_LOWEST = torch.finfo(torch.float32).min


def block_sizes(device: str) -> tuple[int, int]:
    """Rows of a block of queries (Q) and of one of passages (P) that keep this device busy."""
    return (8192, 65_536) if device == "cuda" else (1024, 8192)


def peak_bytes(queries: int, passages: int, dimension: int, k: int) -> int:
    """What ``TopK`` holds at most for blocks of Q queries and P passages, ids excepted.

    4 D (3 Q + 2 P)  both blocks in float32, the queries in float64, the passages as they came
    + 9 Q P          their scores, those of queries without k passages yet, and which are high enough
    + 160 Q k        the running top k and as many new candidates, while they are sorted
    + R (32 D + 80)  R = 4,096 candidates while they are scored in float64

    It does not grow with the corpus. Where more than Q k passages of a block tie within float32's error,
    16 bytes for each come on top.
    """
    blocks = 4 * dimension * (3 * queries + 2 * passages) + 9 * queries * passages
    return blocks + 160 * queries * k + _RESCORED * (32 * dimension + 80)


class TopK:
    """The running top k of a block of queries over passages that come block by block.

    Memory is bounded by ``peak_bytes``. A passage whose scores are not finite is left out.
    """

    def __init__(self, queries_QD: Vectors, k: int, *, device: str = "cpu") -> None:
        self.k = k
        self._queries64_QD = queries_QD.astype(np.float64)
        self._device = torch.device(device)
        self._queries32_QD = _float32(queries_QD, self._device)
        self._norm_Q = self._queries32_QD.norm(dim=1)
        self._limit_Q = torch.full((len(queries_QD),), _LOWEST, device=self._device)
        self._query = np.zeros(0, dtype=np.int64)  # candidates: of which query, which passage, its score
        self._passage = np.zeros(0, dtype=object)
        self._score = np.zeros(0, dtype=np.float64)
        self._kept = 0  # candidates that were left by the last sort

    def add(self, passage_ids: Sequence[str], vectors_PD: Vectors) -> None:
        """Search one block of passages; no id may come twice."""
        if not len(passage_ids) or not len(self._queries64_QD) or self.k < 1:
            return
        passages_PD = _float32(vectors_PD, self._device)
        longest = passages_PD.norm(dim=1).nan_to_num(0.0, 0.0).max()
        # Any summation order: |error| <= (D + 4) 2^-24 |q| |p| (two roundings of inputs among them)
        error_Q = (passages_PD.shape[1] + 4) * 2.0**-24 * self._norm_Q * longest + 1e-30
        scores_QP = self._queries32_QD @ passages_PD.T
        limit_Q = self._limit_Q - error_Q
        unfilled = (self._limit_Q <= _LOWEST).nonzero().squeeze(1)
        if len(unfilled) and len(passage_ids) >= self.k:
            scores_QP.nan_to_num_(_LOWEST, _LOWEST, _LOWEST)  # topk takes NaN for the highest
            scores_UP = scores_QP if len(unfilled) == len(scores_QP) else scores_QP[unfilled]
            kth_U = scores_UP.topk(self.k, dim=1).values[:, -1]
            limit_Q[unfilled] = kth_U - 2 * error_Q[unfilled]
            del scores_UP
        limit_Q.clamp_(min=_LOWEST)
        found_N2 = (scores_QP >= limit_Q[:, None]).nonzero().cpu().numpy()
        exact = vectors_PD.dtype == np.float64 or passages_PD.device.type != "cpu"
        rows_PD = vectors_PD if exact else passages_PD.numpy()  # float16 is slow to convert
        del scores_QP
        ids = np.asarray(passage_ids, dtype=object)
        for start in range(0, len(found_N2), _RESCORED):
            query, position = found_N2[start : start + _RESCORED].T
            score = exact_pairs(self._queries64_QD[query], rows_PD[position])
            finite = np.isfinite(score)
            self._query = np.concatenate([self._query, query[finite]])
            self._passage = np.concatenate([self._passage, ids[position[finite]]])
            self._score = np.concatenate([self._score, score[finite]])
            if len(self._score) > self._kept + max(_RESCORED, len(self._queries64_QD) * self.k):
                self._sort()
        if self._limit_stale():
            self._sort()

    def rankings(self) -> list[Ranking]:
        """The top k of each query so far, ties by passage_id."""
        self._sort()
        starts = np.searchsorted(self._query, np.arange(len(self._queries64_QD) + 1))
        return [
            list(zip(self._passage[a:b].tolist(), self._score[a:b].tolist(), strict=True))
            for a, b in zip(starts[:-1], starts[1:], strict=True)
        ]

    def _limit_stale(self) -> bool:
        """Whether sorting now would shorten later blocks' lists much."""
        return self._kept < len(self._queries64_QD) * self.k or len(self._score) > 1.25 * self._kept

    def _sort(self) -> None:
        """Sort the candidates, keep each query's first k, and raise the limits to its k-th score."""
        order = np.lexsort((-self._score, self._query))
        query, score = self._query[order], self._score[order]
        equal = (query[1:] == query[:-1]) & (score[1:] == score[:-1])
        for start, stop in _runs(equal):
            order[start:stop] = sorted(order[start:stop], key=lambda n: str(self._passage[n]))
        place = np.arange(len(query)) - np.searchsorted(query, query)
        keep = place < self.k
        self._query, self._score, self._passage = query[keep], score[keep], self._passage[order[keep]]
        self._kept = len(self._score)
        last = place == self.k - 1
        limit_Q = self._limit_Q.cpu().numpy().copy()
        below = np.nextafter(score[last].astype(np.float32), np.float32(-np.inf))  # rounded down
        limit_Q[query[last]] = below
        self._limit_Q = torch.from_numpy(limit_Q).to(self._device)


def search(blocks: Iterable[Block], queries_QD: Vectors, k: int, *, device: str = "cpu") -> list[Ranking]:
    """The exact top k of each query over all blocks of passages, ties by passage_id.

    Blocks of any size may come, small ones are joined; memory: ``peak_bytes``.
    """
    _, rows = block_sizes(device)
    best = TopK(queries_QD, k, device=device)
    for passage_ids, vectors_PD in joined(blocks, rows):
        best.add(passage_ids, vectors_PD)
    return best.rankings()


def joined(blocks: Iterable[Block], rows: int) -> Iterator[Block]:
    """The same passages in blocks of ``rows`` rows, the last one shorter."""
    waiting: list[Block] = []
    count = 0
    for ids, vectors_PD in blocks:
        start = 0
        while start < len(ids):
            taken = min(rows - count, len(ids) - start)
            waiting.append((ids[start : start + taken], vectors_PD[start : start + taken]))
            start, count = start + taken, count + taken
            if count == rows:
                yield _concatenated(waiting)
                waiting, count = [], 0
    if waiting:
        yield _concatenated(waiting)


def _concatenated(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    return [key for ids, _ in blocks for key in ids], np.concatenate([vectors for _, vectors in blocks])


def _float32(vectors: Vectors, device: torch.device) -> torch.Tensor:
    """As float32 on the device; float16 travels as it is. A copy: mapped files cannot be written to."""
    return torch.from_numpy(np.array(vectors, order="C")).to(device).float()


def _runs(equal: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of equal neighbours; ``equal[i]`` says whether i and i + 1 are."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield int(start), int(stop) + 1
