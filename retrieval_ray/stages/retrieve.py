"""The retrieve stage: every query's ranking by each retriever, and the fused one.

Work is cut into shards of passages and blocks of queries, whatever the number of workers; a worker holds
one block of each (searchers.py). Partial rankings are then merged per part of queries.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from retrieval_ray import bm25, ivf, schema
from retrieval_ray.artifacts import Stage, each, part_name, stage
from retrieval_ray.progress import say
from retrieval_ray.runs import Ranking, fuse, merge, without_ids
from retrieval_ray.search import block_sizes
from retrieval_ray.stages import index
from retrieval_ray.stages.collection import Encoded, Ranked, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.ingest import duplicates
from retrieval_ray.stages.parts import run_parts, small
from retrieval_ray.stages.searchers import (
    CHECK,
    CHECKED_QUERIES,
    Searcher,
    bm25_of,
    partial_name,
    run_table,
)

__all__ = ["FUSED", "bm25_of", "rankings_in", "rankings_of", "run"]
VERSION = 3
FUSED = "fused"
_PART_ROWS = 512  # about as many queries as a part holds


def run(
    context: Context,
    encoded: Encoded,
    retrievers: Sequence[str],
    note: str = "",
    *,
    others: Stage | None = None,
) -> Ranked:
    """Rank the corpus for every query by each retriever.

    others: an earlier retrieve stage of the same corpus and queries; every ranking but the student's is
    taken from there.
    """
    retrieved = _retrieve(context, encoded, retrievers, f"retrieval on '{encoded.name}'{note}", others)
    return extend(encoded, Ranked, retrievers=tuple(retrievers), retrieved=retrieved)


def _retrieve(
    context: Context, encoded: Encoded, retrievers: Sequence[str], label: str, others: Stage | None
) -> Stage:
    config = context.config
    searched = list(retrievers) if others is None else ["dense"]
    dense = {name: _vectors(encoded, name) for name in searched if name != "bm25"}
    made = {name: index.run(context, encoded.name, dense[name][0], f"{label}: {name}") for name in dense}
    indexes = {name: built for name, built in made.items() if built is not None}
    identity = {
        "version": VERSION,
        "corpus": encoded.corpus.content(),
        "queries": encoded.queries.content(),
        "vectors": {name: [stage.content() for stage in stages] for name, stages in dense.items()},
        "indexes": {name: asdict(how) for name, (_, how) in indexes.items()},
        "retrievers": list(retrievers),
        "bm25": bm25.VERSION if "bm25" in retrievers else None,
        "depth": config.retrieve.depth,
        "rrf_k": config.retrieve.rrf_k,
        "exclude_same_id": config.evaluate.exclude_same_id,
        **({"others": others.content()} if others else {}),
    }
    target = stage(context.store, "retrieve", identity)
    if not context.start(target, label):
        return target
    buckets = int(encoded.queries.manifest()["buckets"])
    names = [part_name("run", number, "parquet") for number in range(buckets)]
    absent = set(target.missing(names))
    missing = [number for number, name in enumerate(names) if name in absent]
    shards = index.shards_of(encoded.passages)
    if not indexes:  # an index is a file a shard
        passages = int(encoded.passages.manifest()["rows"])
        shards = index.joined(shards, passages, -(-buckets // _parts_a_block(context)))
    depth = _search_depth(encoded.corpus, config.retrieve.depth)
    checked = _checked(encoded.queries) if indexes else []
    if missing:
        units = _units(context, searched, len(shards), missing)
        units += [
            {"retriever": name, "shard": shard, "queries": checked, "check": True}
            for name in indexes
            for shard in range(len(shards))
        ]
        run_parts(
            context,
            f"{label}: search",
            Searcher,
            {
                "corpus": encoded.corpus,
                "queries": encoded.queries,
                "dense": dense,
                "indexes": indexes,
                "shards": shards,
                "target": target,
                "depth": depth,
                "device": context.profile.device,
                "precision": context.profile.precision,
                "threads": context.profile.threads,
            },
            units,
            light=small(encoded.corpus) and context.profile.device == "cpu",
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
            "shards": len(shards),
            "others": others,
        },
        [{"number": number} for number in missing],
        gpus=False,
        light=True,
    )
    recall = {name: _recall(target, name, len(shards), checked, depth) for name in indexes}
    for name, value in recall.items():
        _tell(name, indexes[name][1], value, config.retrieve.min_recall)
    context.finish(
        target,
        names,
        rows=int(encoded.queries.manifest()["rows"]),
        worked=sum(f["queries"] for f in merged),
        collection=encoded.name,
        buckets=buckets,
        shards=len(shards),
        index={name: asdict(how) | {"recall": recall[name]} for name, (_, how) in indexes.items()},
    )
    for name in target.folder.names():
        if name.startswith("partial-"):
            (target.folder / name).remove()
    return target


def _vectors(encoded: Encoded, retriever: str) -> tuple[Stage, Stage]:
    """A dense retriever's stages of passages and of queries."""
    if retriever == "dense":
        return encoded.passages, encoded.query_vectors
    return encoded.more_passages[retriever], encoded.more_query_vectors[retriever]


def _units(
    context: Context, retrievers: Sequence[str], shards: int, missing: Sequence[int]
) -> list[dict[str, Any]]:
    """What a worker does at a time: BM25 a part of queries, dense retrievers a shard for a block of them."""
    size = _parts_a_block(context)
    blocks = [list(missing[start : start + size]) for start in range(0, len(missing), size)]
    return [
        {"retriever": name, "shard": shard, "queries": block}
        for name in retrievers
        if name != "bm25"
        for shard in range(shards)
        for block in blocks
    ] + [{"retriever": "bm25", "queries": [number]} for number in missing if "bm25" in retrievers]


