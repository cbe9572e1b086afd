"""The pairs to judge, laid out by the part of the corpus in which their passage lies.

The pool of a query is the head of its fused ranking. Rankings lie by query and teachers work by passage,
so the pairs are turned around once, on disk: files of about a million pairs, each sorted by part, of which
a worker reads the few row groups that hold its own. Parts are those of the corpus, cut finer where so many
queries are asked of it that one would hold much more than ``PER_PART`` pairs: all of a passage's pairs stay
together. Memory: one such file, and 12 bytes for each passage of the corpus, memory-mapped and so shared by
the workers of a machine. Of an object store each machine reads every file once and keeps it on its disk.
"""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_ray import groups as lists
from retrieval_ray.artifacts import MOST_BUCKETS, Stage, bucket_of, each, part_name, stage
from retrieval_ray.stages.collection import Ranked
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import part_texts
from retrieval_ray.stages.parts import run_parts
from retrieval_ray.stages.retrieve import FUSED

VERSION = 2
PAIRS = 1_000_000  # of one file
PER_PART = 8_192  # about as many at most, on average
_ROW_GROUP = 8_192
_INDEX = "index.arrow"
_SCHEMA = pa.schema(
    [
        ("bucket", pa.uint32()),
        ("passage_id", pa.string()),
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("query_part", pa.int32()),  # where the query stands: a part of the queries table ...
        ("query_row", pa.int32()),  # ... and a row of it
    ]
)


@dataclass(frozen=True)
class Heads:
    """Which pairs are judged: those of the head of each query's fused ranking.

    groups: of queries that have a training list in this stage, and no others. Without it, of all but the
    written queries that will not be trained on whatever a teacher says, because some retriever does not
    have their source in its own top ``source_rank``.
    """

    ranked: Ranked
    depth: int
    source_rank: int
    groups: Stage | None

    def identity(self) -> dict[str, Any]:
        """What decides which they are, beside the rankings."""
        chosen = {"groups": self.groups.content()} if self.groups else {"source_rank": self.source_rank}
        return {"depth": self.depth, **chosen}

    def part(self, number: int) -> pa.Table:
        """query_id and passage_id, best first, of the queries of part ``number``."""
        table = self.ranked.retrieved.read(part_name("run", number, "parquet"))
        fused = pc.equal(table.column("retriever"), FUSED)
        head = table.filter(pc.and_(fused, pc.less_equal(table.column("rank"), self.depth)))
        head = head.select(["query_id", "passage_id"])
        if self.groups is None:
            dropped = pa.array(self._not_retrieved(number, table), pa.string())
            return head.filter(pc.invert(pc.is_in(head.column("query_id"), value_set=dropped)))
        own = self.groups.read("groups.parquet", ["query_id", "split"])
        trained = own.filter(pc.equal(own.column("split"), "train")).column("query_id")
        return head.filter(pc.is_in(head.column("query_id"), value_set=trained))

    def _not_retrieved(self, number: int, table: pa.Table) -> list[str]:
        written = self.ranked.queries.read(part_name("queries", number, "parquet"))
        written = written.filter(pc.equal(written.column("split"), "train"))
        columns = (written.column(name).to_pylist() for name in ("query_id", "passage_id"))
        near = table.filter(pc.less_equal(table.column("rank"), self.source_rank))
        rows = zip(
            *(near.column(c).to_pylist() for c in ("retriever", "query_id", "passage_id")), strict=True
        )
        rankings: dict[str, dict[str, list[str]]] = {}
        for retriever, query_id, passage_id in rows:
            if retriever in self.ranked.retrievers:
                rankings.setdefault(query_id, {}).setdefault(retriever, []).append(passage_id)
        none: dict[str, list[str]] = {retriever: [] for retriever in self.ranked.retrievers}
        return [
            query_id
            for query_id, source_id in zip(*columns, strict=True)
            if lists.not_retrieved(source_id, none | rankings.get(query_id, {}), self.source_rank)
        ]


@dataclass(frozen=True)
class Pairs:
    """Pairs to judge, in one order: ids, and the texts that a teacher reads."""

    query_ids: list[str]
    passage_ids: list[str]
    queries: list[str]
    passages: list[str]
    places: list[
        tuple[int, int]
    ]  # of each query: part and row of the queries table; empty where there is none


