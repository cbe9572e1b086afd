"""The encode stage: texts -> float16 vectors, one Arrow part per bucket of the text table."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_ray.artifacts import Stage, part_name, stage
from retrieval_ray.stages.collection import Collection, Encoded, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.ingest import passage_text
from retrieval_ray.stages.parts import run_parts
from retrieval_ray.student import Role, Student

VERSION = 1


def run(context: Context, collection: Collection, note: str = "") -> Encoded:
    """Encode the passages and the queries of a collection with the context's student."""
    return extend(
        collection,
        Encoded,
        passages=_encode(context, collection.corpus, "passage", f"encoding '{collection.name}'{note}"),
        query_vectors=_encode(
            context, collection.queries, "query", f"encoding queries of '{collection.name}'{note}"
        ),
    )


def _encode(context: Context, texts: Stage, role: Role, label: str) -> Stage:
    other = "passage" if role == "query" else "query"  # whose prompt and length change nothing here
    identity = {
        "version": VERSION,
        "texts": texts.content(),
        "titles": texts.identity.get("titles"),
        "student": {key: value for key, value in student_identity(context).items() if other not in key},
        "role": role,
        "profile": context.profile.numeric(),
    }
    target = stage(context.store, "encode", identity)
    if not context.start(target, label):
        return target
    buckets = int(texts.manifest()["buckets"])
    names = [part_name("vectors", number, "arrow") for number in range(buckets)]
    missing = set(target.missing(names))
    facts = run_parts(
        context,
        label,
        _Encoder,
        {
            "texts": texts,
            "target": target,
            "role": role,
            "student": student_arguments(context),
            "token_budget": context.profile.token_budget,
        },
        [{"number": n} for n, name in enumerate(names) if name in missing],
    )
    context.finish(
        target,
        names,
        rows=int(texts.manifest()["rows"]),
        worked=sum(f["rows"] for f in facts),
        buckets=buckets,
    )
    return target


def student_arguments(context: Context) -> dict[str, Any]:
    """What a worker passes to ``Student(...)``."""
    config = context.config.student
    return {
        "model": context.student.source,
        "precision": context.profile.precision,
        "device": context.profile.device,
        "query_prompt": config.query_prompt,
        "passage_prompt": config.passage_prompt,
        "max_query_tokens": config.max_query_tokens,
        "max_passage_tokens": config.max_passage_tokens,
        "trust_remote_code": config.trust_remote_code,
    }


def student_identity(context: Context) -> dict[str, Any]:
    """What decides a student's vectors: weights, prompts, lengths; not where its folder lies."""
    arguments = student_arguments(context)
    return {
        "sha": context.student.sha,
        **{k: v for k, v in arguments.items() if k not in ("model", "device", "precision")},
    }


class Vectors:
    """The vectors of some parts of an encode stage, with their ids."""

    def __init__(self, stage: Stage, parts: list[int]) -> None:
        tables = [stage.read(part_name("vectors", number, "arrow")) for number in parts]
        ids: list[str] = []
        blocks: list[npt.NDArray[np.float16]] = []
        for table in tables:
            ids += table.column("id").to_pylist()
            column = table.column("vector")
            for chunk in column.chunks:
                flat = chunk.flatten().to_numpy(zero_copy_only=False)
                blocks.append(flat.reshape(len(chunk), column.type.list_size))
        self.ids = ids
        self.matrix: npt.NDArray[np.float16] = np.concatenate(blocks)

    @classmethod
    def all(cls, stage: Stage) -> "Vectors":
        return cls(stage, list(range(int(stage.manifest()["buckets"]))))


class _Encoder:
    def __init__(
        self,
        texts: Stage,
        target: Stage,
        role: Role,
        student: dict[str, Any],
        token_budget: int,
    ) -> None:
        self.texts, self.target, self.role, self.budget = texts, target, role, token_budget
        self.student = Student(**student)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        ids, texts = part_texts(self.texts, number, self.role)
        vectors = self.student.encode(texts, self.role, token_budget=self.budget)
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.astype(np.float16).ravel()), self.student.dimension
        )
        self.target.write(part_name("vectors", number, "arrow"), pa.table({"id": ids, "vector": column}))
        return {"rows": len(ids)}


def part_texts(texts: Stage, number: int, role: Role) -> tuple[list[str], list[str]]:
    """Ids and what the models read, of one part of a corpus or queries stage."""
    if role == "query":
        table = texts.read(part_name("queries", number, "parquet"))
        return table.column("query_id").to_pylist(), table.column("text").to_pylist()
    table = texts.read(part_name("corpus", number, "arrow"))
    titles = bool(texts.identity["titles"])
    columns = (table.column(name).to_pylist() for name in ("passage_id", "title", "text"))
    rows = list(zip(*columns, strict=True))
    return [row[0] for row in rows], [passage_text(row[1], row[2], titles=titles) for row in rows]
