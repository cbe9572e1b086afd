"""Rankings: top k, merging shards, reciprocal-rank fusion. Ties are broken by passage_id."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

Ranking = list[tuple[str, float]]  # (passage_id, score), best first


def top_k(passage_ids: Sequence[str], scores: Sequence[float], k: int) -> Ranking:
    """The k best passages, by score falling, then passage_id rising."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], passage_ids[i]))[:k]
    return [(passage_ids[i], float(scores[i])) for i in order]


def merge(rankings: Iterable[Ranking], k: int) -> Ranking:
    """The top k of the union of rankings over disjoint shards, each with its own top k."""
    rows = [row for ranking in rankings for row in ranking]
    return top_k([row[0] for row in rows], [row[1] for row in rows], k)


def fuse(rankings: Iterable[Ranking], k: int, *, rrf_k: int = 60) -> Ranking:
    """Reciprocal-rank fusion: a passage's score is the sum of 1 / (rrf_k + rank), rank from 1."""
    shares: dict[str, list[float]] = {}
    for ranking in rankings:
        for rank, (passage_id, _) in enumerate(ranking, start=1):
            shares.setdefault(passage_id, []).append(1.0 / (rrf_k + rank))
    scores = [math.fsum(parts) for parts in shares.values()]  # the same in any order of retrievers
    return top_k(list(shares), scores, k)


def without_ids(ranking: Ranking, dropped: set[str] | Mapping[str, object]) -> Ranking:
    """The ranking without these passages; ranks close up."""
    return [row for row in ranking if row[0] not in dropped]


def exact_dot(
    query_D: npt.NDArray[np.floating], passages_ND: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Dot products in float64, each pair by itself: the same number in any batch or shard."""
    return exact_pairs(query_D, passages_ND)


def exact_pairs(
    queries_ND: npt.NDArray[np.floating], passages_ND: npt.NDArray[np.floating]
) -> npt.NDArray[np.float64]:
    """Dot products of row n with row n in float64; the same numbers as ``exact_dot``'s."""
    half = passages_ND.dtype == queries_ND.dtype == np.float16
    wide = torch.float32 if half else torch.float64  # products of float16 are exact in float32 already
    products_ND = _tensor(passages_ND).to(wide) * _tensor(queries_ND).to(wide)
    summed: npt.NDArray[np.float64] = products_ND.double().numpy().sum(axis=1)
    return summed


def _tensor(vectors: npt.NDArray[np.floating]) -> torch.Tensor:
    """PyTorch widens float16 ten times as fast as NumPy; what it cannot write to, it gets a copy of."""
    return torch.from_numpy(np.require(vectors, requirements=["C", "W"]))
