"""Which passages of a judged pool become a list's negatives, and which are too close to its positive.

A pool is given by positions: ``ranked`` in the order of retrieval, ``scores_N`` the teacher's scores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
Choice = Callable[[Sequence[int], Sequence[int], Scores, int], list[int]]


def top(ranked: Sequence[int], by_score: Sequence[int], scores_N: Scores, count: int) -> list[int]:
    """The first in the order of retrieval, a retriever's own top K (CADET, arXiv 2505.19274)."""
    first = set(ranked[:count])
    return [i for i in by_score if i in first]


def spread(ranked: Sequence[int], by_score: Sequence[int], scores_N: Scores, count: int) -> list[int]:
    """Even steps of the teacher's order, from its first to its last: quantiles of the pool's scores.

    As many passages lie between any two neighbours, so a list is distributed as its pool is
    (deterministic stratified sampling over score quantiles, arXiv 2604.04734).
    """
    return [by_score[step] for step in np.linspace(0, len(by_score) - 1, count).astype(int)]


def stratified(ranked: Sequence[int], by_score: Sequence[int], scores_N: Scores, count: int) -> list[int]:
    """Even steps of the teacher's score, from the highest to the lowest: the whole range alike.

    Each step takes the passage not taken yet that scores nearest to it. Where a pool holds a few good
    passages and many poor ones, ``spread`` shows mostly poor ones and this shows the slope between
    (arXiv 2604.04734 asks for uniform cover of the score spectrum).
    """
    free, chosen = list(by_score), set()
    highest, lowest = scores_N[by_score[0]], scores_N[by_score[-1]]
    for target in np.linspace(highest, lowest, count):
        nearest = min(free, key=lambda i: abs(scores_N[i] - target))  # the first of equals
        free.remove(nearest)
        chosen.add(nearest)
    return [i for i in by_score if i in chosen]


NEGATIVES: dict[str, Choice] = {"top": top, "spread": spread, "stratified": stratified}


@dataclass(frozen=True)
class Margins:
    """How far below its positive a negative must score (NV-Retriever, arXiv 2407.15831, section 3).

    relative: a negative scores at most positive - relative x |positive| (TopK-PercPos: .05 is the paper's
    95 %); absolute: at most positive - absolute (TopK-MarginPos). In the paper both act on the similarity
    of the embedding model that mines; which scores they act on here is the caller's choice.
    """

    relative: float | None = None
    absolute: float | None = None

    def limit(self, positive: float) -> float:
        """The highest score a negative may have; below the positive's, also where that is negative."""
        return min(
            positive - self.relative * abs(positive) if self.relative is not None else math.inf,
            positive - self.absolute if self.absolute is not None else math.inf,
        )


def too_close(scores_N: Scores, positive: int, margins: Margins, *, floor: float) -> list[int]:
    """Positions that score over the limit, the positive itself left out.

    NaN stands for a passage that the scorer did not retrieve. Such a passage is never too close; such a
    positive counts as ``floor``, the lowest score of what was retrieved.
    """
    own = float(scores_N[positive])
    limit = margins.limit(floor if math.isnan(own) else own)
    return [i for i in range(len(scores_N)) if i != positive and scores_N[i] > limit]
