"""From raw teacher scores to training lists: pure functions over one query's judged pool.

Sources: CADET (arXiv 2505.19274) and arXiv 2502.19712, section and code lines in each docstring.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from retrieval_ray.negatives import NEGATIVES, Margins, Scores, too_close
from retrieval_ray.runs import Ranking


@dataclass(frozen=True)
class Pool:
    """One query's judged passages in the order of retrieval, with the combined teacher score.

    similarities_N: the dense retriever's own scores, NaN for what it did not retrieve; ``floor``: the
    lowest score it retrieved.
    """

    query_id: str
    kind: str
    source_id: str | None  # the passage the query was written from; None for a log
    passage_ids: Sequence[str]
    scores_N: Scores
    similarities_N: Scores | None = None
    floor: float = 0.0


@dataclass(frozen=True)
class Group:
    """One training list: the positive first, then negatives by falling teacher score."""

    query_id: str
    kind: str
    passage_ids: Sequence[str]
    teacher_scores_K: Scores  # in [0, 1]
    excluded_ids: Sequence[str]
    too_close: int = 0  # passages that the margins kept out of the negatives
    deeper: int = 0  # of the rule "top": negatives that stand in for such passages, from deeper ranks


def standardise(scores_N: Scores, first_M: Scores | None = None) -> Scores:
    """Scores of one query with mean 0 and deviation 1; zeros where all are equal.

    first_M: whose mean and deviation are used instead of the scores' own.
    """
    measured = scores_N if first_M is None else first_M
    deviation = float(measured.std())
    if deviation < 1e-12:
        return np.zeros_like(scores_N)
    standard: Scores = (scores_N - measured.mean()) / deviation
    return standard


def combine(
    teachers: Mapping[str, Scores],
    weights: Mapping[str, float],
    first: Mapping[str, Scores] | None = None,
) -> Scores:
    """One score per passage out of several teachers': each standardised, then averaged by weight.

    A single teacher keeps its raw scores, so that they can be compared across queries.
    first: the scores of the query's first pool, which a later pool is standardised by.
    """
    used = {name: weights.get(name, 0.0) for name in teachers}
    if len(teachers) == 1:
        return next(iter(teachers.values()))
    total = sum(used.values())
    if total <= 0:
        raise ValueError(f"the weights {dict(weights)} of the teachers {sorted(used)} sum to 0")
    mixed = np.zeros(len(next(iter(teachers.values()))))
    for name, scores_N in teachers.items():
        if used[name]:
            own = None if first is None else first[name]
            mixed = mixed + used[name] / total * standardise(scores_N, own)
    return mixed


def with_similarities(pool: Pool, ranking: Ranking, judged_N: Scores | None = None) -> Pool:
    """The pool with the dense retriever's scores of its passages.

    judged_N: the same of every passage, where a teacher gives them. They stand in for what an approximate
    index has missed: over the lowest score of an exact ranking is nothing that is not in it.
    """
    similar = dict(ranking)
    floor = min(similar.values(), default=0.0)
    known = np.full(len(pool.passage_ids), np.nan) if judged_N is None else judged_N
    missed = np.where(known > floor, known, np.nan)
    found = [similar.get(p, own) for p, own in zip(pool.passage_ids, missed.tolist(), strict=True)]
    return replace(pool, similarities_N=np.array(found), floor=floor)


@dataclass(frozen=True)
class Scale:
    """The global scale of one (corpus, kind): raw percentiles that become 0 and 1.

    s' = clip((s - P_low) / (P_high - P_low), 0, 1)   [CADET normalize_scores.py:27-46]
    """

    low: float
    high: float
    min_positive: float | None  # None: any positive will do

    @classmethod
    def of(
        cls,
        scores: Scores,
        *,
        lower_percentile: float,
        upper_percentile: float,
        min_positive_percentile: float | None,
    ) -> "Scale":
        """Percentiles over all passage scores of all surviving queries."""
        low, high = np.percentile(scores, [lower_percentile, upper_percentile])
        if min_positive_percentile is None:
            return cls(float(low), float(high), None)
        return cls(float(low), float(high), float(np.percentile(scores, min_positive_percentile)))

    def apply(self, scores_N: Scores) -> Scores:
        span = self.high - self.low
        if span <= 0:
            return np.full_like(scores_N, 0.5)
        return np.clip((scores_N - self.low) / span, 0.0, 1.0)


def not_retrieved(
    source_id: str | None, rankings: Mapping[str, Sequence[str]], source_rank: int
) -> tuple[str, str] | None:
    """As (reason, detail), where some retriever does not have a query's source in its top ``source_rank``.

    It asks for no score, so such queries are dropped before a teacher reads them
    [retriever_filtering_step.py:3,35-61]. A log query has no source, and is none.
    """
    for retriever, ranking in rankings.items() if source_id is not None else ():
        if source_id not in ranking[:source_rank]:
            return "not_retrieved", f"{source_id} not in the top {source_rank} of {retriever}"
    return None


def inconsistency(
    pool: Pool,
    rankings: Mapping[str, Sequence[str]],
    *,
    fewest: int,
    source_rank: int,
    require_first: bool,
) -> tuple[str, str] | None:
    """Why a query cannot be trained on, as (reason, detail), or None.

    The consistency rule: the source passage is in each retriever's own top ``source_rank`` and the
    teacher puts it first [retriever_filtering_step.py:3,35-61; filter_by_reranker.py:34]. A log
    query has no source, so only the length of its pool counts, of which a list needs ``fewest``.
    """
    if problem := not_retrieved(pool.source_id, rankings, source_rank):
        return problem
    if pool.source_id is not None:
        if pool.source_id not in pool.passage_ids:
            return "not_judged", f"{pool.source_id} is not in the fused pool"
        if require_first and pool.passage_ids[best(pool)] != pool.source_id:
            return "not_first", f"the teacher prefers {pool.passage_ids[best(pool)]}"
    if len(pool.passage_ids) < fewest:
        return "short_list", f"{len(pool.passage_ids)} passages, a list needs {fewest}"
    return None


def best(pool: Pool) -> int:
    """Where the teacher's first stands in the pool; ties by passage_id."""
    return min(range(len(pool.passage_ids)), key=lambda i: (-pool.scores_N[i], pool.passage_ids[i]))


