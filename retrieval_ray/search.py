"""Exact dense search over one shard: FAISS finds candidates, float64 ranks them.

A float32 inner product depends on the batch it is computed in. Candidates are therefore rescored
pair by pair in float64, and the search is widened until no passage left out can belong in the top k.
So the ranking is the same for any number of shards.
"""

from collections.abc import Sequence

import faiss
import numpy as np
import numpy.typing as npt
import torch

from retrieval_ray.runs import Ranking, exact_dot, top_k

Vectors = npt.NDArray[np.floating]
_MARGIN = 32
_ERROR = 1e-4  # far above what float32 loses in a dot product of unit vectors


class Shard:
    """A flat inner-product index over passages, on the GPU where FAISS has one."""

    def __init__(self, passage_ids: Sequence[str], vectors_ND: Vectors) -> None:
        self.passage_ids = list(passage_ids)
        self.vectors_ND = vectors_ND
        faiss.omp_set_num_threads(torch.get_num_threads())
        index: faiss.Index = faiss.IndexFlatIP(vectors_ND.shape[1])
        if hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0:
            index = faiss.index_cpu_to_all_gpus(index)
        index.add(np.ascontiguousarray(vectors_ND, dtype=np.float32))
        self._index = index

    def search(self, queries_QD: Vectors, k: int) -> list[Ranking]:
        """The exact top k of each query in this shard, ties by passage_id."""
        if not self.passage_ids:
            return [[] for _ in queries_QD]
        rankings: list[Ranking | None] = [None] * len(queries_QD)
        open_queries = list(range(len(queries_QD)))
        width = k + _MARGIN
        while open_queries:
            width = min(width, len(self.passage_ids))
            scores_QW, found_QW = self._index.search(
                np.ascontiguousarray(queries_QD[open_queries], dtype=np.float32), width
            )
            unsure = []
            for row, query in enumerate(open_queries):
                positions = found_QW[row][found_QW[row] >= 0]  # FAISS fills up with -1
                exact = exact_dot(queries_QD[query], self.vectors_ND[positions])
                ranking = top_k([self.passage_ids[n] for n in positions], exact.tolist(), k)
                sure = width >= len(self.passage_ids) or (
                    len(ranking) == k and float(scores_QW[row][-1]) + _ERROR < ranking[-1][1]
                )
                if sure:
                    rankings[query] = ranking
                else:
                    unsure.append(query)
            open_queries, width = unsure, width * 4
        return [ranking or [] for ranking in rankings]
