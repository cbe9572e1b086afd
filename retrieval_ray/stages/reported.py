"""The queries that are reported, alone: all that a trained student need answer again."""

from dataclasses import replace

import pyarrow.compute as pc

from retrieval_ray import schema
from retrieval_ray.artifacts import bucket_count, bucket_of, part_name, stage
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.queries import queries_table

VERSION = 1


def run(context: Context, collection: Collection) -> Collection:
    """The collection with its test queries alone, in a queries stage of their own."""
    target = stage(context.store, "queries", {"reported": VERSION, "of": collection.queries.content()})
    if context.start(target, f"reported queries of '{collection.name}'"):
        table = queries_table(collection.queries)
        rows = table.filter(pc.equal(table.column("split"), "test")).sort_by("query_id").to_pylist()
        buckets = bucket_count(len(rows))
        names = [part_name("queries", number, "parquet") for number in range(buckets)]
        for number, name in enumerate(names):
            own = [row for row in rows if bucket_of(row["text"], buckets) == number]
            target.write(name, schema.from_rows("queries", own))
        context.finish(target, names, rows=len(rows), collection=collection.name, buckets=buckets)
    return replace(collection, queries=target)
