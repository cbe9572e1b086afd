"""Exact dense search: passages stream by, a fast product proposes, float64 ranks.

A product in float32 or bfloat16 has an error, and depends on the batch it is computed in. So whatever could
be in the top k by it and its largest possible error is scored again pair by pair in float64, and only that
ranks: the ranking and its scores are the same bits for any precision, number of shards and size of blocks.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_ray.runs import Ranking, exact_pairs

Vectors = npt.NDArray[np.floating]
Block = tuple[Sequence[str], Vectors]  # passage ids and their vectors_PD
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HELD = 65_536  # passages whose vectors are kept at hand until what they propose is scored in float64
_GROUP = 16  # passages whose highest score is looked at first
_RESCORED = 1024  # pairs that are scored in float64 at once


def block_sizes(device: str) -> tuple[int, int]:
    """Rows of a block of queries (Q) and of a tile of passages (T) that keep this device busy."""
    return (8192, 16_384) if device == "cuda" else (1024, 2048)


def peak_bytes(queries: int, tile: int, dimension: int, k: int) -> int:
    """What ``TopK`` holds at most for Q queries and tiles of T passages, ids excepted.

    16 D (Q + T)  the queries and a tile, as they come, as they are multiplied, and what rounding changed
    + 6 Q T       its scores and the highest of each group
    + 300 Q k     what was proposed, while it is sorted, and the running top k
    + 36 D R      R = 1,024 pairs while they are scored in float64
    + 2 D H       H = 65,536 passages that are still at hand in float16; nothing where they are mapped

    It does not grow with the corpus. Where the product cannot tell more than k passages from the k-th,
    100 bytes come on top for each in one tile, times its queries.
    """
    multiplied = 16 * dimension * (queries + tile) + 6 * queries * tile
    return multiplied + 300 * queries * k + 36 * dimension * _RESCORED + 2 * dimension * _HELD


class TopK:
    """The running top k of a block of queries over passages that come block by block.

    Memory is bounded by ``peak_bytes``. A passage or a query whose vector is not finite is left out.
    precision: of the product that proposes (float32 if not of ``PRECISIONS``); it changes no result.
    """

    def __init__(
        self, queries_QD: Vectors, k: int, *, device: str = "cpu", precision: str = "float32"
    ) -> None:
        self.k = k
        self._best = Best(queries_QD, k)
        self._device = torch.device(device)
        # cuBLAS may add partial sums in bfloat16, which no bound here covers
        cpu = self._device.type == "cpu"
        self._dtype = PRECISIONS.get(precision, torch.float32) if cpu else torch.float32
        self._queries_QD, self._norm_Q, self._wrong_Q = self._rounded([queries_QD])
        self._longest = self._most_wrong = 0.0  # of all passages: norm, and norm of what rounding changes
        # At most each query's k-th exact score, as far as that is known
        self._limit_Q = torch.full((len(queries_QD),), -torch.inf, device=self._device)
        self._limit_Q[~self._norm_Q.isfinite()] = torch.nan  # nothing is over it
        _, self._tile_rows = block_sizes(self._device.type)
        self._tile: list[Vectors] = []  # what is multiplied next
        self._filled = 0  # its rows
        self._held: list[Block] = []
        self._multiplied = 0  # rows of the held blocks
        self._proposed: list[tuple[Tensor, Tensor, Tensor]] = []  # query_N, row_N of the held, score_N
        self._waiting = 0  # how many they are

    def add(self, passage_ids: Sequence[str], vectors_PD: Vectors) -> None:
        """Search one block of passages; no id may come twice. Until ``_HELD`` rows came, it is held."""
        if not len(passage_ids) or not len(self._queries_QD) or self.k < 1:
            return
        self._held.append((passage_ids, vectors_PD))
        start = 0
        while start < len(passage_ids):
            self._tile.append(vectors_PD[start : start + self._tile_rows - self._filled])
            start, self._filled = start + len(self._tile[-1]), self._filled + len(self._tile[-1])
            if self._filled == self._tile_rows:
                self._propose()
        if self._multiplied >= _HELD:
            self._settle()

    def rankings(self) -> list[Ranking]:
        """The top k of each query so far, ties by passage_id."""
        self._settle()
        return self._best.rankings()

    def _rounded(self, vectors: Sequence[Vectors]) -> tuple[Tensor, Tensor, Tensor]:
        """As they are multiplied; the norm of each row, and of what rounding changes of it."""
        given_ND = torch.from_numpy(np.concatenate(vectors)).to(self._device)
        given_ND = given_ND.float() if given_ND.dtype == torch.float16 else given_ND
        rounded_ND = given_ND.to(self._dtype)
        norm_N = given_ND.norm(dim=1).float()
        exact = rounded_ND is given_ND
        wrong_N = torch.zeros_like(norm_N) if exact else (given_ND - rounded_ND).norm(dim=1).float()
        return rounded_ND, norm_N, wrong_N

    def _propose(self) -> None:
        """Multiply the tile, and note what may be in the top k."""
        padding = -self._filled % _GROUP
        tile_TD, norm_T, wrong_T = self._rounded(
            [*self._tile, np.zeros_like(self._tile[0], shape=(padding, self._queries_QD.shape[1]))]
        )
        broken_T = ~norm_T.isfinite()
        self._longest = max(self._longest, float(norm_T.masked_fill(broken_T, 0).max()))
        self._most_wrong = max(self._most_wrong, float(wrong_T.masked_fill(broken_T, 0).max()))
        broken_T[self._filled :] = True
        scores_TQ = tile_TD @ self._queries_QD.T
        if broken_T.any():
            scores_TQ[broken_T] = -torch.inf
        grouped_G16Q = scores_TQ.view(-1, _GROUP, len(self._queries_QD))
        highest_GQ = grouped_G16Q.amax(1)
        if self._filled >= self.k and (self._limit_Q == -torch.inf).any():
            best_NQ = highest_GQ if len(highest_GQ) >= 2 * self.k else scores_TQ
            kth_Q = best_NQ.T.contiguous().topk(self.k, dim=1).values[:, -1].float()
            self._limit_Q = self._limit_Q.maximum(self._lowest(kth_Q, self._error_Q()))
        enough_Q = self._enough_Q()
        group_N, query_N = (highest_GQ >= enough_Q).nonzero(as_tuple=True)
        scores_N16 = grouped_G16Q[group_N, :, query_N]
        hit_N, place_N = (scores_N16 >= enough_Q[query_N, None]).nonzero(as_tuple=True)
        row_N = self._multiplied + _GROUP * group_N[hit_N] + place_N
        self._proposed.append((query_N[hit_N], row_N, scores_N16[hit_N, place_N].float()))
        self._waiting += len(row_N)
        self._multiplied += self._filled
        self._tile, self._filled = [], 0
        if self._waiting > 2 * len(self._queries_QD) * self.k:
            self._prune()

    def _error_Q(self) -> Tensor:
        """How far a product may be from the exact score, its own rounding excepted.

        q p - q' p' = (q - q') p + q' (p - p'), and in any order of D sums in float32 at most
        (2 D + 8) 2^-24 |q'| |p'| more, which covers the rounding of a limit. A thousandth covers that of
        the norms.
        """
        sums = (2 * self._queries_QD.shape[1] + 8) * 2.0**-24
        wrong_Q = self._wrong_Q * self._longest + (self._norm_Q + self._wrong_Q) * self._most_wrong
        return 1.001 * (wrong_Q + sums * self._norm_Q * self._longest) + 1e-30

    def _lowest(self, score_N: Tensor, error_N: Tensor) -> Tensor:
        """What the exact score is at least; the product itself was rounded too."""
        return score_N - 0.51 * torch.finfo(self._dtype).eps * score_N.abs() - error_N

    def _enough_Q(self) -> Tensor:
        """The lowest product whose exact score may reach the limit: rounding keeps the order."""
        enough_Q = (self._limit_Q - self._error_Q()).to(self._dtype)
        return enough_Q.clamp(min=torch.finfo(self._dtype).min)  # NaN stays

    def _prune(self) -> None:
        """Raise the limits by what was proposed, and keep what is still over them."""
        query_N, row_N, score_N = (torch.cat(column) for column in zip(*self._proposed, strict=True))
        lowest_N = self._lowest(score_N, self._error_Q()[query_N])
        falling_N = (-lowest_N).view(torch.int32)
        falling_N ^= (falling_N >> 31) & 0x7FFFFFFF  # the order of the bits is now that of the numbers
        order_N = ((query_N << 32) + falling_N).argsort()  # one sort of integers: several times faster
        count_Q = query_N.bincount(minlength=len(self._queries_QD))
        enough = count_Q >= self.k
        kth = order_N[(count_Q.cumsum(0) - count_Q)[enough] + self.k - 1]
        self._limit_Q[enough] = self._limit_Q[enough].maximum(lowest_N[kth])
        keep_N = score_N >= self._enough_Q().float()[query_N]
        self._proposed = [(query_N[keep_N], row_N[keep_N], score_N[keep_N])]
        self._waiting = int(keep_N.sum())
        if self._waiting > 1.5 * len(self._queries_QD) * self.k:
            self._rank()

    def _settle(self) -> None:
        """Rank what the held blocks propose, and let go of them."""
        if self._filled:
            self._propose()
        if self._waiting:
            self._prune()
            self._rank()
        self._held, self._multiplied = [], 0

    def _rank(self) -> None:
        for query_N, row_N, _ in self._proposed:
            self._best.add(query_N.cpu().numpy(), row_N.cpu().numpy(), self._held)
        self._proposed, self._waiting = [], 0
        limit_Q = torch.from_numpy(self._best.limit_Q).to(self._device)
        self._limit_Q = self._limit_Q.maximum(limit_Q)


class Best:
    """The top k of each query among the pairs that were proposed: by float64 scores, ties by passage_id."""

    def __init__(self, queries_QD: Vectors, k: int) -> None:
        self.k = k
        self._queries_QD = queries_QD
        self.limit_Q = np.full(len(queries_QD), -np.inf, dtype=np.float32)  # the k-th score
        self._query = np.zeros(0, dtype=np.int64)  # pairs: of which query, which passage, its score
        self._passage = np.zeros(0, dtype=object)
        self._score = np.zeros(0, dtype=np.float64)

    def add(
        self, query_N: npt.NDArray[np.int64], row_N: npt.NDArray[np.int64], blocks: Iterable[Block]
    ) -> None:
        """Score these pairs, which never came before; rows count through the blocks from the first on."""
        order = np.argsort(row_N, kind="stable")
        query_N, row_N = query_N[order], row_N[order]
        passages: list[str] = []
        scores: list[npt.NDArray[np.float64]] = []
        scored = 0
        for ids, rows_ND in _gathered(row_N, blocks):
            passages += ids
            scores.append(exact_pairs(self._queries_QD[query_N[scored : len(passages)]], rows_ND))
            scored = len(passages)
        if scored:
            score_N = np.concatenate(scores)
            finite = np.isfinite(score_N)
            self._query = np.concatenate([self._query, query_N[finite]])
            self._passage = np.concatenate([self._passage, np.array(passages, dtype=object)[finite]])
            self._score = np.concatenate([self._score, score_N[finite]])
            self._cut()

    def rankings(self) -> list[Ranking]:
        starts = np.searchsorted(self._query, np.arange(len(self._queries_QD) + 1))
        return [
            list(zip(self._passage[a:b].tolist(), self._score[a:b].tolist(), strict=True))
            for a, b in zip(starts[:-1], starts[1:], strict=True)
        ]

    def _cut(self) -> None:
        """Sort the pairs and keep each query's first k."""
        order = np.lexsort((-self._score, self._query))
        query, score = self._query[order], self._score[order]
        equal = (query[1:] == query[:-1]) & (score[1:] == score[:-1])
        for start, stop in _runs(equal):
            order[start:stop] = sorted(order[start:stop], key=lambda n: str(self._passage[n]))
        place = np.arange(len(query)) - np.searchsorted(query, query)
        keep, last = place < self.k, place == self.k - 1
        self._query, self._score, self._passage = query[keep], score[keep], self._passage[order[keep]]
        self.limit_Q[query[last]] = score[last]


def search(
    blocks: Iterable[Block],
    queries_QD: Vectors,
    k: int,
    *,
    device: str = "cpu",
    precision: str = "float32",
) -> list[Ranking]:
    """The exact top k of each query over all blocks of passages, ties by passage_id.

    precision: of the product that proposes, bfloat16 where the device is fast in it; it changes no result.
    Blocks of any size may come; memory: ``peak_bytes``.
    """
    best = TopK(queries_QD, k, device=device, precision=precision)
    for passage_ids, vectors_PD in blocks:
        best.add(passage_ids, vectors_PD)
    return best.rankings()


def _gathered(row_N: npt.NDArray[np.int64], blocks: Iterable[Block]) -> Iterator[tuple[list[str], Vectors]]:
    """Ids and vectors of these rising rows, ``_RESCORED`` at a time."""
    ids: list[str] = []
    vectors: list[Vectors] = []
    start = first = 0
    for keys, vectors_PD in blocks:
        last = int(np.searchsorted(row_N, start + len(keys)))
        while first < last:
            place = row_N[first : min(last, first + _RESCORED - len(ids))] - start
            ids += [keys[p] for p in place.tolist()]
            vectors.append(vectors_PD[place])
            first += len(place)
            if len(ids) == _RESCORED:
                yield ids, np.concatenate(vectors)
                ids, vectors = [], []
        start += len(keys)
    if ids:
        yield ids, np.concatenate(vectors)


def _runs(equal: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of equal neighbours; ``equal[i]`` says whether i and i + 1 are."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield int(start), int(stop) + 1