def _parts_a_block(context: Context) -> int:
    """Parts of queries that are searched together."""
    rows, _ = block_sizes(context.profile.device)
    return max(1, rows // _PART_ROWS)


def _checked(queries: Stage) -> list[int]:
    """The first parts that hold enough queries for a sample: a hash has dealt them."""
    held, numbers = 0, []
    for number in range(int(queries.manifest()["buckets"])):
        numbers.append(number)
        held += queries.read(part_name("queries", number, "parquet"), ["query_id"]).num_rows
        if held >= CHECKED_QUERIES:
            break
    return numbers


def _recall(target: Stage, retriever: str, shards: int, numbers: Sequence[int], depth: int) -> float | None:
    """The share of the sample's exact top ``depth`` that the index found too; None without queries."""
    exact = _merged(target, [partial_name(retriever, shard, shards, CHECK) for shard in range(shards)], depth)
    found = _merged(
        target,
        [partial_name(retriever, shard, shards, number) for shard in range(shards) for number in numbers],
        depth,
    )
    total = sum(map(len, exact.values()))
    kept = sum(len({p for p, _ in ranking} & {p for p, _ in found[q]}) for q, ranking in exact.items())
    return round(kept / total, 4) if total else None


def _tell(retriever: str, how: ivf.Settings, recall: float | None, wanted: float) -> None:
    shown = "unknown" if recall is None else f"{recall:.3f} of the exact ranking's passages"
    say(f"  {retriever}: {how.kind}, {how.nlist} clusters, {how.nprobe} searched: {shown} found")
    if recall is not None and recall < wanted:
        say(
            f"  warning: that is under retrieve.min_recall={wanted:g}. Raise retrieve.nprobe (now "
            f"{how.nprobe})" + (" or retrieve.pq_bytes" if how.kind == "ivfpq" else "")
        )


def _merged(target: Stage, names: Sequence[str], depth: int) -> dict[str, Ranking]:
    """Partial rankings of disjoint shards as one per query."""
    partial: dict[str, list[Ranking]] = defaultdict(list)
    for name in names:
        for query_id, ranking in _rankings(target.read(name)).items():
            partial[query_id].append(ranking)
    return defaultdict(list, {query_id: merge(rankings, depth) for query_id, rankings in partial.items()})


def _rankings(table: pa.Table) -> dict[str, Ranking]:
    """A run table's rankings by query_id; rows are stored in the order of ranks."""
    found: dict[str, Ranking] = defaultdict(list)
    columns = (table.column(name).to_pylist() for name in ("query_id", "passage_id", "score"))
    for query_id, passage_id, score in zip(*columns, strict=True):
        found[query_id].append((passage_id, score))
    return dict(found)


def rankings_of(retrieved: Stage, retriever: str, queries: Iterable[str] | None = None) -> dict[str, Ranking]:
    """One retriever's rankings by query_id: of these queries, or of all."""
    wanted = None if queries is None else pa.array(sorted(set(queries)), pa.string())

    def read(name: str) -> pa.Table:
        table = schema.check(retrieved.read(name), "run", retrieved.folder.path)
        keep = pc.equal(table.column("retriever"), retriever)
        if wanted is not None:
            keep = pc.and_(keep, pc.is_in(table.column("query_id"), value_set=wanted))
        return table.filter(keep)

    return _rankings(pa.concat_tables(each(read, retrieved.parts())))


def rankings_in(retrieved: Stage, number: int) -> dict[str, dict[str, Ranking]]:
    """Every retriever's rankings by query_id, of one part of queries."""
    name = part_name("run", number, "parquet")
    table = schema.check(retrieved.read(name), "run", retrieved.folder.path)
    return {
        retriever: _rankings(table.filter(pc.equal(table.column("retriever"), retriever)))
        for retriever in table.column("retriever").unique().to_pylist()
    }


def _search_depth(corpus: Stage, depth: int) -> int:
    """How deep to search, so that what training leaves out seldom shortens a ranking."""
    return depth + 1 + min(len(duplicates(corpus)), depth)


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
        others: Stage | None,
    ) -> None:
        self.queries, self.target, self.depth, self.rrf_k = encoded.queries, target, depth, rrf_k
        self.retrievers, self.shards, self.others = retrievers, shards, others
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
            found = self._found(retriever, number)
            by_retriever[retriever] = {
                query_id: self._cleaned(query_id, split, found[query_id])
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
        tables = [run_table(rankings, retriever) for retriever, rankings in by_retriever.items()]
        self.target.write(part_name("run", number, "parquet"), pa.concat_tables(tables))
        return {"queries": len(splits)}

    def _found(self, retriever: str, number: int) -> dict[str, Ranking]:
        """The rankings of a part of queries, merged over shards."""
        if self.others is not None and retriever != "dense":
            table = self.others.read(part_name("run", number, "parquet"))
            own = table.filter(pa.compute.equal(table.column("retriever"), retriever))
            return defaultdict(list, _rankings(own))
        shards = 1 if retriever == "bm25" else self.shards
        partial = [partial_name(retriever, shard, shards, number) for shard in range(shards)]
        return _merged(self.target, partial, self.search_depth)

    def _cleaned(self, query_id: str, split: str, ranking: Ranking) -> Ranking:
        """Training never sees duplicates; no query finds the passage with its own id."""
        left_out = {query_id} if self.same_id else set()
        if split == "train":
            left_out |= self.duplicates
        return without_ids(ranking, left_out)[: self.depth]
