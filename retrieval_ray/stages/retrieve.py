"""The retrieve stage: every query's ranking by each retriever, and the fused one.

Search runs shard by shard (a shard is a set of corpus parts), each worker with one shard in memory:
its size is vectors of the shard in float32 plus one part of queries times k. Partial rankings are
merged per part of queries.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from retrieval_ray import bm25, schema
from retrieval_ray.artifacts import Stage, part_name, stage
from retrieval_ray.runs import Ranking, fuse, merge, without_ids
from retrieval_ray.search import Shard
from retrieval_ray.stages.collection import Encoded, Ranked, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import Vectors, part_texts
from retrieval_ray.stages.ingest import duplicates
from retrieval_ray.stages.parts import run_parts

VERSION = 2
FUSED = "fused"


def run(context: Context, encoded: Encoded, retrievers: Sequence[str], note: str = "") -> Ranked:
    """Rank the corpus for every query by each retriever."""
    retrieved = _retrieve(context, encoded, retrievers, f"retrieval on '{encoded.name}'{note}")
    return extend(encoded, Ranked, retrievers=tuple(retrievers), retrieved=retrieved)


def _retrieve(context: Context, encoded: Encoded, retrievers: Sequence[str], label: str) -> Stage:
    config = context.config
    identity = {
        "version": VERSION,
        "corpus": encoded.corpus.content(),
        "queries": encoded.queries.content(),
        "passages": encoded.passages.content(),
        "query_vectors": encoded.query_vectors.content(),
        "retrievers": list(retrievers),
        "bm25": bm25.VERSION if "bm25" in retrievers else None,
        "depth": config.retrieve.depth,
        "rrf_k": config.retrieve.rrf_k,
        "exclude_same_id": config.evaluate.exclude_same_id,
    }
    target = stage(context.store, "retrieve", identity)
    if not context.start(target, label):
        return target
    buckets = int(encoded.queries.manifest()["buckets"])
    names = [part_name("run", number, "parquet") for number in range(buckets)]
    missing = [int(name.split("-")[1].split(".")[0]) for name in target.missing(names)]
    merged: list[dict[str, Any]] = []
    if missing:
        shards = min(config.compute.workers, int(encoded.passages.manifest()["buckets"]))
        run_parts(
            context,
            f"{label}: search",
            _Searcher,
            {"encoded": encoded, "target": target, "depth": config.retrieve.depth},
            [{"retriever": "dense", "shard": s, "shards": shards, "queries": missing} for s in range(shards)]
            + [{"retriever": "bm25", "queries": [number]} for number in missing if "bm25" in retrievers],
        )
        merged = run_parts(
            context,
            f"{label}: merge",
            _Merger,
            {
                "encoded": encoded,
                "target": target,
                "depth": config.retrieve.depth,
                "rrf_k": config.retrieve.rrf_k,
                "exclude_same_id": config.evaluate.exclude_same_id,
                "retrievers": list(retrievers),
                "shards": shards,
            },
            [{"number": number} for number in missing],
        )
    context.finish(
        target,
        names,
        rows=int(encoded.queries.manifest()["rows"]),
        worked=sum(f["queries"] for f in merged),
        buckets=buckets,
    )
    for name in target.folder.names():
        if name.startswith("partial-"):
            (target.folder / name).remove()
    return target


def rankings_of(retrieved: Stage, retriever: str) -> dict[str, Ranking]:
    """One retriever's rankings by query_id."""
    found: dict[str, Ranking] = defaultdict(list)
    table = schema.check(retrieved.read_all("run-"), "run", retrieved.folder.path)
    table = table.filter(pa.compute.equal(table.column("retriever"), retriever))
    columns = (table.column(name).to_pylist() for name in ("query_id", "passage_id", "score"))
    for query_id, passage_id, score in zip(*columns, strict=True):  # stored in the order of ranks
        found[query_id].append((passage_id, score))
    return dict(found)


def _partial(retriever: str, number: int, shard: int = 0, shards: int = 1) -> str:
    return f"partial-{retriever}-{shards}-{shard}-{number:05d}.parquet"


def _rows(rankings: dict[str, Ranking], retriever: str) -> pa.Table:
    rows: list[tuple[str, str, str, int, float]] = [
        (retriever, query_id, passage_id, rank, score)
        for query_id, ranking in rankings.items()
        for rank, (passage_id, score) in enumerate(ranking, start=1)
    ]
    columns: list[Any] = list(zip(*rows, strict=True)) if rows else [()] * 5
    names = schema.TABLES["run"].names
    return pa.table(dict(zip(names, map(list, columns), strict=True)), schema=schema.TABLES["run"])


