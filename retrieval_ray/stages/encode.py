"""The encode stage: texts -> float16 vectors, one Arrow part per bucket of the text table.

Parts are uncompressed Arrow that is mapped, not read; on object stores each machine keeps a copy of the
parts it has read, named by their content, among its temporary files.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_ray.artifacts import Stage, each, part_name, stage
from retrieval_ray.config import StudentConfig
from retrieval_ray.model_files import Model
from retrieval_ray.search import Block
from retrieval_ray.stages.collection import Collection, Encoded, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.ingest import passage_text
from retrieval_ray.stages.meter import Counted
from retrieval_ray.stages.parts import run_parts
from retrieval_ray.student import Role, Student
from retrieval_ray.tokens import Tokens

VERSION = 2
_PARTS_AT_ONCE = 8  # that a worker takes, so that it can tokenise one while it computes another


def run(
    context: Context,
    collection: Collection,
    note: str = "",
    *,
    models: dict[str, StudentConfig] | None = None,
) -> Encoded:
    """Encode the passages and the queries of a collection with the context's student.

    models: further dense retrievers by name, each encoded in stages of its own.
    """
    passages, query_vectors = _both(context, collection, note)
    further = {
        name: _both(with_model(context, name, config), collection, f" with {name}")
        for name, config in (models or {}).items()
    }
    return extend(
        collection,
        Encoded,
        passages=passages,
        query_vectors=query_vectors,
        more_passages={name: stages[0] for name, stages in further.items()},
        more_query_vectors={name: stages[1] for name, stages in further.items()},
    )


def _both(context: Context, collection: Collection, note: str) -> tuple[Stage, Stage]:
    """The stages of passages and of queries, by the same workers: loading a model may take longer."""
    passages = _target(context, collection.corpus, "passage")
    queries = _target(context, collection.queries, "query")
    todo: dict[Role, tuple[Stage, Stage]] = {}
    if context.start(passages, f"encoding '{collection.name}'{note}"):
        todo["passage"] = (collection.corpus, passages)
    if context.start(queries, f"encoding queries of '{collection.name}'{note}"):
        todo["query"] = (collection.queries, queries)
    facts = run_parts(
        context,
        f"encoding '{collection.name}'{note}",
        _Encoder,
        {
            "stages": todo,
            "student": student_arguments(context),
            "token_budget": context.profile.token_budget,
        },
        [
            {"role": role, "numbers": numbers}
            for role, (_, target) in todo.items()
            for numbers in _shares(context, target, _names(todo[role][0]))
        ],
        counted=Counted("encode", collection.name),
    )
    whole = sum(each["seconds"] for each in facts)
    for role, (texts, target) in todo.items():
        own = [each for each in facts if each["role"] == role]
        busy = sum(each["seconds"] for each in own)
        context.finish(
            target,
            _names(texts),
            rows=int(texts.manifest()["rows"]),
            worked=sum(each["rows"] for each in own),
            share=busy / whole if whole else 1.0,
            busy=busy,
            buckets=int(texts.manifest()["buckets"]),
        )
    return passages, queries


def _names(texts: Stage) -> list[str]:
    return [part_name("vectors", number, "arrow") for number in range(int(texts.manifest()["buckets"]))]


def _shares(context: Context, target: Stage, names: list[str]) -> list[list[int]]:
    """The missing parts, a few together."""
    absent = set(target.missing(names))
    missing = [n for n, name in enumerate(names) if name in absent]
    at_once = max(1, min(_PARTS_AT_ONCE, len(missing) // (4 * context.config.compute.workers)))
    return [missing[n : n + at_once] for n in range(0, len(missing), at_once)]


def with_model(context: Context, name: str, student: StudentConfig) -> Context:
    """The same run with another model in the student's place."""
    model = Model.of(
        student.model, f"retrieve.models.{name}.model", trust_remote_code=student.trust_remote_code
    )
    return replace(context, config=replace(context.config, student=student), chosen_student=model)


