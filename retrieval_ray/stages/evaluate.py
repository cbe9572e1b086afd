"""The evaluate stage: every system's ranking of the judged test queries, measured per query."""

from collections.abc import Mapping
from urllib.parse import quote

import pyarrow as pa

from retrieval_ray import gate, metrics, schema
from retrieval_ray.artifacts import Stage, stage
from retrieval_ray.runs import Ranking
from retrieval_ray.stages.collection import Grouped, Ranked
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judged_pools import judged_pools
from retrieval_ray.stages.queries import qrels_of
from retrieval_ray.stages.retrieve import FUSED, rankings_of

VERSION = 1
CUT = 100  # no metric looks deeper


def run(context: Context, grouped: Grouped, adapted: Ranked | None) -> Stage:
    """Measure base, BM25, teacher and, where one was trained, the candidate (``adapted``)."""
    identity = {
        "version": VERSION,
        "corpus": grouped.name,
        "queries": grouped.queries.content(),
        "retrieved": grouped.retrieved.content(),
        "scores": {teacher: scores.content() for teacher, scores in grouped.scores.items()},
        "groups": grouped.groups.content(),
        "weights": grouped.groups.manifest()["gate"]["weights"],
        "candidate": adapted.retrieved.content() if adapted else None,
        "systems": context.config.evaluate.systems,
        "depth": context.config.teacher.depth,
        "relevance_threshold": grouped.relevance_threshold,
    }
    target = stage(context.store, "evaluate", identity)
    if not context.start(target, f"evaluation on '{grouped.name}'"):
        return target
    qrels = qrels_of(grouped.queries, "test")
    runs = {"base": rankings_of(grouped.retrieved, "dense", qrels)}
    if "bm25" in context.config.evaluate.systems:
        runs["bm25"] = rankings_of(grouped.retrieved, "bm25", qrels)
    if "teacher" in context.config.evaluate.systems:
        runs["teacher"] = _teacher_run(context, grouped, qrels)
    if adapted is not None:
        runs["candidate"] = rankings_of(adapted.retrieved, "dense", qrels)
    rows: list[dict[str, object]] = []
    for system, run in runs.items():
        cut = {q: run.get(q, [])[:CUT] for q in qrels}
        target.write(f"run-{system}.parquet", _run_table(system, cut))
        values = metrics.per_query(
            qrels,
            {q: [p for p, _ in ranking] for q, ranking in cut.items()},
            relevance_threshold=grouped.relevance_threshold,
        )
        rows += [
            {"system": system, "query_id": q, "metric": metric, "value": value}
            for q in sorted(values)
            for metric, value in values[q].items()
        ]
    target.write("evaluation.parquet", schema.from_rows("evaluation", rows))
    context.finish(
        target,
        [*(f"run-{system}.parquet" for system in runs), "evaluation.parquet"],
        rows=len(rows),
        collection=grouped.name,
        queries=len(qrels),
        exclude_same_id=context.config.evaluate.exclude_same_id,
    )
    return target


def values_of(evaluated: Stage) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by system and query_id."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in evaluated.read("evaluation.parquet").to_pylist():
        query = found.setdefault(row["system"], {}).setdefault(row["query_id"], {})
        query[row["metric"]] = row["value"]
    return found


def trec_lines(evaluated: Stage, system: str, tag: str) -> str:
    """A system's run in TREC format: ``qid Q0 docid rank score tag``.

    The format parts its fields at white space, so that of an id is percent-encoded.
    """
    rows = evaluated.read(f"run-{system}.parquet").to_pylist()
    return "".join(
        f"{_unspaced(r['query_id'])} Q0 {_unspaced(r['passage_id'])} {r['rank']} {r['score']:.10g} {tag}\n"
        for r in rows
    )


def _unspaced(key: str) -> str:
    """The id, percent-encoded if it has white space; other ids stay what judgements call them."""
    spaced = any(c.isspace() for c in key)
    return "".join(quote(c) if c.isspace() or c == "%" else c for c in key) if spaced else key


def _teacher_run(
    context: Context, grouped: Grouped, qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, Ranking]:
    """The teacher's order of its pool, then the rest of the fused ranking below it.

    Scores of the run are ranks counted backwards: those of the two halves cannot be compared.
    """
    weights = grouped.groups.manifest()["gate"]["weights"]
    depth = context.config.teacher.depth
    pools = judged_pools(grouped, depth, qrels)
    runs = {}
    for query_id, ranking in rankings_of(grouped.retrieved, FUSED, qrels).items():
        order = gate.rerank(pools[query_id], weights)
        pooled = set(order)
        order += [p for p, _ in ranking if p not in pooled]
        runs[query_id] = [(p, float(len(order) - n)) for n, p in enumerate(order)]
    return runs


def _run_table(system: str, rankings: Mapping[str, Ranking]) -> pa.Table:
    return schema.from_rows(
        "run",
        [
            {"retriever": system, "query_id": q, "passage_id": p, "rank": rank, "score": score}
            for q in sorted(rankings)
            for rank, (p, score) in enumerate(rankings[q], start=1)
        ],
    )
