"""How far a teacher can be trusted: what it does to single queries, judged or not. Pure functions.

On judged queries its nDCG stands beside the student's. On all others there is no truth, only signs: does it
agree with the retriever, does it tell passages apart, does it find the passage a query was written from.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from retrieval_ray.groups import Pool
from retrieval_ray.metrics import spearman
from retrieval_ray.negatives import Scores
from retrieval_ray.runs import top_k

PERCENTILES = (5, 25, 50, 75, 95)
HEAD = 10  # passages of a ranking that count for the overlap


@dataclass(frozen=True, slots=True)
class Reading:
    """What one query's pool says of the teacher.

    anchor: the passage that ought to stand high: the source, or, of a log query, the retriever's first.
    rank: the teacher's rank of it, 1 the best; gap: how far it scores below the teacher's first, and
    spread: the deviation of the pool's scores, both raw. agreement: (Kendall's tau, overlap of the
    first ten) with each retriever.
    """

    query_id: str
    kind: str
    has_source: bool
    anchor_id: str
    best_id: str
    rank: int
    depth: int
    gap: float
    spread: float
    agreement: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def inverted(self) -> bool:
        """The anchor stands in the lower half of the teacher's order."""
        return self.rank > max(1, self.depth / 2)


@dataclass(frozen=True)
class Beside:
    """Teacher against student on one judged query."""

    query_id: str
    student: float
    teacher: float

    @property
    def difference(self) -> float:
        return self.teacher - self.student


@dataclass(frozen=True)
class Parity:
    """How two runs of the same teacher differ on the pairs that both have judged."""

    pairs: int
    largest: float
    mean: float
    scale: float  # the deviation of the first run's scores, to hold the differences against
    rank_correlation: float  # Spearman's


def read(pool: Pool, rankings: Mapping[str, Sequence[str]]) -> Reading:
    """Read one pool. rankings: each retriever's own order, best first; a pool must not be empty."""
    order = [p for p, _ in top_k(pool.passage_ids, pool.scores_N.tolist(), len(pool.passage_ids))]
    has_source = pool.source_id in order
    anchor = str(pool.source_id) if has_source else pool.passage_ids[0]
    scores = dict(zip(pool.passage_ids, pool.scores_N.tolist(), strict=True))
    head = set(order[:HEAD])
    agreement = {}
    for retriever, ranking in rankings.items():
        found = [scores[p] for p in ranking if p in scores]
        shared = len(head & set(ranking[:HEAD])) / max(1, min(HEAD, len(ranking), len(pool.passage_ids)))
        agreement[retriever] = (kendall_tau(np.array(found)), shared)
    return Reading(
        query_id=pool.query_id,
        kind=pool.kind,
        has_source=has_source,
        anchor_id=anchor,
        best_id=order[0],
        rank=order.index(anchor) + 1,
        depth=len(order),
        gap=scores[order[0]] - scores[anchor],
        spread=float(pool.scores_N.std()),
        agreement=agreement,
    )


def kendall_tau(scores_N: Scores) -> float:
    """Kendall's tau-b between the order that scores stand in and the scores; 0 where all are equal.

    1: the scores only fall; -1: they only rise.
    """
    signs = np.sign(scores_N[:, None] - scores_N[None, :])[np.triu_indices(len(scores_N), 1)]
    untied = np.count_nonzero(signs)
    return float(signs.sum() / np.sqrt(len(signs) * untied)) if untied else 0.0


def by_kind(readings: Iterable[Reading]) -> dict[str, dict[str, object]]:
    """Per query kind: how many, percentiles of the spread, shares not first and inverted.

    ``not_first`` is of the queries that have a source; None where none has.
    """
    kinds: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        kinds[reading.kind].append(reading)
    found: dict[str, dict[str, object]] = {}
    for kind in sorted(kinds):
        sourced = [r for r in kinds[kind] if r.has_source]
        found[kind] = {
            "queries": len(kinds[kind]),
            "spread": percentiles([r.spread for r in kinds[kind]]),
            "sources": len(sourced),
            "not_first": sum(r.rank > 1 for r in sourced) / len(sourced) if sourced else None,
            "inverted": sum(r.inverted for r in kinds[kind]) / len(kinds[kind]),
        }
    return found


def agreement(readings: Iterable[Reading]) -> dict[str, dict[str, list[float]]]:
    """Percentiles over queries of tau and overlap, by retriever."""
    tau: dict[str, list[float]] = defaultdict(list)
    overlap: dict[str, list[float]] = defaultdict(list)
    for reading in readings:
        for retriever, (own_tau, own_overlap) in reading.agreement.items():
            tau[retriever].append(own_tau)
            overlap[retriever].append(own_overlap)
    return {
        retriever: {"tau": percentiles(tau[retriever]), f"overlap@{HEAD}": percentiles(overlap[retriever])}
        for retriever in tau
    }


def most_inverted(readings: Iterable[Reading], count: int) -> list[Reading]:
    """The inverted ones with the widest gap, measured in deviations of their pool."""
    worst = sorted(
        (r for r in readings if r.inverted), key=lambda r: (-r.gap / max(r.spread, 1e-12), r.query_id)
    )
    return worst[:count]


def heaviest_losses(rows: Iterable[Beside], count: int) -> list[Beside]:
    """The judged queries where the teacher is furthest behind the student."""
    lost = sorted((row for row in rows if row.difference < 0), key=lambda r: (r.difference, r.query_id))
    return lost[:count]


def parity(one_N: Scores, other_N: Scores) -> Parity:
    """Compare two runs' raw scores of the same pairs, at least one."""
    apart_N = np.abs(one_N - other_N)
    return Parity(
        pairs=len(one_N),
        largest=float(apart_N.max()),
        mean=float(apart_N.mean()),
        scale=float(one_N.std()),
        rank_correlation=spearman(one_N, other_N) if apart_N.any() else 1.0,
    )


def percentiles(values: Sequence[float]) -> list[float]:
    """The percentiles that the report draws."""
    return [float(value) for value in np.percentile(values, PERCENTILES)]
