"""The pairs stage: a given run or table of pairs, laid out in parts for the score stage."""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_ray.artifacts import Stage, bucket_count, bucket_of, digest, part_name, stage
from retrieval_ray.config import DatasetConfig
from retrieval_ray.datasets import rejects_table
from retrieval_ray.errors import UserError
from retrieval_ray.filters import Reject
from retrieval_ray.given import Pair, ids_without_text, read_pairs
from retrieval_ray.sources import open_source
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.ingest import passage_text
from retrieval_ray.stages.pool import Pairs, rows_of

VERSION = 2
_PER_PART = 1_024  # pairs of a part, about: what a kill may lose
_FILE = 250_000  # pairs that are held and written together
_ROW_GROUP = 8_192
_TEXTS = ("query_id", "passage_id", "query", "passage")
_SCHEMA = pa.schema([("bucket", pa.uint32()), ("row", pa.int64()), *((n, pa.string()) for n in _TEXTS)])


@dataclass(frozen=True)
class Given:
    """The pairs of a pairs stage, as the score stage reads them."""

    stage: Stage

    def read(self, number: int) -> Pairs:
        """The different pairs of part ``number``, in the order in which they were given."""
        rows = sorted(rows_of(self.stage, number).to_pylist(), key=lambda row: int(row["row"]))
        rows = list({(row["query_id"], row["passage_id"]): row for row in rows}.values())
        query_ids, passage_ids, queries, passages = ([str(row[name]) for row in rows] for name in _TEXTS)
        return Pairs(query_ids, passage_ids, queries, passages, places=[])


def run(context: Context, *, by_query: bool) -> Stage:
    """Read ``config.pairs``. by_query: pairs of one query lie together, else those of one passage.

    Raises ``UserError`` where no pair is left.
    """
    path = context.config.pairs
    if not path:
        raise UserError("pairs: name the run or the table of pairs to judge, like pairs=run.trec")
    queries, passages = _texts(context.config.dataset, path)
    state, count = digest([path]), 0
    for found in read_pairs(path, queries, passages):
        count += isinstance(found, Pair)
        state = digest([state, found if isinstance(found, tuple) else vars(found)])
    identity = {"version": VERSION, "pairs": state, "by_query": by_query}
    target = stage(context.store, "pairs", identity)
    if not context.start(target, f"pairs of {path}: {count:,}"):
        return target
    if not count:
        raise UserError(_none_left(path, read_pairs(path, queries, passages)))
    buckets = bucket_count(count, _PER_PART)
    rejects: list[Reject] = []
    names: list[str] = []
    waiting: list[dict[str, Any]] = []
    for number, found in enumerate(read_pairs(path, queries, passages)):
        if isinstance(found, tuple):
            rejects.append(found)
            continue
        bucket = bucket_of(found.query if by_query else found.passage, buckets)
        waiting.append({"bucket": bucket, "row": number, **vars(found)})
        if len(waiting) == _FILE:
            names.append(_write(target, len(names), waiting))
            waiting = []
    if waiting:
        names.append(_write(target, len(names), waiting))
    target.write("rejects.parquet", rejects_table("pairs", rejects))
    context.finish(
        target,
        [*names, "rejects.parquet"],
        rows=count,
        collection="pairs",
        buckets=buckets,
        rejected=dict(Counter(reason for _, reason, _ in rejects)),
    )
    return target


def some(context: Context, most: int) -> tuple[int, list[Pair]]:
    """How many pairs ``config.pairs`` holds, and the first of them. Raises ``UserError`` as ``run`` does."""
    path = context.config.pairs or ""
    queries, passages = _texts(context.config.dataset, path)
    count, first = 0, list[Pair]()
    for found in read_pairs(path, queries, passages):
        if isinstance(found, Pair):
            count += 1
            if len(first) < most:
                first.append(found)
    return count, first


def _texts(dataset: DatasetConfig, path: str) -> tuple[dict[str, str], dict[str, str]]:
    """What the ids of the file stand for that some row names without a text; no other text is held."""
    query_ids, passage_ids = ids_without_text(path)
    if not query_ids | passage_ids:
        return {}, {}
    source = open_source(dataset.path)
    queries = {key: text for _, key, text in source.queries(dataset.split) if key in query_ids}
    passages = {
        key: passage_text(title, text, titles=dataset.titles)
        for _, key, title, text in source.corpus()
        if key in passage_ids
    }
    return queries, passages


def _none_left(path: str, rows: Iterator[Pair | Reject]) -> str:
    rejects = [row for row in rows if isinstance(row, tuple)]
    if not rejects:
        return f"pairs: {path} is empty"
    reasons = Counter(reason for _, reason, _ in rejects)
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return (
        f"pairs: no pair is left of {path} ({said}; first: {rejects[0][0]}: {rejects[0][2]}). Ids need "
        "dataset.path=FOLDER, where their texts stand; a table may hold the texts as query and passage"
    )


def _write(target: Stage, number: int, rows: list[dict[str, Any]]) -> str:
    rows.sort(key=lambda row: (row["bucket"], row["row"]))
    name, buffer = part_name("pairs", number, "parquet"), io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    pq.write_table(table, buffer, compression="zstd", row_group_size=_ROW_GROUP)
    (target.folder / name).write(buffer.getvalue())
    return name
