"""What searches in the retrieve stage's workers: a shard of passages for a few parts of queries at a time.

Each (retriever, shard, part of queries) becomes a partial ranking in the stage's folder. Memory of dense
search is ``search.peak_bytes`` and the ids of one shard, whatever the corpus; BM25 holds its whole index.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_ray import bm25, ivf, schema
from retrieval_ray.artifacts import Stage
from retrieval_ray.runs import Ranking
from retrieval_ray.search import search
from retrieval_ray.stages.encode import Vectors, part_texts
from retrieval_ray.stages.index import shard_name

CHECK = "exact"  # the name under which an index's sample of queries is searched exactly
CHECKED_QUERIES = 256
_WIDER = 4  # an index proposes this many times what is asked for, to be ranked exactly


class Searcher:
    """Writes partial rankings.

    dense: stages of passages and of queries by retriever. indexes: by retriever, where one is used.
    """

    def __init__(
        self,
        corpus: Stage,
        queries: Stage,
        dense: Mapping[str, tuple[Stage, Stage]],
        indexes: Mapping[str, tuple[Stage, ivf.Settings]],
        shards: Sequence[range],
        target: Stage,
        depth: int,
        device: str,
        precision: str,
        threads: int,
    ) -> None:
        self.corpus, self.queries, self.dense, self.indexes = corpus, queries, dense, indexes
        self.shards, self.target, self.depth = shards, target, depth
        self.threads = threads
        self.how = {"device": device, "precision": precision}  # of the product that proposes
        self._bm25: bm25.Bm25 | None = None

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        retriever, shard = str(part["retriever"]), int(part.get("shard", 0))
        if part.get("check"):
            self._check(retriever, shard, part["queries"])
            return {}
        of = len(self.shards) if retriever != "bm25" else 1
        names = {number: partial_name(retriever, shard, of, number) for number in part["queries"]}
        missing = set(self.target.missing(names.values()))
        numbers = [number for number, name in names.items() if name in missing]
        if not numbers:
            return {}
        if retriever == "bm25":
            for number in numbers:
                self._write(names[number], self._by_terms(number), retriever)
            return {}
        every = Vectors(self.dense[retriever][1], [])
        vectors = [every.part(number) for number in numbers]
        queries_QD = np.concatenate([each.matrix for each in vectors])
        rankings = iter(self._nearest(retriever, shard, queries_QD))
        for number, each in zip(numbers, vectors, strict=True):
            found = dict(zip(each.ids, itertools.islice(rankings, len(each.ids)), strict=True))
            self._write(names[number], found, retriever)
        return {}

    def _check(self, retriever: str, shard: int, numbers: Sequence[int]) -> None:
        """The exact ranking of the first queries of these parts."""
        name = partial_name(retriever, shard, len(self.shards), CHECK)
        if not self.target.missing([name]):
            return
        vectors = Vectors(self.dense[retriever][1], numbers)
        sample_QD = vectors.matrix[:CHECKED_QUERIES]
        rankings = search(self._blocks(retriever, shard).blocks(), sample_QD, self.depth, **self.how)
        found = dict(zip(vectors.ids[:CHECKED_QUERIES], rankings, strict=True))
        self._write(name, found, retriever)

    def _nearest(self, retriever: str, shard: int, queries_QD: npt.NDArray[np.floating]) -> list[Ranking]:
        passages = self._blocks(retriever, shard)
        if retriever not in self.indexes or not len(queries_QD):
            return search(passages.blocks(), queries_QD, self.depth, **self.how)
        stage, how = self.indexes[retriever]
        name = shard_name(shard)
        hashes = {} if stage.folder.is_local else stage.manifest()["parts"]
        path = (stage.folder / name).near(hashes.get(name, "")).path
        proposed_QW = ivf.Index(path, how.nprobe, self.threads).propose(queries_QD, _WIDER * self.depth)
        return ivf.ranked(proposed_QW, passages.blocks(), queries_QD, self.depth)

    def _blocks(self, retriever: str, shard: int) -> Vectors:
        return Vectors(self.dense[retriever][0], list(self.shards[shard]))

    def _by_terms(self, number: int) -> dict[str, Ranking]:
        if self._bm25 is None:
            self._bm25 = bm25_of(self.corpus)
        ids, texts = part_texts(self.queries, number, "query")
        return {key: self._bm25.search(text, self.depth) for key, text in zip(ids, texts, strict=True)}

    def _write(self, name: str, rankings: Mapping[str, Ranking], retriever: str) -> None:
        self.target.write(name, run_table(rankings, retriever))


def partial_name(retriever: str, shard: int, of: int, number: int | str) -> str:
    """The file of a partial ranking; number: the part of queries, or ``CHECK``."""
    return f"partial-{retriever}-{shard:03d}of{of:03d}-{number:>05}.parquet"


def run_table(rankings: Mapping[str, Ranking], retriever: str) -> pa.Table:
    """Rankings by query_id as a run table."""
    counts = [len(ranking) for ranking in rankings.values()]
    columns = {
        "retriever": pa.repeat(retriever, sum(counts)),
        "query_id": pa.array(rankings.keys(), pa.string()).take(
            pa.array(np.repeat(np.arange(len(counts)), counts))
        ),
        "passage_id": [passage_id for ranking in rankings.values() for passage_id, _ in ranking],
        "rank": [rank for count in counts for rank in range(1, count + 1)],
        "score": [score for ranking in rankings.values() for _, score in ranking],
    }
    return pa.table(columns, schema=schema.TABLES["run"])


def bm25_of(corpus: Stage) -> bm25.Bm25:
    """The BM25 index of a corpus stage."""
    parts = range(int(corpus.manifest()["buckets"]))
    ids = [key for number in parts for key in part_texts(corpus, number, "passage")[0]]
    texts = (text for number in parts for text in part_texts(corpus, number, "passage")[1])
    return bm25.Bm25(ids, texts)