def positive_of(pool: Pool) -> int:
    """Where the positive stands in the pool: the source, or the teacher's first for a log query."""
    return pool.passage_ids.index(pool.source_id) if pool.source_id in pool.passage_ids else best(pool)


def build(
    pool: Pool,
    scale: Scale,
    *,
    fewest: int,
    list_size: int,
    false_negative_ratio: float,
    negatives: str,
    margins: Margins | None = None,
) -> Group | tuple[str, str]:
    """The list of one query, or (reason, detail) where none can be made.

    It has K = ``list_size`` passages, or all that are left for it, if they are ``fewest`` or more.
    ``negatives`` names the rule (``negatives.NEGATIVES``) by which K - 1 passages of the pool join the
    positive; they are then ordered by falling teacher score.

    The 60 % rule: every judged passage whose normalised score is over ``false_negative_ratio`` times
    the positive's is masked from InfoNCE by id, and stays in the KL list
    [train_bge_listwise.py:203,212-223]. The positive itself is not in ``excluded_ids``.

    margins: passages too close to the positive are no negatives at all, and are masked as well. They are
    measured on ``similarities_N`` where the pool has them, else on the normalised teacher scores. The
    rule then chooses among the rest of the pool, so deeper ranks fill the list, where there are any; nothing
    unjudged does.
    """
    positive = positive_of(pool)
    if scale.min_positive is not None and pool.scores_N[positive] < scale.min_positive:
        return "low_positive", f"{pool.scores_N[positive]:.4g} < {scale.min_positive:.4g}"
    normal_N = scale.apply(pool.scores_N)
    others = [i for i in range(len(pool.passage_ids)) if i != positive]
    close: set[int] = set()
    if margins is not None:
        measured_N = normal_N if pool.similarities_N is None else pool.similarities_N
        close = set(too_close(measured_N, positive, margins, floor=pool.floor))
    ranked = [i for i in others if i not in close]
    if close and len(ranked) < fewest - 1:
        return (
            "few_negatives",
            f"{len(close)} of {len(others)} passages are too close to the positive, a list needs "
            f"{fewest - 1} others",
        )
    count = min(list_size - 1, len(ranked))
    by_score = sorted(ranked, key=lambda i: (-pool.scores_N[i], pool.passage_ids[i]))
    chosen = [positive, *NEGATIVES[negatives](ranked, by_score, pool.scores_N, count)]
    limit = false_negative_ratio * normal_N[positive]
    return Group(
        query_id=pool.query_id,
        kind=pool.kind,
        passage_ids=[pool.passage_ids[i] for i in chosen],
        teacher_scores_K=normal_N[chosen],
        excluded_ids=sorted(pool.passage_ids[i] for i in others if normal_N[i] > limit or i in close),
        too_close=len(close),
        deeper=len(set(chosen[1:]) - set(others[: list_size - 1])) if negatives == "top" else 0,
    )
