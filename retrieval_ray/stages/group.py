"""The groups stage: the teacher gate, then training lists from raw scores. No model runs here."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from retrieval_ray import gate, groups, schema, trust
from retrieval_ray.artifacts import Stage, digest, stage
from retrieval_ray.config import to_dict
from retrieval_ray.datasets import rejects_table
from retrieval_ray.filters import Reject
from retrieval_ray.negatives import Margins
from retrieval_ray.progress import say
from retrieval_ray.stages import trust as trusted
from retrieval_ray.stages.collection import Grouped, Judged, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.queries import qrels_of, queries_table
from retrieval_ray.stages.retrieve import FUSED, rankings_of
from retrieval_ray.stages.scores import scores_of

VERSION = 3
_SHOWN = 5  # samples of each reason


def run(context: Context, judged: Judged) -> Grouped:
    """Gate the teacher, choose its weights, and build the lists of one corpus."""
    return extend(judged, Grouped, groups=_group(context, judged), negatives=None)


def _group(context: Context, judged: Judged) -> Stage:
    config = context.config
    identity = {
        "version": VERSION,
        "corpus": judged.name,
        "queries": judged.queries.content(),
        "retrieved": judged.retrieved.content(),
        "scores": {teacher: scores.content() for teacher, scores in judged.scores.items()},
        "weights": config.teacher.weights,
        "depth": config.teacher.depth,
        "groups": to_dict(config.groups),
        "dev": [config.train.dev_share, config.train.dev_queries],
        "retrievers": list(judged.retrievers),
        "seed": config.seed,
    }
    target = stage(context.store, "groups", identity)
    if not context.start(target, f"groups of '{judged.name}'"):
        return target
    raw = scores_of(judged)
    pools = _pools(judged, raw, config.teacher.depth)
    verdict = _verdict(context, judged, pools)
    pooled, rejects = _pooled(context, judged, pools, verdict.weights)
    built, unfit, scales = _build(context, judged, pooled)
    rejects += unfit
    findings = trusted.Findings(
        [trust.read(each.pool, each.rankings) for each in pooled],
        [trust.Beside(q, *pair) for q, pair in sorted(verdict.by_query.items())],
    )
    table = schema.from_rows("groups", [row_of(judged.name, group, split) for group, split in built])
    target.write("groups.parquet", table)
    target.write("rejects.parquet", rejects_table("groups", rejects))
    target.write("trust.parquet", trusted.table(findings))
    splits = Counter(split for _, split in built)
    context.finish(
        target,
        ["groups.parquet", "rejects.parquet", "trust.parquet"],
        rows=len(built),
        gate={key: value for key, value in asdict(verdict).items() if key != "by_query"},
        trust=trusted.facts(judged, findings, pools, verdict.weights),
        kept=len(built),
        train=splits["train"],
        dev=splits["dev"],
        rejected=dict(Counter(reason for _, reason, _ in rejects)),
        samples=_samples(rejects, judged),
        left_out=_left_out([group for group, split in built if split == "train"]),
        scales={kind: asdict(scale) for kind, scale in sorted(scales.items())},
        score_quantiles={
            teacher: np.quantile(list(scores.values()), np.linspace(0, 1, 41)).tolist()
            for teacher, scores in raw.items()
        },
    )
    return target


def may_train(context: Context, grouped: Grouped) -> bool:
    """Whether to train on this corpus: not where the teacher was found wanting, unless told to."""
    name, passed = grouped.name, grouped.groups.manifest()["gate"]["passed"]
    if passed is not False:
        return True
    if not context.config.teacher.gate:
        say(f"  '{name}': the teacher gate did not pass; training all the same (teacher.gate=false)")
        return True
    say(
        f"  '{name}': the teacher is not proven better than the student on the judged dev queries. "
        "Training might teach its mistakes, so it is skipped and the base model is kept"
    )
    return False


def judged_pools(judged: Judged, depth: int) -> dict[str, gate.JudgedPool]:
    """Each query's pool in the order of the fused ranking, with each teacher's raw scores.

    A passage that some teacher could not judge is in no pool.
    """
    return _pools(judged, scores_of(judged), depth)


def _pools(
    judged: Judged, raw: dict[str, dict[tuple[str, str], float]], depth: int
) -> dict[str, gate.JudgedPool]:
    pools = {}
    for query_id, ranking in rankings_of(judged.retrieved, FUSED).items():
        passages = [p for p, _ in ranking[:depth] if all((query_id, p) in s for s in raw.values())]
        pools[query_id] = gate.JudgedPool(
            passages,
            {
                teacher: np.array([scores[query_id, p] for p in passages], dtype=np.float64)
                for teacher, scores in raw.items()
            },
        )
    return pools


def _verdict(context: Context, judged: Judged, pools: dict[str, gate.JudgedPool]) -> gate.Verdict:
    config = context.config
    names = list(judged.scores)
    equal = dict.fromkeys(names, 1 / len(names))
    fixed = config.teacher.weights or (equal if len(names) == 1 else None)
    qrels = qrels_of(judged.queries, "dev")
    if not qrels:
        say("  no judged dev queries: the teacher is unproven on this corpus")
        return gate.unproven(fixed or equal)
    dense = rankings_of(judged.retrieved, "dense")
    student = {q: [p for p, _ in dense[q]] for q in qrels.keys() & dense.keys()}
    empty = gate.JudgedPool([], {t: np.zeros(0) for t in next(iter(pools.values())).teachers})
    verdict = gate.judge(
        {q: pools.get(q, empty) for q in qrels},
        qrels,
        student,
        fixed_weights=fixed,
        seed=config.seed,
    )
    assert verdict.difference is not None
    d = verdict.difference
    say(
        f"  teacher gate on {verdict.queries} judged dev queries, nDCG@10: student "
        f"{verdict.student:.4f}, teacher {verdict.teacher:.4f} "
        f"({d.mean:+.4f}, 95 % interval {d.low:+.4f} to {d.high:+.4f}): "
        + ("passed" if verdict.passed else "NOT passed")
        + f"; weights {_shown(verdict.weights)}"
    )
    return verdict


def _shown(weights: gate.Weights) -> str:
    return ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())


@dataclass(frozen=True)
class _Pooled:
    """The pool of a training query, and each retriever's own ranking."""

    pool: groups.Pool
    rankings: dict[str, list[str]]