def _search_depth(corpus: Stage, depth: int) -> int:
    """How deep to search, so that what training leaves out seldom shortens a ranking."""
    return depth + 1 + min(len(duplicates(corpus)), depth)


class _Searcher:
    def __init__(self, encoded: Encoded, target: Stage, depth: int) -> None:
        self.encoded, self.target = encoded, target
        self.depth = _search_depth(encoded.corpus, depth)
        self._bm25: bm25.Bm25 | None = None

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["retriever"] == "bm25":
            return self._search_bm25(int(part["queries"][0]))
        shard, shards = int(part["shard"]), int(part["shards"])
        names = {n: _partial("dense", n, shard, shards) for n in part["queries"]}
        missing = set(self.target.missing(names.values()))
        if missing:
            buckets = int(self.encoded.passages.manifest()["buckets"])
            vectors = Vectors(self.encoded.passages, list(range(shard, buckets, shards)))
            index = Shard(vectors.ids, vectors.matrix)
        for number, name in names.items():
            if name in missing:
                queries = Vectors(self.encoded.query_vectors, [number])
                rankings = index.search(queries.matrix, self.depth) if queries.ids else []
                found = dict(zip(queries.ids, rankings, strict=True))
                self.target.write(name, _rows(found, "dense"))
        return {}

    def _search_bm25(self, number: int) -> dict[str, Any]:
        name = _partial("bm25", number)
        if self.target.missing([name]):
            if self._bm25 is None:
                self._bm25 = bm25_of(self.encoded.corpus)
            ids, texts = part_texts(self.encoded.queries, number, "query")
            found = {
                query_id: self._bm25.search(text, self.depth)
                for query_id, text in zip(ids, texts, strict=True)
            }
            self.target.write(name, _rows(found, "bm25"))
        return {}


def bm25_of(corpus: Stage) -> bm25.Bm25:
    """The BM25 index of a corpus stage."""
    buckets = int(corpus.manifest()["buckets"])
    pairs = sorted(
        pair for number in range(buckets) for pair in zip(*part_texts(corpus, number, "passage"), strict=True)
    )
    return bm25.Bm25([key for key, _ in pairs], [text for _, text in pairs])


class _Merger:
    def __init__(
        self,
        encoded: Encoded,
        target: Stage,
        depth: int,
        rrf_k: int,
        exclude_same_id: bool,
        retrievers: list[str],
        shards: int,
    ) -> None:
        self.queries, self.target, self.depth, self.rrf_k = encoded.queries, target, depth, rrf_k
        self.retrievers, self.shards = retrievers, shards
        self.same_id = exclude_same_id
        self.duplicates = duplicates(encoded.corpus)
        self.search_depth = _search_depth(encoded.corpus, depth)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        table = self.queries.read(part_name("queries", number, "parquet"))
        splits = dict(
            zip(table.column("query_id").to_pylist(), table.column("split").to_pylist(), strict=True)
        )
        by_retriever: dict[str, dict[str, Ranking]] = {}
        for retriever in self.retrievers:
            shards = self.shards if retriever == "dense" else 1
            partial: dict[str, list[Ranking]] = defaultdict(list)
            for shard in range(shards):
                for query_id, ranking in self._read(_partial(retriever, number, shard, shards)):
                    partial[query_id].append(ranking)
            by_retriever[retriever] = {
                query_id: self._cleaned(query_id, split, partial.get(query_id, []))
                for query_id, split in splits.items()
            }
        if len(self.retrievers) > 1:
            by_retriever[FUSED] = {
                query_id: fuse(
                    [by_retriever[retriever][query_id] for retriever in self.retrievers],
                    self.depth,
                    rrf_k=self.rrf_k,
                )
                for query_id in splits
            }
        else:
            by_retriever[FUSED] = by_retriever[self.retrievers[0]]
        tables = [_rows(rankings, retriever) for retriever, rankings in by_retriever.items()]
        self.target.write(part_name("run", number, "parquet"), pa.concat_tables(tables))
        return {"queries": len(splits)}

    def _cleaned(self, query_id: str, split: str, partial: list[Ranking]) -> Ranking:
        """Training never sees duplicates; no query finds the passage with its own id."""
        left_out = {query_id} if self.same_id else set()
        if split == "train":
            left_out |= self.duplicates
        return without_ids(merge(partial, self.search_depth), left_out)[: self.depth]

    def _read(self, name: str) -> list[tuple[str, Ranking]]:
        table = self.target.read(name)
        found: dict[str, Ranking] = defaultdict(list)
        columns = (table.column(c).to_pylist() for c in ("query_id", "passage_id", "score"))
        for query_id, passage_id, score in zip(*columns, strict=True):
            found[query_id].append((passage_id, score))
        return list(found.items())