def run(context: Context, heads: Heads) -> Stage:
    """Lay out these pairs."""
    ranked, depth = heads.ranked, heads.depth
    identity = {
        "version": VERSION,
        "corpus": ranked.corpus.content(),
        "queries": ranked.queries.content(),
        "retrieved": ranked.retrieved.content(),
        **heads.identity(),
    }
    target = stage(context.store, "pool", identity)
    label = f"pairs of '{ranked.name}'"
    if not context.start(target, label):
        return target
    query_parts = int(ranked.queries.manifest()["buckets"])
    most = depth * int(ranked.queries.manifest()["rows"])
    own = int(ranked.corpus.manifest()["buckets"])
    parts = _parts(own, most)
    each = max(1, PAIRS * query_parts // max(1, most))
    files = [list(range(at, min(at + each, query_parts))) for at in range(0, query_parts, each)]
    names = [part_name("pairs", number, "parquet") for number in range(len(files))]
    arguments: dict[str, Any] = {"heads": heads, "target": target}
    if target.missing([_INDEX]):
        _write_index(ranked.corpus, target, parts)
    missing = set(target.missing(names))
    todo = [{"number": n, "queries": files[n]} for n, name in enumerate(names) if name in missing]
    run_parts(context, label, _Layer, arguments, todo, gpus=False, light=len(todo) == 1)
    rows = sum(pq.read_metadata(_open(target, name)).num_rows for name in names)
    context.finish(
        target, [_INDEX, *names], rows=rows, collection=ranked.name, buckets=parts, corpus_buckets=own
    )
    return target


def _parts(corpus_parts: int, pairs: int) -> int:
    """Those of the corpus, doubled until no more than ``PER_PART`` pairs are to be expected in one."""
    parts = corpus_parts
    while parts * PER_PART < pairs and parts < MOST_BUCKETS:
        parts *= 2
    return parts


def read(pool: Stage, corpus: Stage, number: int) -> Pairs:
    """The pairs of part ``number``, by passage, then query."""
    table, (where,) = rows_of(pool, number), corpus_parts(pool, [number])
    texts = dict(zip(*part_texts(corpus, where, "passage"), strict=True))
    rows = sorted(zip(*(table.column(c).to_pylist() for c in _SCHEMA.names[1:]), strict=True))
    rows = [row for row in rows if row[0] in texts]  # another passage's hash may be the same
    return Pairs(
        query_ids=[row[1] for row in rows],
        passage_ids=[row[0] for row in rows],
        queries=[row[2] for row in rows],
        passages=[texts[row[0]] for row in rows],
        places=[(row[3], row[4]) for row in rows],
    )


def rows_of(pairs: Stage, number: int) -> pa.Table:
    """The rows of part ``number``, out of every file of pairs."""
    files = [
        (pairs.folder / name).near(content)
        for name, content in pairs.manifest()["parts"].items()
        if name.startswith("pairs-")
    ]
    return pa.concat_tables(
        pq.read_table(file.path, filesystem=file.filesystem, filters=[("bucket", "=", number)])
        for file in files
    )


def corpus_parts(pool: Stage, numbers: Iterable[int]) -> list[int]:
    """The parts of the corpus in which the passages of these parts of the pairs lie."""
    own = int(pool.manifest()["corpus_buckets"])
    return sorted({number % own for number in numbers})


def buckets_of(pool: Stage, passage_ids: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """(position in passage_ids, part of the pairs) of each passage; two rows where hashes are the same."""
    table = (pool.folder / _INDEX).near(f"index-{pool.fingerprint}").read_table()
    hashes, buckets = (table.column(name).to_numpy() for name in ("hash", "bucket"))
    wanted = _hashes(passage_ids)
    first, after = (np.searchsorted(hashes, wanted, side=side) for side in ("left", "right"))
    counts = after - first
    if not counts.all():
        raise ValueError(f"passage '{passage_ids[int(np.argmin(counts))]}' is not in the corpus")
    position = np.repeat(np.arange(len(passage_ids)), counts)
    within = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
    return position, buckets[first[position] + within]


def _write_index(corpus: Stage, target: Stage, parts: int) -> None:
    """The part of every passage, by the hash of its id.

    That of the corpus itself; where the pairs are cut finer, the bucket of its text among so many: what lies
    in bucket b of n lies in one of b, b + n, b + 2 n ... of a multiple.
    """
    own = int(corpus.manifest()["buckets"])

    def read(number: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        if parts == own:
            table = corpus.read(part_name("corpus", number, "arrow"), ["passage_id"])
            ids = table.column("passage_id").to_pylist()
            return _hashes(ids), np.full(len(ids), number, dtype=np.uint32)
        ids, texts = part_texts(corpus, number, "passage")
        return _hashes(ids), np.array([bucket_of(text, parts) for text in texts], dtype=np.uint32)

    hashes, buckets = map(np.concatenate, zip(*each(read, range(own)), strict=True))
    order = np.lexsort((buckets, hashes))
    target.write(_INDEX, pa.table({"hash": hashes[order], "bucket": buckets[order]}))


def _hashes(ids: list[str]) -> npt.NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in ids)
    return np.frombuffer(digests, dtype=np.uint64)


def _open(target: Stage, name: str) -> Any:
    return target.folder.filesystem.open_input_file(f"{target.folder.path}/{name}")


class _Layer:
    """Writes one file of pairs out of some parts of the rankings."""

    def __init__(self, heads: Heads, target: Stage) -> None:
        self.heads, self.target = heads, target

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        table = pa.concat_tables([self._pairs(number) for number in part["queries"]])
        order = [(name, "ascending") for name in ("bucket", "passage_id", "query_id")]
        buffer = io.BytesIO()
        pq.write_table(table.sort_by(order), buffer, compression="zstd", row_group_size=_ROW_GROUP)
        name = part_name("pairs", int(part["number"]), "parquet")
        (self.target.folder / name).write(buffer.getvalue())
        return {}

    def _pairs(self, number: int) -> pa.Table:
        table = self.heads.part(number)
        ids, texts = part_texts(self.heads.ranked.queries, number, "query")
        rows = pc.index_in(table.column("query_id"), pa.array(ids, pa.string())).combine_chunks()
        position, buckets = buckets_of(self.target, table.column("passage_id").to_pylist())
        columns = {
            "bucket": buckets,
            "passage_id": table.column("passage_id").take(position),
            "query_id": table.column("query_id").take(position),
            "query": pa.array(texts, pa.string()).take(rows).take(position),
            "query_part": np.full(len(position), number, dtype=np.int32),
            "query_row": rows.take(position),
        }
        return pa.table(columns, schema=_SCHEMA)
