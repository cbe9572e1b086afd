"""Is the teacher better than the student here? Asked on judged dev queries before any training.

Weights of an ensemble fitted and gated on the same queries always pass, so both are cross-fitted: the
gate looks at each fold with weights fitted on the other four.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from retrieval_ray.groups import combine
from retrieval_ray.metrics import Difference, Qrels, paired_difference, per_query
from retrieval_ray.negatives import Scores
from retrieval_ray.runs import top_k

FOLDS = 5
_STEPS = 8  # weights are multiples of 1/8
METRIC = "ndcg@10"

Weights = dict[str, float]


@dataclass(frozen=True)
class JudgedPool:
    """A judged query's pool: passage ids in the order of retrieval, each teacher's raw scores."""

    passage_ids: Sequence[str]
    teachers: Mapping[str, Scores]


@dataclass(frozen=True)
class Verdict:
    """What the gate found. ``difference`` is teacher minus student; None where nothing was judged.

    by_query: nDCG@10 of (student, teacher) per judged query, the teacher's with cross-fitted weights.
    """

    weights: Weights
    passed: bool | None  # None: unproven, there were no judged dev queries
    student: float | None
    teacher: float | None
    difference: Difference | None
    queries: int
    by_query: dict[str, tuple[float, float]] = field(default_factory=dict)


def rerank(pool: JudgedPool, weights: Mapping[str, float]) -> list[str]:
    """The pool in the teacher's order, ties by passage_id."""
    if not pool.passage_ids:
        return []
    scores = combine(pool.teachers, weights)
    return [p for p, _ in top_k(pool.passage_ids, scores.tolist(), len(pool.passage_ids))]


def unproven(weights: Weights) -> Verdict:
    """The verdict without judged dev queries."""
    return Verdict(weights, None, None, None, None, 0)


def judge(
    pools: Mapping[str, JudgedPool],
    qrels: Qrels,
    student: Mapping[str, Sequence[str]],
    *,
    fixed_weights: Weights | None,
    seed: int,
) -> Verdict:
    """Compare the teacher's order with the student's on judged dev queries.

    pools and student (the student's own ranking) are by query_id. With ``fixed_weights`` nothing is
    fitted. The gate passes if the 95 % interval of the mean difference in nDCG@10 lies above 0, and there
    are at least as many queries as folds: with fewer no weights can be fitted and tried apart.
    """
    queries = sorted(qrels)
    teachers = sorted(next(iter(pools.values())).teachers)
    candidates = [fixed_weights] if fixed_weights else _simplex(teachers)
    table = np.array([_ndcg(pools, qrels, queries, weights) for weights in candidates])  # W x Q
    folds = _folds(queries)
    cross_fitted = np.zeros(len(queries))
    for fold in range(FOLDS):
        held_out = folds == fold
        rest = table[:, ~held_out] if (~held_out).any() else table
        cross_fitted[held_out] = table[_best(rest.mean(axis=1))][held_out]
    own = per_query(qrels, student)
    student_Q = np.array([own[query][METRIC] for query in queries])
    difference = paired_difference(student_Q.tolist(), cross_fitted.tolist(), seed=seed)
    return Verdict(
        weights=candidates[_best(table.mean(axis=1))],
        passed=difference.low > 0 and len(queries) >= FOLDS,
        student=float(student_Q.mean()),
        teacher=float(cross_fitted.mean()),
        difference=difference,
        queries=len(queries),
        by_query=dict(zip(queries, zip(student_Q.tolist(), cross_fitted.tolist(), strict=True), strict=True)),
    )


def _best(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> int:
    return int(np.argmax(values))  # the first of equals


def _folds(queries: Sequence[str]) -> npt.NDArray[np.int64]:
    """The fold of each query: dealt out in turn in the order of a hash, so that folds are of one size."""
    order = sorted(range(len(queries)), key=lambda n: hashlib.sha256(queries[n].encode()).digest())
    folds = np.zeros(len(queries), dtype=np.int64)
    folds[order] = np.arange(len(queries)) % FOLDS
    return folds


def _simplex(teachers: Sequence[str]) -> list[Weights]:
    """All weights that are multiples of 1/8 and sum to 1, the most even ones first."""
    found = [
        {name: part / _STEPS for name, part in zip(teachers, parts, strict=True)}
        for parts in itertools.product(range(_STEPS + 1), repeat=len(teachers))
        if sum(parts) == _STEPS
    ]
    return sorted(found, key=lambda weights: sum(w * w for w in weights.values()))


def _ndcg(
    pools: Mapping[str, JudgedPool], qrels: Qrels, queries: Sequence[str], weights: Weights
) -> list[float]:
    values = per_query(qrels, {query: rerank(pools[query], weights) for query in queries})
    return [values[query][METRIC] for query in queries]
