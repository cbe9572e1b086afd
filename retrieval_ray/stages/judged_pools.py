"""Pools with the teachers' scores: what a query's ranking and the score stages say of it, put together."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from retrieval_ray import gate, groups
from retrieval_ray.artifacts import part_name
from retrieval_ray.negatives import Scores
from retrieval_ray.runs import Ranking
from retrieval_ray.stages.collection import Judged
from retrieval_ray.stages.retrieve import FUSED, rankings_in, rankings_of
from retrieval_ray.stages.scores import ByQuery, Raw, scores_of


def judged_pools(
    judged: Judged, depth: int, queries: Iterable[str] | None = None
) -> dict[str, gate.JudgedPool]:
    """The pools of these queries, or of all: in the order of the fused ranking, with raw scores by teacher.

    A passage that some teacher could not judge is in no pool.
    """
    rankings = rankings_of(judged.retrieved, FUSED, queries)
    return _pools(rankings, scores_of(judged, queries), depth)


@dataclass(frozen=True)
class Pooled:
    """A training query with its pool, None where there is none, and each retriever's own ranking."""

    query_id: str
    source_id: str | None
    pool: groups.Pool | None
    rankings: dict[str, list[str]]


def training_pools(
    judged: Judged,
    scores: ByQuery,
    queries: Set[str] | None = None,
    *,
    near: ByQuery | None,
    depth: int,
    weights: gate.Weights,
    by_similarity: bool,
) -> Iterator[Pooled]:
    """All training queries, or these, with their pools; memory holds one part of queries at a time.

    by_similarity: with the scores of the dense retriever, to measure margins by; near: and what it gives
    to passages that it may have missed (``similarities_of``).
    """
    for number in range(int(judged.queries.manifest()["buckets"])):
        table = judged.queries.read(part_name("queries", number, "parquet"))
        rows = [
            row
            for row in table.filter(pc.equal(table.column("split"), "train")).to_pylist()
            if queries is None or row["query_id"] in queries
        ]
        if not rows:
            continue
        own = rankings_in(judged.retrieved, number)
        pools = _pools(own.get(FUSED, {}), scores.part(number), depth)
        cosines = near.part(number) if near else {}
        for row in rows:
            query_id = row["query_id"]
            rankings = {r: own.get(r, {}).get(query_id, []) for r in judged.retrievers}
            held, pool = pools.get(query_id), None
            if held is not None and held.passage_ids:
                combined = groups.combine(held.teachers, weights)
                pool = groups.Pool(query_id, row["kind"], row["passage_id"], held.passage_ids, combined)
                if by_similarity:
                    known_N = similarities_of(query_id, held.passage_ids, cosines)
                    pool = groups.with_similarities(pool, rankings["dense"], known_N)
            ranked = {r: [p for p, _ in ranking] for r, ranking in rankings.items()}
            yield Pooled(query_id, row["passage_id"], pool, ranked)


def similarities_of(query_id: str, passage_ids: Iterable[str], cosines: Mapping[str, Raw]) -> Scores | None:
    """The cosine of each of these passages, NaN where it is not known; None where none is at hand."""
    if "dense" not in cosines:
        return None
    return np.array([cosines["dense"].get((query_id, p), np.nan) for p in passage_ids])


def pools_by_part(
    judged: Judged, scores: ByQuery, depth: int
) -> Iterator[tuple[dict[str, gate.JudgedPool], dict[str, dict[str, Ranking]]]]:
    """The pools, and every retriever's rankings, of one part of queries after the other."""
    for number in range(int(judged.queries.manifest()["buckets"])):
        own = rankings_in(judged.retrieved, number)
        yield _pools(own.get(FUSED, {}), scores.part(number), depth), own


def _pools(rankings: Mapping[str, Ranking], raw: Mapping[str, Raw], depth: int) -> dict[str, gate.JudgedPool]:
    pools = {}
    by_all = set.intersection(*map(set, raw.values()))
    for query_id, ranking in rankings.items():
        passages = [p for p, _ in ranking[:depth] if (query_id, p) in by_all]
        pools[query_id] = gate.JudgedPool(
            passages,
            {
                teacher: np.array([scores[query_id, p] for p in passages], dtype=np.float64)
                for teacher, scores in raw.items()
            },
        )
    return pools
