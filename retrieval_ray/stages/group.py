"""The groups stage: the teacher gate, then training lists from raw scores. No model runs here.

Pools are made anew at each of two or three readings, a part of queries at a time: what is held of all of
them is a teacher's scores (some 20 bytes a pair), one reading a query, and the lists.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from retrieval_ray import gate, groups, schema, trust
from retrieval_ray.artifacts import Stage, digest, stage
from retrieval_ray.config import to_dict
from retrieval_ray.datasets import rejects_table
from retrieval_ray.filters import Reject
from retrieval_ray.negatives import Margins, Scores
from retrieval_ray.progress import say
from retrieval_ray.stages import score
from retrieval_ray.stages import trust as trusted
from retrieval_ray.stages.collection import Grouped, Judged, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judged_pools import Pooled, judged_pools, training_pools
from retrieval_ray.stages.queries import qrels_of, query_texts
from retrieval_ray.stages.retrieve import rankings_of
from retrieval_ray.stages.scores import ByQuery, all_scores

VERSION = 6
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
        "fewest": config.encoded_of_a_list(),
        "dev": [config.train.dev_share, config.train.dev_queries],
        "retrievers": list(judged.retrievers),
        "seed": config.seed,
    }
    target = stage(context.store, "groups", identity)
    if not context.start(target, f"groups of '{judged.name}'"):
        return target
    verdict, dev_pools = _verdict(context, judged)
    near = score.similarities(context, judged)
    with target.scratch() as folder, target.scratch() as beside:
        pooled = partial(
            training_pools,
            judged,
            ByQuery(judged.queries, judged.scores, folder),
            near=ByQuery(judged.queries, near, beside) if near else None,
            depth=config.teacher.depth,
            weights=verdict.weights,
            by_similarity=config.groups.measured_by_similarity(),
        )
        readings, scales, rejects = _surveyed(context, judged, pooled())
        built, unfit = _build(context, judged, pooled, scales, {key for key, _, _ in rejects})
    rejects += unfit
    findings = trusted.Findings(
        readings, [trust.Beside(q, *pair) for q, pair in sorted(verdict.by_query.items())]
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
        collection=judged.name,
        gate={key: value for key, value in asdict(verdict).items() if key != "by_query"},
        trust=trusted.facts(judged, findings, dev_pools, verdict.weights),
        kept=len(built),
        train=splits["train"],
        dev=splits["dev"],
        rejected=dict(Counter(reason for _, reason, _ in rejects)),
        samples=_samples(rejects, judged),
        left_out=_left_out([group for group, split in built if split == "train"]),
        scales={kind: asdict(scale) for kind, scale in sorted(scales.items())},
        score_quantiles={
            teacher: np.quantile(_values(scores), np.linspace(0, 1, 41)).tolist()
            for teacher, scores in judged.scores.items()
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


def _verdict(context: Context, judged: Judged) -> tuple[gate.Verdict, dict[str, gate.JudgedPool]]:
    """What the gate finds, and the pools of the judged dev queries."""
    config = context.config
    names = list(judged.scores)
    equal = dict.fromkeys(names, 1 / len(names))
    fixed = config.teacher.weights or (equal if len(names) == 1 else None)
    qrels = qrels_of(judged.queries, "dev")
    if not qrels:
        say("  no judged dev queries: the teacher is unproven on this corpus")
        return gate.unproven(fixed or equal), {}
    pools = judged_pools(judged, config.teacher.depth, qrels)
    dense = rankings_of(judged.retrieved, "dense", qrels)
    student = {q: [p for p, _ in dense[q]] for q in qrels.keys() & dense.keys()}
    empty = gate.JudgedPool([], {teacher: np.zeros(0) for teacher in judged.scores})
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
    return verdict, pools


def _shown(weights: gate.Weights) -> str:
    return ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())


def _values(scores: Stage) -> Scores:
    found: Scores = all_scores(scores, ["score"]).column("score").to_numpy().astype(np.float64)
    return found


def margins_of(context: Context) -> Margins | None:
    config = context.config.groups
    if config.relative_margin is None and config.absolute_margin is None:
        return None
    return Margins(config.relative_margin, config.absolute_margin)


def lengths(context: Context, corpus: Stage) -> dict[str, int]:
    """K of a corpus's lists, and the fewest passages of one: no more than a training step encodes of it.

    Of a corpus that is smaller than a list, all of it.
    """
    most = min(context.config.groups.list_size, int(corpus.manifest()["rows"]))
    return {"fewest": min(most, context.config.encoded_of_a_list()), "list_size": most}


def _surveyed(
    context: Context, judged: Judged, pooled: Iterable[Pooled]
) -> tuple[list[trust.Reading], dict[str, groups.Scale], list[Reject]]:
    """What all pools say of the teacher, the scale of each kind, and the queries that fit no list.

    The scale is of the pools that are consistent, and all their scores: 8 bytes a pair in memory.
    """
    config, sizes = context.config.groups, lengths(context, judged.corpus)
    readings: list[trust.Reading] = []
    empty: list[Reject] = []
    inconsistent: list[Reject] = []
    scores: dict[str, array[float]] = defaultdict(lambda: array("d"))
    for each in pooled:
        if each.pool is None:
            problem = groups.not_retrieved(each.source_id, each.rankings, config.source_rank)
            if problem:
                inconsistent.append((each.query_id, *problem))
            else:
                empty.append((each.query_id, "nothing_retrieved", ""))
            continue
        readings.append(trust.read(each.pool, each.rankings))
        if config.kinds is not None and each.pool.kind not in config.kinds:
            inconsistent.append((each.query_id, "other_kind", each.pool.kind))
            continue
        problem = groups.inconsistency(
            each.pool,
            each.rankings,
            fewest=sizes["fewest"],
            source_rank=config.source_rank,
            require_first=config.require_first,
        )
        if problem:
            inconsistent.append((each.query_id, *problem))
        else:
            scores[each.pool.kind].frombytes(each.pool.scores_N.tobytes())
    scales = {
        kind: groups.Scale.of(
            np.frombuffer(values),
            lower_percentile=config.lower_percentile,
            upper_percentile=config.upper_percentile,
            min_positive_percentile=config.min_positive_percentile,
        )
        for kind, values in scores.items()
    }
    return sorted(readings, key=lambda r: r.query_id), scales, sorted(empty) + sorted(inconsistent)


def _build(
    context: Context,
    judged: Judged,
    pooled: Callable[..., Iterator[Pooled]],
    scales: Mapping[str, groups.Scale],
    rejected: Set[str],
) -> tuple[list[tuple[groups.Group, str]], list[Reject]]:
    """The lists with their splits, by kind and query_id, and the queries that none can be made for.

    pooled: reads the pools of these training queries, or of all. rejected: those to pass over.
    """
    config, sizes = context.config.groups, lengths(context, judged.corpus)
    made = partial(groups.build, false_negative_ratio=config.false_negative_ratio)
    lists: dict[str, groups.Group] = {}
    sources: dict[str, str] = {}
    unfit: list[tuple[str, Reject]] = []
    for each in pooled():
        if each.pool is None or each.query_id in rejected:
            continue
        group = made(
            each.pool,
            scales[each.pool.kind],
            **sizes,
            negatives=config.negatives,
            margins=margins_of(context),
        )
        if isinstance(group, groups.Group):
            lists[each.query_id], sources[each.query_id] = group, _source(each.pool)
        else:
            unfit.append((each.pool.kind, (each.query_id, *group)))
    held_out = _held_out(list(sources.values()), context)
    dev = {query_id for query_id, source in sources.items() if source in held_out}
    if not qrels_of(judged.queries, "dev"):  # then dev lists must carry the choice of the epoch alone
        for each in pooled(dev):
            assert each.pool is not None
            size = len(each.pool.passage_ids)
            whole = made(each.pool, scales[each.pool.kind], fewest=size, list_size=size, negatives="top")
            assert isinstance(whole, groups.Group)
            lists[each.query_id] = whole
    built = sorted(lists.values(), key=lambda group: (group.kind, group.query_id))
    splits = ["dev" if group.query_id in dev else "train" for group in built]
    return list(zip(built, splits, strict=True)), [reject for _, reject in sorted(unfit)]


def _source(pool: groups.Pool) -> str:
    """What a query is split by: its source passage, so that its kinds stay together, or itself."""
    return pool.source_id or pool.query_id


def _held_out(sources: list[str], context: Context) -> set[str]:
    """The sources held out for dev measures, at least one: the first by a seeded hash.

    sources: of every list, so that a passage with many queries stands there often.
    """
    train = context.config.train
    different = set(sources)
    share = min(train.dev_share, train.dev_queries / max(1, len(sources)))
    by_hash = sorted(different, key=lambda key: digest([context.config.seed, key]))
    return set(by_hash[: max(1, round(share * len(different)))])


def _samples(rejects: list[Reject], judged: Judged) -> dict[str, list[str]]:
    """A few dropped queries of each reason, with the particulars, for the report."""
    some: dict[str, list[Reject]] = defaultdict(list)
    for reject in rejects:
        if len(some[reject[1]]) < _SHOWN:
            some[reject[1]].append(reject)
    texts = query_texts(judged.queries, [key for rows in some.values() for key, _, _ in rows])
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
