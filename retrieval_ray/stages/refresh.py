"""Fresh negatives: training lists made anew from what the student retrieves by now (ANCE, arXiv 2007.00808).

A refresh encodes and searches the corpus with the student as it was at some step and has the teacher judge
the pairs that it has not judged yet. The queries, their order, the dev lists and every normalisation of
scores stay those of the first lists, and so do the suspected false negatives: only the passages of the
training lists change. The positive of a query without a source is the teacher's first, so it may be a better
one than before.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from retrieval_ray import groups, schema
from retrieval_ray.artifacts import Stage, stage
from retrieval_ray.config import TrainConfig
from retrieval_ray.gate import JudgedPool
from retrieval_ray.model_files import Model
from retrieval_ray.progress import say
from retrieval_ray.stages import encode, index, negatives, retrieve, score
from retrieval_ray.stages.collection import Grouped, Judged, Ranked, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.group import lengths, margins_of, row_of
from retrieval_ray.stages.judged_pools import pools_by_part, similarities_of
from retrieval_ray.stages.judges import Judge
from retrieval_ray.stages.queries import queries_table
from retrieval_ray.stages.scores import ByQuery

VERSION = 3
_FACTS = ("rows", "renewed", "new_negatives", "kept", "judged", "from_cache", "seconds")


def wanted(train: TrainConfig) -> bool:
    """Whether the config asks for fresh negatives."""
    return train.refresh_steps is not None or train.refresh_epochs is not None


def steps_between(train: TrainConfig, per_epoch: int) -> int | None:
    """N, the steps from one refresh to the next; None: the first lists stay."""
    if train.refresh_epochs is not None:
        return max(1, round(train.refresh_epochs * per_epoch))
    return train.refresh_steps


def read_of(first: Grouped) -> list[str]:
    """What decides the refreshes of a corpus beside the student's weights."""
    return [each.fingerprint for each in (first.groups, first.retrieved, *first.scores.values())]


def run(
    context: Context, corpora: list[Grouped], judges: list[Judge], student: Model, step: int
) -> list[Grouped]:
    """The corpora with training lists that this student's retrieval gives; step: when it was so."""
    note = f", negatives as of step {step}"
    return [_renewed(context, first, judges, student, note) for first in corpora]


def facts(corpora: list[Grouped]) -> dict[str, dict[str, Any]]:
    """By corpus: how many lists were renewed, the share of negatives that are new, what was judged."""
    found = {}
    for corpus in corpora:
        manifest = corpus.groups.manifest()
        found[corpus.name] = {key: manifest[key] for key in _FACTS}
    return found


def _renewed(context: Context, first: Grouped, judges: list[Judge], student: Model, note: str) -> Grouped:
    identity = {
        "version": VERSION,
        "first": [first.groups.content(), *read_of(first)],
        "student": student.sha,
        "profile": context.profile.numeric(),
    }
    target = stage(context.store, "refresh", identity)
    fresh = replace(first, groups=target)
    if context.start(target, f"lists of '{first.name}'{note}"):
        _mine(context, first, judges, student, note, target)
    if first.negatives is None:
        return fresh
    return negatives.run(context, fresh, earlier=first.negatives)