def _target(context: Context, texts: Stage, role: Role) -> Stage:
    other = "passage" if role == "query" else "query"  # whose prompt and length change nothing here
    identity = {
        "version": VERSION,
        "texts": texts.content(),
        "titles": texts.identity.get("titles"),
        "student": {key: value for key, value in student_identity(context).items() if other not in key},
        "role": role,
        "profile": context.profile.numeric(),
    }
    return stage(context.store, "encode", identity)


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
    """The vectors of some parts of an encode stage (None: all), mapped; read when they are asked for."""

    def __init__(
        self, stage: Stage, parts: Sequence[int] | None = None, hashes: Mapping[str, str] | None = None
    ) -> None:
        """hashes: by file, where they are known already; what copies of a remote store are named by."""
        self._stage, self._folder = stage, stage.folder
        self._hashes = hashes or {}
        if parts is None or (hashes is None and not stage.folder.is_local):
            manifest = stage.manifest()
            parts = range(int(manifest["buckets"])) if parts is None else parts
            self._hashes = manifest["parts"]
        self._names = [part_name("vectors", number, "arrow") for number in parts]

    @classmethod
    def all(cls, stage: Stage) -> "Vectors":
        return cls(stage)

    def part(self, number: int) -> "Vectors":
        """Those of one part, this one's or another; the manifest is not read again."""
        return Vectors(self._stage, [number], self._hashes)

    def blocks(self) -> Iterator[Block]:
        """(ids, vectors_ND) part by part; the vectors are views of the mapped file."""

        def read(name: str) -> pa.Table:
            return (self._folder / name).near(self._hashes.get(name, "")).read_table()

        # A map of this machine's disk costs nothing; a copy of what lies elsewhere is waited for
        for table in map(read, self._names) if self._folder.is_local else each(read, self._names):
            column = table.column("vector")
            column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # this copies
            flat = column.flatten().to_numpy(zero_copy_only=False)
            yield table.column("id").to_pylist(), flat.reshape(len(column), column.type.list_size)

    @functools.cached_property
    def ids(self) -> list[str]:
        return [key for ids, _ in self.blocks() for key in ids]

    @functools.cached_property
    def matrix(self) -> npt.NDArray[np.float16]:
        """All of them, in the order of ``ids``: in memory, unless it is a single part."""
        blocks = [vectors_ND for _, vectors_ND in self.blocks()]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def of(self, ids: Sequence[str]) -> npt.NDArray[np.float16]:
        """The vectors of these ids, in their order; memory holds no others."""
        places: dict[str, list[int]] = {}
        for place, key in enumerate(ids):
            places.setdefault(key, []).append(place)
        found: npt.NDArray[np.float16] | None = None
        for keys, vectors_ND in self.blocks():
            for row, key in enumerate(keys):
                if key in places:
                    if found is None:
                        found = np.empty((len(ids), vectors_ND.shape[1]), dtype=np.float16)
                    found[places.pop(key)] = vectors_ND[row]
        if places:
            raise KeyError(f"no vector of {next(iter(places))!r}")
        return np.empty((0, 0), dtype=np.float16) if found is None else found


class _Encoder:
    """Encodes parts one after the other, and tokenises the next one meanwhile.

    stages: by role, the texts' stage and that of their vectors.
    """

    def __init__(
        self, stages: dict[Role, tuple[Stage, Stage]], student: dict[str, Any], token_budget: int
    ) -> None:
        self.stages, self.budget = stages, token_budget
        self.student = Student(**student)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        role: Role = part["role"]
        texts, target = self.stages[role]
        numbers, rows, read = [int(number) for number in part["numbers"]], 0, 0
        with ThreadPoolExecutor(1) as ahead:
            tokenised = ahead.submit(self._tokenised, texts, numbers[0], role)
            for number, following in zip(numbers, [*numbers[1:], None], strict=True):
                ids, tokens = tokenised.result()
                if following is not None:
                    tokenised = ahead.submit(self._tokenised, texts, following, role)
                vectors = self.student.encode_tokens(tokens, role, token_budget=self.budget)
                column = pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.astype(np.float16).ravel()), self.student.dimension
                )
                target.write(part_name("vectors", number, "arrow"), pa.table({"id": ids, "vector": column}))
                rows += len(ids)
                read += sum(map(len, tokens))
        return {"role": role, "rows": rows, "tokens": read}

    def _tokenised(self, texts: Stage, number: int, role: Role) -> tuple[list[str], list[Tokens]]:
        ids, rows = part_texts(texts, number, role)
        return ids, self.student.tokenize(rows, role)


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
