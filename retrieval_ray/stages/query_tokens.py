"""The query side of late interaction: token vectors of every query, computed once and shared on disk."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_ray.artifacts import Stage, part_name, stage
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import part_texts
from retrieval_ray.stages.judges import Judge, arguments_of, teacher_id
from retrieval_ray.stages.meter import Counted
from retrieval_ray.stages.parts import run_parts
from retrieval_ray.stages.query_rows import QueryRows
from retrieval_ray.teachers.late import Late
from retrieval_ray.tokens import counting

VERSION = 1


def run(context: Context, judge: Judge, collection: Collection) -> Stage:
    """float16 token vectors of all queries of a collection, one Arrow part per part of queries."""
    queries = collection.queries
    identity = {
        "version": VERSION,
        "queries": queries.content(),
        "teacher": str(teacher_id(context, judge, None)),
    }
    target = stage(context.store, "query-tokens", identity)
    label = f"query tokens for {judge.name}"
    if not context.start(target, label):
        return target
    buckets = int(queries.manifest()["buckets"])
    names = [part_name("tokens", number, "arrow") for number in range(buckets)]
    missing = set(target.missing(names))
    run_parts(
        context,
        label,
        _TokenEncoder,
        {"queries": queries, "target": target, "late": arguments_of(context, judge)},
        [{"number": n} for n, name in enumerate(names) if name in missing],
        counted=Counted(target.name, collection.name),
    )
    context.finish(target, names, rows=int(queries.manifest()["rows"]))
    return target


class Stored:
    """Gives a ``Late`` teacher the query side from disk. places: where the queries of a call stand."""

    def __init__(self, tokens: Stage) -> None:
        self.rows = QueryRows(tokens, "tokens")
        self.places: dict[str, tuple[int, int]] = {}

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        places = [self.places[text] for text in texts]
        values, sizes = (self.rows.take(places, column) for column in ("tokens", "dimension"))
        found = []
        for place in places:
            flat = np.frombuffer(values[place].as_py(), dtype=np.float16).astype(np.float32)
            found.append(torch.from_numpy(flat).reshape(-1, sizes[place].as_py()))
        return found


class _TokenEncoder:
    def __init__(self, queries: Stage, target: Stage, late: dict[str, Any]) -> None:
        self.queries, self.target, self.late = queries, target, Late(**late)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        ids, texts = part_texts(self.queries, number, "query")
        with counting() as read:
            vectors = self.late.query_vectors(texts)
        table = pa.table(
            {
                "query_id": pa.array(ids, pa.string()),
                "tokens": pa.array([v.half().numpy().tobytes() for v in vectors], pa.large_binary()),
                "dimension": pa.array([v.shape[-1] or 1 for v in vectors], pa.int32()),
            }
        )
        self.target.write(part_name("tokens", number, "arrow"), table)
        return {"rows": len(ids), "tokens": read()}
