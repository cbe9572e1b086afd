"""Approximate search for very large corpora: FAISS inverted files, with or without product quantisation.

An index proposes; what it proposes is ranked by the exact vectors. k-means is trained on one thread with
FAISS's own fixed seeds, so the same sample gives the same bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from retrieval_ray.runs import Ranking
from retrieval_ray.search import Best, Block, Vectors

POINTS_PER_CLUSTER = 39  # FAISS warns under it
_CODES = 256  # of one byte
KINDS = {"ivf": "IVF{nlist},SQfp16", "ivfpq": "IVF{nlist},PQ{pq_bytes}x8"}


@dataclass(frozen=True)
class Settings:
    """An index: vectors in float16 (``ivf``) or in ``pq_bytes`` bytes each (``ivfpq``)."""

    kind: str
    dimension: int
    nlist: int  # clusters
    nprobe: int  # clusters that a query looks into
    pq_bytes: int

    @property
    def sample(self) -> int:
        """How many passages it is trained on, at least."""
        return POINTS_PER_CLUSTER * max(self.nlist, _CODES if self.kind == "ivfpq" else 1)


def settings(
    kind: str,
    passages: int,
    dimension: int,
    *,
    nlist: int | None = None,
    nprobe: int | None = None,
    pq_bytes: int | None = None,
) -> Settings | None:
    """The index for a corpus, with what was not told; None where it is too small to train one.

    nlist: the power of two next to 4 sqrt(passages) (FAISS's guidelines), with at least 39 passages each.
    nprobe: a sixteenth of them, at least 8. pq_bytes: the largest divisor of the dimension that gives four
    dimensions a byte or more.
    """
    if nlist is None:
        nlist = 2 ** round(math.log2(4 * math.sqrt(max(1, passages))))
        nlist = max(1, min(nlist, passages // POINTS_PER_CLUSTER))
    nprobe = min(nlist, max(8, nlist // 16) if nprobe is None else nprobe)
    if pq_bytes is None:
        pq_bytes = max(n for n in range(1, max(1, dimension // 4) + 1) if dimension % n == 0)
    made = Settings(kind, dimension, nlist, nprobe, pq_bytes)
    return made if made.sample <= passages else None


def train(sample_ND: Vectors, how: Settings) -> bytes:
    """An empty index with its clusters, and its codes, from a sample of passages. Memory: 4 N D bytes."""
    faiss.omp_set_num_threads(1)
    name = KINDS[how.kind].format(nlist=how.nlist, pq_bytes=how.pq_bytes)
    index = faiss.index_factory(how.dimension, name, faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(sample_ND, dtype=np.float32))
    return bytes(faiss.serialize_index(index))


def fill(trained: bytes, blocks: Iterable[Block], path: str) -> int:
    """Write the index of these passages to a file: number n is the n-th of all blocks. Returns how many.

    Memory: the index, which is 2 D (``ivf``) or ``pq_bytes`` bytes and 8 for each passage, and one block.
    """
    faiss.omp_set_num_threads(1)
    index = faiss.deserialize_index(np.frombuffer(trained, dtype=np.uint8))
    for _, vectors_PD in blocks:
        index.add(np.ascontiguousarray(vectors_PD, dtype=np.float32))
    faiss.write_index(index, path)
    return int(index.ntotal)


class Index:
    """A filled index in a file, its lists mapped."""

    def __init__(self, path: str, nprobe: int, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self._index = faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        faiss.extract_index_ivf(self._index).nprobe = nprobe

    def propose(self, queries_QD: Vectors, width: int) -> npt.NDArray[np.int64]:
        """numbers_QW of the passages that seem nearest; -1 where there are fewer."""
        _, numbers_QW = self._index.search(np.ascontiguousarray(queries_QD, dtype=np.float32), width)
        found: npt.NDArray[np.int64] = numbers_QW
        return found


def ranked(
    proposed_QW: npt.NDArray[np.int64], blocks: Iterable[Block], queries_QD: Vectors, k: int
) -> list[Ranking]:
    """The top k of what was proposed to each query, by exact scores in float64, ties by passage_id.

    blocks: the passages that the numbers count, read once from the first to the last.
    """
    queries, columns = np.nonzero(proposed_QW >= 0)
    best = Best(queries_QD, k)
    best.add(queries, proposed_QW[queries, columns], blocks)
    return best.rankings()
