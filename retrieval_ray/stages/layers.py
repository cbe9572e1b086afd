"""The layers stage: a student's vectors, by layer, of a sample of judged queries and of passages."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_ray.artifacts import Stage, digest, part_name, stage
from retrieval_ray.drift import Sample
from retrieval_ray.layers import layer_vectors
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import part_texts, student_arguments, student_identity
from retrieval_ray.stages.ingest import texts_of
from retrieval_ray.stages.parts import run_parts
from retrieval_ray.stages.queries import qrels_of, query_texts
from retrieval_ray.student import Role, Student

VERSION = 1
QUERIES, PASSAGES = 300, 600  # at most: seconds of a laptop
_AT_ONCE = 150  # texts of a part
_SAMPLE = "sample.parquet"
_SCHEMA = pa.schema(
    [("role", pa.string()), ("id", pa.string()), ("text", pa.string()), ("positive_id", pa.string())]
)


def target_of(context: Context, collection: Collection) -> Stage:
    """Where the vectors by the context's student lie, or will lie."""
    identity = {
        "version": VERSION,
        "corpus": collection.corpus.content(),
        "titles": collection.corpus.identity["titles"],
        "queries": collection.queries.content(),
        "relevance_threshold": collection.relevance_threshold,
        "sample": [QUERIES, PASSAGES],
        "student": student_identity(context),
        "profile": context.profile.numeric(),
    }
    return stage(context.store, "layers", identity)


def run(context: Context, collection: Collection, note: str = "") -> Stage:
    """Look at the sample with the context's student."""
    target = target_of(context, collection)
    label = f"layers' vectors on a sample of '{collection.name}'{note}"
    if not context.start(target, label):
        return target
    if target.missing([_SAMPLE]):
        target.write(_SAMPLE, _sample(collection))
    roles = target.read(_SAMPLE, ["role"]).column("role").to_pylist()
    sizes: dict[Role, int] = {"query": roles.count("query"), "passage": roles.count("passage")}
    names = {
        part_name(role, number, "arrow"): {"role": role, "number": number}
        for role, size in sizes.items()
        for number in range(-(-size // _AT_ONCE))
    }
    run_parts(
        context,
        label,
        _Looker,
        {
            "target": target,
            "student": student_arguments(context),
            "token_budget": context.profile.token_budget,
        },
        [names[name] for name in target.missing(names)],
    )
    context.finish(target, [_SAMPLE, *names], rows=sum(sizes.values()), collection=collection.name, **sizes)
    return target


def names_of(layers: Stage) -> list[str]:
    """The layers' names, the first one first."""
    return [name for name in layers.read(part_name("query", 0, "arrow")).column_names if name != "id"]


def vectors_of(layers: Stage, name: str) -> Sample:
    """One layer's vectors; memory holds no other's."""
    return Sample(_vectors(layers, "query", name), _vectors(layers, "passage", name))


def pairs_of(layers: Stage) -> tuple[list[str], list[int]]:
    """The sample's queries, and where a relevant passage of each stands among its passages."""
    table = layers.read(_SAMPLE, ["role", "id", "positive_id"])
    queries = table.filter(pc.equal(table.column("role"), "query"))
    passages = table.filter(pc.equal(table.column("role"), "passage")).column("id").to_pylist()
    place = {key: n for n, key in enumerate(passages)}
    return queries.column("id").to_pylist(), [place[key] for key in queries.column("positive_id").to_pylist()]


def _sample(collection: Collection) -> pa.Table:
    """Judged test queries, the first by hash, a most relevant passage of each, and passages beside them.

    These are of the corpus's first parts, which its texts' hashes have filled: chance, but always the same.
    """
    qrels = qrels_of(collection.queries, "test")
    positives = {q: min(judged, key=lambda p: (-judged[p], digest(p))) for q, judged in qrels.items()}
    answered = [q for q, p in positives.items() if qrels[q][p] >= collection.relevance_threshold]
    chosen = sorted(answered, key=digest)[:QUERIES]
    passages = texts_of(collection.corpus, {positives[query] for query in chosen})
    for number in range(int(collection.corpus.manifest()["buckets"])):
        ids, texts = part_texts(collection.corpus, number, "passage")
        for key, text in sorted(zip(ids, texts, strict=True), key=lambda row: digest(row[0])):
            if len(passages) < PASSAGES:
                passages.setdefault(key, text)
        if len(passages) >= PASSAGES:
            break
    queries = query_texts(collection.queries, chosen)
    rows: list[Mapping[str, Any]] = [
        {"role": "query", "id": q, "text": queries[q], "positive_id": positives[q]} for q in chosen
    ]
    rows += [{"role": "passage", "id": p, "text": passages[p]} for p in sorted(passages, key=digest)]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _vectors(layers: Stage, role: Role, name: str) -> npt.NDArray[np.float16]:
    """Mapped, on object stores from a copy on this machine: a part is read as often as there are layers."""
    found = []
    for part, content in sorted(layers.manifest()["parts"].items()):
        if part.startswith(f"{role}-"):
            column = (layers.folder / part).near(content).read_table([name]).column(name).combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False)
            found.append(flat.reshape(len(column), column.type.list_size))
    return np.concatenate(found)


class _Looker:
    """Writes the vectors of some texts of the sample, a column a layer."""

    def __init__(self, target: Stage, student: dict[str, Any], token_budget: int) -> None:
        self.target, self.budget = target, token_budget
        self.student = Student(**student)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        role, number = part["role"], int(part["number"])
        sample = self.target.read(_SAMPLE)
        sample = sample.filter(pc.equal(sample.column("role"), role)).slice(number * _AT_ONCE, _AT_ONCE)
        layers = layer_vectors(
            self.student, sample.column("text").to_pylist(), role, token_budget=self.budget
        )
        columns = {
            name: pa.FixedSizeListArray.from_arrays(
                pa.array(vectors_ND.astype(np.float16).ravel()), vectors_ND.shape[1]
            )
            for name, vectors_ND in layers.items()
        }
        self.target.write(part_name(role, number, "arrow"), pa.table({"id": sample.column("id"), **columns}))
        return {}