def _pooled(
    context: Context, judged: Judged, pools: dict[str, gate.JudgedPool], weights: gate.Weights
) -> tuple[list[_Pooled], list[Reject]]:
    """The pools of all training queries, by query_id, and the queries that have none."""
    table = queries_table(judged.queries)
    table = table.filter(pa.compute.equal(table.column("split"), "train"))
    own = {r: rankings_of(judged.retrieved, r) for r in judged.retrievers}
    by_similarity = measured_by_similarity(context)
    found, rejects = [], []
    for row in sorted(table.to_pylist(), key=lambda row: str(row["query_id"])):
        query_id = str(row["query_id"])
        held = pools.get(query_id)
        if held is None or not held.passage_ids:
            rejects.append((query_id, "nothing_retrieved", ""))
            continue
        pool = groups.Pool(
            query_id, row["kind"], row["passage_id"], held.passage_ids, groups.combine(held.teachers, weights)
        )
        if by_similarity:
            pool = groups.with_similarities(pool, own["dense"].get(query_id, []))
        found.append(_Pooled(pool, {r: [p for p, _ in own[r].get(query_id, [])] for r in judged.retrievers}))
    return found, rejects


def measured_by_similarity(context: Context) -> bool:
    """Whether margins are measured on the dense retriever's scores."""
    return context.config.groups.margin_scores == "dense" and margins_of(context) is not None


def margins_of(context: Context) -> Margins | None:
    config = context.config.groups
    if config.relative_margin is None and config.absolute_margin is None:
        return None
    return Margins(config.relative_margin, config.absolute_margin)