def _mine(
    context: Context, first: Grouped, judges: list[Judge], student: Model, note: str, target: Stage
) -> None:
    """Write the lists that this student's retrieval gives."""
    now = context.with_student(student)
    encoded = encode.run(now, first, note)
    ranked = retrieve.run(now, encoded, first.retrievers, note, others=first.retrieved)
    # The teachers are those of the first round, also where one is the student of then.
    judged = score.run(context, extend(first, Ranked, retrieved=ranked.retrieved), judges, first.groups)
    first_rows = first.groups.read("groups.parquet").to_pylist()
    trained = {row["query_id"]: row for row in first_rows if row["split"] == "train"}
    near = score.similarities(now, ranked, first.groups)
    renewed = dict(_renewed_lists(context, first, judged, near, trained, target))
    rows, kept, shares = [], Counter[str](), []
    for row in first_rows:
        made = renewed.get(row["query_id"])
        if isinstance(made, groups.Group):
            new = set(made.passage_ids[1:]) - set(row["passage_ids"])
            shares.append(len(new) / (len(made.passage_ids) - 1))
            row = row_of(first.name, made, "train")
        elif made is not None:
            kept[made[0]] += 1
        rows.append(row)
    target.write("groups.parquet", schema.from_rows("groups", rows))
    scored = [each.manifest() for each in judged.scores.values()]
    context.finish(
        target,
        ["groups.parquet"],
        rows=len(rows),
        collection=first.name,
        renewed=len(shares),
        kept=dict(kept),
        new_negatives=round(float(np.mean(shares)), 4) if shares else None,
        judged=sum(each["rows_this_run"] for each in scored),
        from_cache=sum(each.get("from_cache", 0) for each in scored),
    )
    found = target.manifest()
    say(
        f"  {found['renewed']:,} lists renewed, {sum(kept.values()):,} kept; "
        f"{found['new_negatives'] or 0:.0%} of their negatives are new; {found['judged']:,} pairs judged, "
        f"{found['from_cache']:,} known"
    )
    # as large as the corpus, and never read again
    if built := index.run(now, first.name, encoded.passages, note):
        built[0].folder.remove()
    encoded.passages.folder.remove()


def _renewed_lists(
    context: Context,
    first: Grouped,
    judged: Judged,
    near: dict[str, Stage],
    trained: dict[str, dict[str, Any]],
    target: Stage,
) -> Iterator[tuple[str, groups.Group | tuple[str, str]]]:
    """The new list of each of these rows of the groups table, or (reason, detail) why the old one is kept.

    near: the cosines of now, where margins need them. One part of queries is held at a time.
    """
    config, depth = context.config.groups, context.config.teacher.depth
    margins, by_similarity = margins_of(context), config.measured_by_similarity()
    sizes = lengths(context, first.corpus)
    manifest = first.groups.manifest()
    weights: dict[str, float] = manifest["gate"]["weights"]
    scales = {kind: groups.Scale(**values) for kind, values in manifest["scales"].items()}
    table = queries_table(first.queries)
    columns = (table.column(name).to_pylist() for name in ("query_id", "passage_id"))
    sources = dict(zip(*columns, strict=True))
    with target.scratch() as old, target.scratch() as new, target.scratch() as beside:
        parts = [
            pools_by_part(each, ByQuery(each.queries, each.scores, at), depth)
            for each, at in ((first, old), (judged, new))
        ]
        similar = ByQuery(first.queries, near, beside) if near else None
        for number, ((before, _), (pools, rankings)) in enumerate(zip(*parts, strict=True)):
            cosines = similar.part(number) if similar else {}
            for key in before.keys() & trained.keys():
                row = trained[key]
                if key not in pools:
                    yield key, ("nothing_retrieved", "")
                    continue
                held = with_passage(pools[key], row["positive_id"], before[key])
                if len(held.passage_ids) < sizes["fewest"]:
                    yield key, ("short_list", f"{len(held.passage_ids)} passages")
                    continue
                scores_N = groups.combine(held.teachers, weights, before[key].teachers)
                pool = groups.Pool(key, row["kind"], sources[key], held.passage_ids, scores_N)
                if by_similarity:
                    known_N = similarities_of(key, held.passage_ids, cosines)
                    pool = groups.with_similarities(pool, rankings["dense"].get(key, []), known_N)
                made = groups.build(
                    pool,
                    scales[row["kind"]],
                    **sizes,
                    false_negative_ratio=config.false_negative_ratio,
                    negatives=config.negatives,
                    margins=margins,
                )
                if isinstance(
                    made, groups.Group
                ):  # in no batch is a passage a negative that once was too good
                    known = {*made.excluded_ids, *row["excluded_ids"]} - {made.passage_ids[0]}
                    made = replace(made, excluded_ids=sorted(known))
                yield key, made


def with_passage(pool: JudgedPool, passage_id: str, first: JudgedPool) -> JudgedPool:
    """The pool with this passage at its end, scored as in the first pool, where it lacks it."""
    if passage_id in pool.passage_ids:
        return pool
    at = list(first.passage_ids).index(passage_id)
    return JudgedPool(
        [*pool.passage_ids, passage_id],
        {name: np.append(scores_N, first.teachers[name][at]) for name, scores_N in pool.teachers.items()},
    )
