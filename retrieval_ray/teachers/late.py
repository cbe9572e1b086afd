"""Late interaction: token vectors of a bi-encoder, each query token matched with its best passage token."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval_ray.batching import cut_chunks
from retrieval_ray.student import Student
from retrieval_ray.teachers.pairs import Scores

_TOGETHER = 16  # batches of passages whose token vectors are held
_TOKEN = 4  # characters, about
QueryTokens = Callable[[Sequence[str]], list[Tensor]]  # different texts -> (T, D) each


class Late:
    """A bi-encoder's last layer as a teacher; it needs no other model than the student.

    student: arguments of ``Student``. query_tokens: gives the query side where it lies ready, as
    ``query_vectors`` would compute it; each different text of a call is encoded once.
    """

    def __init__(
        self, student: dict[str, Any], *, token_budget: int, query_tokens: QueryTokens | None = None
    ) -> None:
        self.student, self.token_budget = Student(**student), token_budget
        self.query_tokens = query_tokens or self.query_vectors

    def query_vectors(self, texts: Sequence[str]) -> list[Tensor]:
        """Token vectors of queries, rounded to the float16 in which they are stored and shared."""
        vectors = self.student.token_vectors(texts, "query", token_budget=self.token_budget)
        return [vectors_TD.half().float() for vectors_TD in vectors]

    def score(self, queries: Sequence[str], passages: Sequence[str]) -> Scores:
        """Mean over query tokens of the best passage token; pairs of one passage share its vectors.

        Passages go by length, some batches at a time: memory is the token vectors of so many.
        """
        by_passage: dict[str, list[int]] = {}
        for at, passage in enumerate(passages):
            by_passage.setdefault(passage, []).append(at)
        different, each_once = list(dict.fromkeys(queries)), list(by_passage)
        query_TD = dict(zip(different, self.query_tokens(different), strict=True))
        scores = np.zeros(len(queries), dtype=np.float32)
        characters = [max(1, len(text)) for text in each_once]
        for chunk in cut_chunks(characters, _TOGETHER * _TOKEN * self.token_budget):
            texts = [each_once[at] for at in chunk]
            vectors = self.student.token_vectors(texts, "passage", token_budget=self.token_budget)
            for text, passage_TD in zip(texts, vectors, strict=True):
                rows = by_passage[text]
                scores[rows] = late_interaction([query_TD[queries[at]] for at in rows], passage_TD)
        return scores


def late_interaction(queries_TD: Sequence[Tensor], passage_TD: Tensor) -> list[float]:
    """Scores of one passage for several queries: mean over query tokens of the best passage token.

    s(q, p) = 1/|q| sum_i max_j cos(q_i, p_j)   (ColBERT's MaxSim, arXiv 2004.12832, as a mean)

    Vectors are normalised. A query or passage without tokens scores 0.
    """
    lengths = [len(query) for query in queries_TD]
    if len(passage_TD) == 0 or not sum(lengths):
        return [0.0] * len(lengths)
    best = (torch.cat([q for q in queries_TD if len(q)]) @ passage_TD.T).amax(dim=1)
    pieces = torch.split(best, [n for n in lengths if n])
    scores = iter(float(piece.mean()) for piece in pieces)
    return [next(scores) if n else 0.0 for n in lengths]
