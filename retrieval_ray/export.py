"""Scored lists as the rows of other libraries' training files: one function per format.

Scores are the groups' own: normalised to [0, 1], the positive's first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Passage:
    passage_id: str
    title: str  # empty where models read none
    text: str

    @property
    def read(self) -> str:
        """What models read of it."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class ScoredList:
    """One training list with its texts, the positive first."""

    query_id: str
    query: str
    passages: Sequence[Passage]
    scores: Sequence[float]


def sentence_transformers(row: ScoredList) -> Row:
    """Columns ``query``, ``positive``, ``negative_1`` ... in this order, and ``scores`` of all passages.

    For DistillKLDivLoss and MarginMSELoss; without ``scores`` for MultipleNegativesRankingLoss. Every row
    must have as many negatives as the others.
    """
    negatives = {f"negative_{n}": p.read for n, p in enumerate(row.passages[1:], start=1)}
    return {"query": row.query, "positive": row.passages[0].read, **negatives, "scores": list(row.scores)}


def tevatron(row: ScoredList) -> Row:
    """Tevatron's text format; ``score`` is read by its distillation (``DistilTrainDataset``) alone."""
    passages = [
        {"docid": p.passage_id, "title": p.title, "text": p.text, "score": score}
        for p, score in zip(row.passages, row.scores, strict=True)
    ]
    return {
        "query_id": row.query_id,
        "query": row.query,
        "positive_passages": passages[:1],
        "negative_passages": passages[1:],
    }


def flagembedding(row: ScoredList) -> Row:
    """FlagEmbedding's embedder and reranker data; the scores are read with ``--knowledge_distillation``."""
    texts = [p.read for p in row.passages]
    return {
        "query": row.query,
        "pos": texts[:1],
        "neg": texts[1:],
        "pos_scores": list(row.scores[:1]),
        "neg_scores": list(row.scores[1:]),
    }


def pylate(row: ScoredList) -> Row:
    """PyLate's distillation rows (``KDProcessing``); texts stand in tables of queries and documents."""
    ids = [p.passage_id for p in row.passages]
    return {"query_id": row.query_id, "document_ids": ids, "scores": list(row.scores)}


FORMATS: dict[str, Callable[[ScoredList], Row]] = {
    "sentence-transformers": sentence_transformers,
    "tevatron": tevatron,
    "flagembedding": flagembedding,
    "pylate": pylate,
}
EQUAL_LENGTHS = {"sentence-transformers"}  # formats in which every list has as many passages
BY_ID = {"pylate"}  # formats whose texts stand in tables of their own


def without(row: ScoredList, dropped: set[str]) -> ScoredList:
    """The list without these negatives."""
    kept = [n for n, p in enumerate(row.passages) if n == 0 or p.passage_id not in dropped]
    return ScoredList(row.query_id, row.query, [row.passages[n] for n in kept], [row.scores[n] for n in kept])


def common_length(lengths: Sequence[int]) -> int:
    """The length to which lists are best cut where all must have one: most negatives are left in all.

    Shorter lists are left out. 0 where no list has a negative.
    """
    longest_first = sorted(lengths, reverse=True)
    left = [(length - 1) * count for count, length in enumerate(longest_first, start=1)]
    return longest_first[left.index(max(left))] if max(left, default=0) > 0 else 0


def cut(row: ScoredList, length: int) -> ScoredList:
    """The list's first passages."""
    return ScoredList(row.query_id, row.query, row.passages[:length], row.scores[:length])
