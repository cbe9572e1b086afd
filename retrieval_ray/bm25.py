"""BM25 over a corpus (bm25s), as a retriever and as one of the embedded teachers."""

from array import array
from collections.abc import Iterable, Sequence

import bm25s
import numpy as np
import numpy.typing as npt

from retrieval_ray.runs import Ranking
from retrieval_ray.words import terms

VERSION = "bm25s-lucene-k1.5-b.75-terms1"


class Bm25:
    """An index over passages. A query without any known term scores 0 everywhere.

    Memory: 8 bytes for each different word of a passage, about 45 while it is built (measured), and the ids.
    """

    def __init__(self, passage_ids: Sequence[str], texts: Iterable[str]) -> None:
        self.passage_ids = np.array(passage_ids, dtype=object)
        self._position = {passage: n for n, passage in enumerate(passage_ids)}
        self._known: dict[str, int] = {}
        rows = [
            array("i", [self._known.setdefault(term, len(self._known)) for term in terms(text)])
            for text in texts
        ]
        self._index = bm25s.BM25()
        if self._known:  # bm25s cannot index a corpus without a single term
            self._index.index((rows, dict(self._known)), show_progress=False)

    def _scores(self, query: str) -> npt.NDArray[np.float32]:
        known = [term for term in terms(query) if term in self._known]
        if not known:
            return np.zeros(len(self.passage_ids), dtype=np.float32)
        scores: npt.NDArray[np.float32] = self._index.get_scores(known)
        return scores

    def search(self, query: str, k: int) -> Ranking:
        """The k best passages with a score over 0, ties by passage_id."""
        scores_N = self._scores(query)
        candidates = np.flatnonzero(scores_N > 0)
        if len(candidates) > k:
            limit = np.partition(scores_N[candidates], len(candidates) - k)[len(candidates) - k]
            candidates = candidates[scores_N[candidates] >= limit]
        order = np.lexsort((self.passage_ids[candidates], -scores_N[candidates]))[:k]
        return [(str(self.passage_ids[n]), float(scores_N[n])) for n in candidates[order]]

    def score(self, query: str, passage_ids: Sequence[str]) -> list[float]:
        """The raw scores of these passages for one query."""
        scores_N = self._scores(query)
        return [float(scores_N[self._position[passage]]) for passage in passage_ids]
