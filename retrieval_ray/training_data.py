"""What training reads of each corpus: lists, those of a batch, passages drawn from them, and tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrieval_ray.batching import drawn
from retrieval_ray.metrics import Qrels
from retrieval_ray.step import Lists
from retrieval_ray.student import Role, Student
from retrieval_ray.tokens import TokenRows


@dataclass(frozen=True)
class CorpusData:
    """What training needs of one corpus: lists, texts, and judged dev queries where there are some."""

    name: str
    train: Lists
    dev: Lists
    passages: Mapping[str, str]
    queries: Mapping[str, str]
    dev_qrels: Qrels
    dev_pools: Mapping[str, Sequence[str]]  # passages that a judged dev query's order is made of


def taken(lists: Lists, indices: Any) -> Lists:
    """The lists at these places."""
    return Lists(
        [lists.query_ids[i] for i in indices],
        [lists.passage_ids[i] for i in indices],
        np.asarray(lists.teacher_BK)[indices],
        [lists.excluded_ids[i] for i in indices],
        None if lists.negative_query_ids is None else [lists.negative_query_ids[i] for i in indices],
    )


def some_of_each(lists: Lists, size: int, rng: np.random.Generator) -> Lists:
    """``size`` passages of each list, or all of lists that are equally long, beside all of its judgements."""
    places = [drawn(len(row), size, rng) for row in lists.passage_ids]
    own = lists.negative_query_ids
    if own is not None:
        own = [[row[i - 1] for i in at[1:]] for row, at in zip(own, places, strict=True)]
    return replace(
        lists,
        passage_ids=[[row[i] for i in at] for row, at in zip(lists.passage_ids, places, strict=True)],
        teacher_BK=np.take_along_axis(lists.teacher_BK, np.stack(places), axis=1),
        negative_query_ids=own,
        judged=[
            dict(zip(row, scores_K.tolist(), strict=False))  # the scores are filled up
            for row, scores_K in zip(lists.passage_ids, lists.teacher_BK, strict=True)
        ],
    )


def tokenised(student: Student, corpus: CorpusData) -> dict[Role, TokenRows]:
    """Tokens of every query, and of the passages that dev measures read."""
    passages = [p for row in corpus.dev.passage_ids for p in row]
    passages += [p for query in corpus.dev_qrels for p in corpus.dev_pools.get(query, ())]
    own = corpus.train.negative_query_ids or ()
    negatives = [query for row in own for query in row if query is not None]
    queries = [*corpus.train.query_ids, *negatives, *corpus.dev.query_ids, *corpus.dev_qrels]
    return {
        "passage": _rows(student, corpus.passages, passages, "passage"),
        "query": _rows(student, corpus.queries, queries, "query"),
    }


def shortened(student: Student, corpus: CorpusData, limit: int | None) -> TokenRows:
    """Tokens of the passages that training reads."""
    passages = [p for row in corpus.train.passage_ids for p in row]
    return _rows(student, corpus.passages, passages, "passage", limit)


def _rows(
    student: Student, texts: Mapping[str, str], ids: Iterable[str], role: Role, limit: int | None = None
) -> TokenRows:
    return TokenRows(ids, lambda some: student.tokenize([texts[i] for i in some], role, limit=limit))