def _build(
    context: Context, judged: Judged, pooled: list[_Pooled]
) -> tuple[list[tuple[groups.Group, str]], list[Reject], dict[str, groups.Scale]]:
    """The lists with their split, the queries that get none, the scale of each kind."""
    config = context.config.groups
    rejects: list[Reject] = []
    scales: dict[str, groups.Scale] = {}
    by_kind: dict[str, list[groups.Pool]] = defaultdict(list)
    for each in pooled:
        problem = groups.inconsistency(
            each.pool,
            each.rankings,
            list_size=config.list_size,
            source_rank=config.source_rank,
            require_first=config.require_first,
        )
        if problem:
            rejects.append((each.pool.query_id, *problem))
        else:
            by_kind[each.pool.kind].append(each.pool)
    survivors: list[tuple[groups.Pool, groups.Scale, groups.Group]] = []
    ratio = config.false_negative_ratio
    for kind in sorted(by_kind):
        scale = scales[kind] = groups.Scale.of(
            np.concatenate([pool.scores_N for pool in by_kind[kind]]),
            lower_percentile=config.lower_percentile,
            upper_percentile=config.upper_percentile,
            min_positive_percentile=config.min_positive_percentile,
        )
        for pool in by_kind[kind]:
            group = groups.build(
                pool,
                scale,
                list_size=config.list_size,
                false_negative_ratio=ratio,
                negatives=config.negatives,
                margins=margins_of(context),
            )
            if isinstance(group, groups.Group):
                survivors.append((pool, scale, group))
            else:
                rejects.append((pool.query_id, *group))
    held_out = _held_out([pool for pool, _, _ in survivors], context)
    whole = not qrels_of(judged.queries, "dev")  # then dev lists must carry the choice of the epoch alone
    built = []
    for pool, scale, group in survivors:
        if _source(pool) not in held_out:
            built.append((group, "train"))
        elif not whole:
            built.append((group, "dev"))
        else:
            size = len(pool.passage_ids)
            all_of_it = groups.build(pool, scale, list_size=size, false_negative_ratio=ratio, negatives="top")
            assert isinstance(all_of_it, groups.Group)
            built.append((all_of_it, "dev"))
    return built, rejects, scales


def _source(pool: groups.Pool) -> str:
    """What a query is split by: its source passage, so that its kinds stay together, or itself."""
    return pool.source_id or pool.query_id


def _held_out(pools: list[groups.Pool], context: Context) -> set[str]:
    """The sources held out for dev measures, at least one: the first by a seeded hash."""
    train = context.config.train
    sources = {_source(pool) for pool in pools}
    share = min(train.dev_share, train.dev_queries / max(1, len(pools)))
    by_hash = sorted(sources, key=lambda key: digest([context.config.seed, key]))
    return set(by_hash[: max(1, round(share * len(sources)))])


def _samples(rejects: list[Reject], judged: Judged) -> dict[str, list[str]]:
    """A few dropped queries of each reason, with the particulars, for the report."""
    some: dict[str, list[Reject]] = defaultdict(list)
    for reject in rejects:
        if len(some[reject[1]]) < _SHOWN:
            some[reject[1]].append(reject)
    table = queries_table(judged.queries)
    ids = pa.array([key for rows in some.values() for key, _, _ in rows], pa.string())
    table = table.filter(pa.compute.is_in(table.column("query_id"), value_set=ids))
    columns = (table.column(name).to_pylist() for name in ("query_id", "text"))
    texts = dict(zip(*columns, strict=True))
    return {
        reason: [f"{texts[key]} ({detail})" if detail else texts[key] for key, _, detail in rows]
        for reason, rows in some.items()
    }


def _left_out(built: list[groups.Group]) -> dict[str, Any]:
    """How many passages the rules kept out: masked from InfoNCE, too close to be negatives at all."""
    return {
        "masked": dict(sorted(Counter(len(group.excluded_ids) for group in built).items())),
        "too_close": sum(group.too_close for group in built),
        "lists_too_close": sum(group.too_close > 0 for group in built),
        "lists_filled_deeper": sum(group.deeper > 0 for group in built),
    }


def row_of(corpus: str, group: groups.Group, split: str) -> dict[str, Any]:
    """A list as a row of the groups table."""
    return {
        "corpus": corpus,
        "query_id": group.query_id,
        "kind": group.kind,
        "split": split,
        "positive_id": group.passage_ids[0],
        "passage_ids": list(group.passage_ids),
        "teacher_scores": group.teacher_scores_K.tolist(),
        "excluded_ids": list(group.excluded_ids),
    }
