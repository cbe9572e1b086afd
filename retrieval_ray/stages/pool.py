"""The pairs to judge, laid out by the part of the corpus in which their passage lies.

The pool of a query is the head of its fused ranking. Rankings lie by query and teachers work by passage,
so the pairs are turned around once, on disk: files of about a million pairs, each sorted by part of the
corpus, of which a worker reads the few row groups that hold its own. Memory: one such file, and 12 bytes
for each passage of the corpus, memory-mapped and so shared by the workers of a machine.
"""

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_ray.artifacts import Stage, each, part_name, stage
from retrieval_ray.stages.collection import Ranked
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import part_texts
from retrieval_ray.stages.parts import run_parts
from retrieval_ray.stages.retrieve import FUSED

VERSION = 1
PAIRS = 1_000_000  # of one file
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
class Pairs:
    """Pairs to judge, in one order: ids, and the texts that a teacher reads."""

    query_ids: list[str]
    passage_ids: list[str]
    queries: list[str]
    passages: list[str]
    places: list[
        tuple[int, int]
    ]  # of each query: part and row of the queries table; empty where there is none


def run(context: Context, ranked: Ranked, depth: int, groups: Stage | None = None) -> Stage:
    """Lay out the pools of all queries; groups: of those alone that have a training list in this stage."""
    identity = {
        "version": VERSION,
        "corpus": ranked.corpus.content(),
        "queries": ranked.queries.content(),
        "retrieved": ranked.retrieved.content(),
        "depth": depth,
        **({"groups": groups.content()} if groups else {}),
    }
    target = stage(context.store, "pool", identity)
    label = f"pairs of '{ranked.name}'"
    if not context.start(target, label):
        return target
    query_parts = int(ranked.queries.manifest()["buckets"])
    each = max(1, PAIRS * query_parts // max(1, depth * int(ranked.queries.manifest()["rows"])))
    files = [list(range(at, min(at + each, query_parts))) for at in range(0, query_parts, each)]
    names = [part_name("pairs", number, "parquet") for number in range(len(files))]
    arguments: dict[str, Any] = {"ranked": ranked, "depth": depth, "target": target, "groups": groups}
    if target.missing([_INDEX]):
        _write_index(ranked.corpus, target)
    missing = set(target.missing(names))
    todo = [{"number": n, "queries": files[n]} for n, name in enumerate(names) if name in missing]
    run_parts(context, label, _Layer, arguments, todo, gpus=False, light=len(todo) == 1)
    rows = sum(pq.read_metadata(_open(target, name)).num_rows for name in names)
    context.finish(target, [_INDEX, *names], rows=rows, collection=ranked.name)
    return target


def head(retrieved: Stage, number: int, depth: int) -> pa.Table:
    """query_id and passage_id of the pools of one part of queries, best first."""
    table = retrieved.read(part_name("run", number, "parquet"))
    keep = pc.and_(pc.equal(table.column("retriever"), FUSED), pc.less_equal(table.column("rank"), depth))
    return table.filter(keep).select(["query_id", "passage_id"])


def of_lists(pairs: pa.Table, groups: Stage | None) -> pa.Table:
    """The pairs of queries that have a training list in this stage; None: all."""
    if groups is None:
        return pairs
    lists = groups.read("groups.parquet", ["query_id", "split"])
    trained = lists.filter(pc.equal(lists.column("split"), "train")).column("query_id")
    return pairs.filter(pc.is_in(pairs.column("query_id"), value_set=trained))


def read(pool: Stage, corpus: Stage, number: int) -> Pairs:
    """The pairs whose passage lies in part ``number`` of the corpus, by passage, then query."""
    tables = [
        pq.read_table(
            f"{pool.folder.path}/{name}",
            filesystem=pool.folder.filesystem,
            filters=[("bucket", "=", number)],
        )
        for name in pool.parts()
        if name.startswith("pairs-")
    ]
    table = pa.concat_tables(tables)
    texts = dict(zip(*part_texts(corpus, number, "passage"), strict=True))
    rows = sorted(zip(*(table.column(c).to_pylist() for c in _SCHEMA.names[1:]), strict=True))
    rows = [row for row in rows if row[0] in texts]  # another passage's hash may be the same
    return Pairs(
        query_ids=[row[1] for row in rows],
        passage_ids=[row[0] for row in rows],
        queries=[row[2] for row in rows],
        passages=[texts[row[0]] for row in rows],
        places=[(row[3], row[4]) for row in rows],
    )


def buckets_of(pool: Stage, passage_ids: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """(position in passage_ids, part of the corpus) of each passage; two rows where hashes are the same."""
    table = pool.read(_INDEX)
    hashes, buckets = (table.column(name).to_numpy() for name in ("hash", "bucket"))
    wanted = _hashes(passage_ids)
    first, after = (np.searchsorted(hashes, wanted, side=side) for side in ("left", "right"))
    counts = after - first
    if not counts.all():
        raise ValueError(f"passage '{passage_ids[int(np.argmin(counts))]}' is not in the corpus")
    position = np.repeat(np.arange(len(passage_ids)), counts)
    within = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
    return position, buckets[first[position] + within]


def _write_index(corpus: Stage, target: Stage) -> None:
    """The part of the corpus of every passage, by the hash of its id."""

    def read(number: int) -> npt.NDArray[np.uint64]:
        table = corpus.read(part_name("corpus", number, "arrow"), ["passage_id"])
        return _hashes(table.column("passage_id").to_pylist())

    found = list(each(read, range(int(corpus.manifest()["buckets"]))))
    buckets = np.repeat(np.arange(len(found), dtype=np.uint32), [len(hashes) for hashes in found])
    hashes = np.concatenate(found)
    order = np.lexsort((buckets, hashes))
    target.write(_INDEX, pa.table({"hash": hashes[order], "bucket": buckets[order]}))


def _hashes(ids: list[str]) -> npt.NDArray[np.uint64]:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in ids)
    return np.frombuffer(digests, dtype=np.uint64)


def _open(target: Stage, name: str) -> Any:
    return target.folder.filesystem.open_input_file(f"{target.folder.path}/{name}")


class _Layer:
    """Writes one file of pairs out of some parts of the rankings."""

    def __init__(self, ranked: Ranked, depth: int, target: Stage, groups: Stage | None) -> None:
        self.queries, self.retrieved = ranked.queries, ranked.retrieved
        self.depth, self.target, self.groups = depth, target, groups

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        table = pa.concat_tables([self._pairs(number) for number in part["queries"]])
        order = [(name, "ascending") for name in ("bucket", "passage_id", "query_id")]
        buffer = io.BytesIO()
        pq.write_table(table.sort_by(order), buffer, compression="zstd", row_group_size=_ROW_GROUP)
        name = part_name("pairs", int(part["number"]), "parquet")
        (self.target.folder / name).write(buffer.getvalue())
        return {}

    def _pairs(self, number: int) -> pa.Table:
        table = of_lists(head(self.retrieved, number, self.depth), self.groups)
        ids, texts = part_texts(self.queries, number, "query")
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
