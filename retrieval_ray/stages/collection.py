"""What is built of one corpus, in the order of the pipeline: each stage takes one record, returns the next.

A record only says where tables lie; the tables themselves are read where they are needed.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from retrieval_ray.artifacts import Stage


@dataclass(frozen=True)
class Collection:
    """A corpus and its queries, with what evaluation must know of its judgements."""

    name: str
    split: str
    relevance_threshold: int
    corpus: Stage
    generated: Stage | None  # an LLM's replies
    queries: Stage

    def stages(self) -> list[Stage]:
        """Every stage that is part of this record."""
        found: list[Stage] = []
        for f in fields(self):
            value = getattr(self, f.name)
            found += value.values() if isinstance(value, dict) else [value]
        return [value for value in found if isinstance(value, Stage)]


@dataclass(frozen=True)
class Encoded(Collection):
    """With the vectors of one student, and those of further dense retrievers by name."""

    passages: Stage
    query_vectors: Stage
    more_passages: dict[str, Stage]
    more_query_vectors: dict[str, Stage]


@dataclass(frozen=True)
class Ranked(Encoded):
    """With every retriever's rankings."""

    retrievers: tuple[str, ...]
    retrieved: Stage


@dataclass(frozen=True)
class Judged(Ranked):
    """With each teacher's raw scores of the heads of the fused rankings."""

    scores: dict[str, Stage]


@dataclass(frozen=True)
class Grouped(Judged):
    """With the training lists, and where they are asked for the queries that negatives answer."""

    groups: Stage
    negatives: Stage | None


_Later = TypeVar("_Later", bound=Collection)


def extend(record: Collection, kind: type[_Later], **more: Any) -> _Later:
    """The record as one of another kind, with what was added or made anew."""
    kept = {f.name: getattr(record, f.name) for f in fields(kind) if f.name not in more}
    return kind(**kept, **more)
