"""The score stage: each teacher judges every pooled (query, passage) pair once, raw.

Model teachers work by part of the corpus, so a passage is encoded once however many queries it is judged
for, and what they once judged is kept by content for every run of the store. What they cannot judge goes
to rejects: such a pair is in no pool. dense and BM25 scores are looked up (lookup.py).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_ray import schema, teachers
from retrieval_ray.artifacts import Location, Stage, each, part_name, stage
from retrieval_ray.config import MemberConfig
from retrieval_ray.contentcache import SCORE, ContentCache
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.stages import pool, query_tokens
from retrieval_ray.stages.collection import Judged, Ranked, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.given import Given
from retrieval_ray.stages.judges import Judge, TeacherId, arguments_of, teacher_id
from retrieval_ray.stages.lookup import Bm25Scorer, DenseScorer
from retrieval_ray.stages.meter import Counted
from retrieval_ray.stages.parts import PartWorker, run_parts, small
from retrieval_ray.stages.pool import Pairs
from retrieval_ray.stages.score_lists import ListScorer, PooledByQuery
from retrieval_ray.stages.score_vllm import VllmYesNo
from retrieval_ray.stages.scores import rejects_name, row_count, write_part
from retrieval_ray.teachers.pairs import judge as judge_pairs
from retrieval_ray.tokens import counting

VERSION = 2


def run(context: Context, ranked: Ranked, judges: list[Judge], groups: Stage | None = None) -> Judged:
    """Have every teacher judge the pools: one score stage per teacher, by its name.

    groups: only the pools of queries that have a training list in this stage.
    """
    scores = {judge.name: _judged(context, judge, ranked, groups) for judge in judges}
    return extend(ranked, Judged, scores=scores)


def similarities(context: Context, ranked: Ranked, groups: Stage | None = None) -> dict[str, Stage]:
    """The student's own cosines of the pools, as ``dense``, where margins need them beside its ranking.

    That is where margins are measured on them and an approximate index may have missed some; else empty.
    """
    config = context.config
    if not config.groups.measured_by_similarity() or config.retrieve.index == "exact":
        return {}
    judge = Judge("dense", MemberConfig(kind="dense"), None)
    return {judge.name: _judged(context, judge, ranked, groups)}


def _judged(context: Context, judge: Judge, ranked: Ranked, groups: Stage | None) -> Stage:
    label = f"teacher on '{ranked.name}': {judge.name}"
    teacher = teacher_id(context, judge, ranked.corpus)
    heads = pool.Heads(ranked, context.config.teacher.depth, context.config.groups.source_rank, groups)
    identity = {
        "version": VERSION,
        "teacher": str(teacher),
        "retrieved": ranked.retrieved.content(),
        **heads.identity(),
        "profile": context.profile.numeric(),
    }
    target = stage(context.store, f"score-{judge.kind}", identity)
    if not context.start(target, label):
        return target
    arguments: dict[str, Any] = {"teacher_id": str(teacher), "target": target}
    light, by_query = small(ranked.corpus), int(ranked.queries.manifest()["buckets"])
    if judge.kind == "bm25":
        arguments |= {"heads": heads}
        return score_parts(
            context, label, Bm25Scorer, arguments, target, teacher, by_query, ranked.name, light=light
        )
    pairs = pool.run(context, heads)
    parts = int(pairs.manifest()["buckets"])
    if judge.kind == "dense":
        arguments |= {"ranked": ranked, "pairs": pairs}
        return score_parts(
            context, label, DenseScorer, arguments, target, teacher, parts, ranked.name, light=light
        )
    if judge.kind == "listwise":
        lists = PooledByQuery(heads, pairs)
        return score_with_model(context, label, judge, teacher, lists, target, by_query, ranked.name)
    tokens = query_tokens.run(context, judge, ranked) if judge.kind == "late" else None
    source = Pooled(pairs, ranked.corpus)
    return score_with_model(context, label, judge, teacher, source, target, parts, ranked.name, tokens)


def of_pairs(context: Context, judge: Judge, pairs: Stage) -> Stage:
    """Have a model judge the given pairs of a pairs stage."""
    teacher = teacher_id(context, judge, None)
    identity = {
        "version": VERSION,
        "teacher": str(teacher),
        "pairs": pairs.content(),
        "profile": context.profile.numeric(),
    }
    target = stage(context.store, f"score-{judge.kind}", identity)
    label = f"teacher: {judge.name}"
    if not context.start(target, label):
        return target
    parts = int(pairs.manifest()["buckets"])
    return score_with_model(context, label, judge, teacher, Given(pairs), target, parts, "pairs")


def gather(output: Location, stages: dict[str, Stage], pairs: list[Stage]) -> dict[str, Any]:
    """Write scores.parquet and rejects.parquet of these stages and, last, scores.json; returns that."""
    (output / "scores.json").remove()
    rejects = [stage.read("rejects.parquet") for stage in pairs[:1]]
    filesystem = output.filesystem
    filesystem.create_dir(output.path, recursive=True)
    rows = 0
    with filesystem.open_output_stream((output / "scores.parquet").path) as stream:
        with pq.ParquetWriter(stream, schema.TABLES["scores"], compression="zstd") as writer:
            for judged in stages.values():
                for name in judged.parts():  # part by part: the whole may be larger than memory
                    if name.startswith("scores-"):
                        table = judged.read(name)
                        writer.write_table(table)
                        rows += table.num_rows
                    else:
                        rejects.append(judged.read(name))
    rejected = pa.concat_tables(rejects)
    (output / "rejects.parquet").write_table(rejected)
    reasons = Counter(rejected.column("reason").to_pylist())
    manifests = {name: judged.manifest() for name, judged in stages.items()}
    first = next(iter(manifests.values()))
    keys = ("teacher", "rows", "rows_this_run", "from_cache", "seconds", "rows_per_second", "versions")
    facts: dict[str, Any] = {
        "rows": rows,
        "rejects": rejected.num_rows,
        "rejected": dict(reasons),
        "repeated": pairs[0].manifest()["rows"] - first["rows"] - sum(first["rejected"].values()),
        "teachers": {name: {key: manifest[key] for key in keys} for name, manifest in manifests.items()},
        "config": first["config"],
    }
    (output / "scores.json").write_json(facts)
    return facts


def score_with_model(
    context: Context,
    label: str,
    judge: Judge,
    teacher: TeacherId,
    source: "PairSource",
    target: Stage,
    parts: int,
    collection: str,
    tokens: Stage | None = None,
) -> Stage:
    """Have a model judge the pairs of ``source``, in so many parts, and finish the stage.

    collection: what the pairs are counted on.
    """
    arguments: dict[str, Any] = {
        "teacher_id": str(teacher),
        "source": source,
        "target": target,
        "store": context.store,
        "parts": parts,
    }
    own = arguments_of(context, judge)
    if judge.kind == "listwise":
        windows = {"window": judge.config.window, "stride": judge.config.stride}
        arguments |= {"endpoint": own, **windows}
        return score_parts(context, label, ListScorer, arguments, target, teacher, parts, collection)
    engine = judge.config.engine if judge.config.engine != "transformers" else judge.kind
    arguments |= {"engine": engine, "arguments": own, "tokens": tokens}
    apart = engine == "vllm"  # which starts processes, and may end the one it is in
    return score_parts(context, label, Scorer, arguments, target, teacher, parts, collection, apart=apart)


def score_parts(
    context: Context,
    label: str,
    worker: type[PartWorker],
    arguments: dict[str, Any],
    target: Stage,
    teacher: TeacherId,
    parts: int,
    collection: str,
    *,
    light: bool = False,
    apart: bool = False,
) -> Stage:
    """Run the missing parts of a score stage and write its manifest; light, apart: as in ``run_parts``.

    Raises ``UserError`` where parts are still open, and where no pair at all could be judged: then no part
    stays, and a later run tries again.
    """
    names = [part_name("scores", number, "parquet") for number in range(parts)]
    missing = set(target.missing(names))
    todo = [{"number": n} for n, name in enumerate(names) if name in missing]
    counted = Counted(target.name, collection, rows="judged")
    facts = run_parts(context, label, worker, arguments, todo, light=light, apart=apart, counted=counted)
    if waiting := [f for f in facts if f.get("open")]:
        raise UserError(
            f"teacher {teacher}: {sum(f['open'] for f in waiting):,} queries have no reply, the last "
            f"because of {waiting[-1]['error']}. What was answered is kept: run the same command again "
            "and only the rest is asked"
        )
    # of the replies of a listwise teacher to this run
    repairs = {"repaired": sum(f["repaired"] for f in facts)} if worker is ListScorer else {}
    judged, cached = (sum(f[key] for f in facts) for key in ("judged", "cached"))
    there = set(target.folder.names())
    rejects = [name for n in range(parts) if (name := rejects_name(n)) in there]
    rejected = Counter(
        reason for name in rejects for reason in target.read(name, ["reason"]).column("reason").to_pylist()
    )
    pairs = sum(each(lambda name: row_count(target, name), names))
    if rejected and not pairs:
        first = target.read(rejects[0]).to_pylist()[0]
        for name in names:
            (target.folder / name).remove()
        raise UserError(
            f"teacher {teacher}: no pair could be judged; the first, {first['id']}: {first['detail']}"
        )
    if rejected:
        said = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common())
        say(f"  warning: {rejected.total():,} pairs have no score ({said}); they stand in rejects")
    context.finish(
        target,
        [*names, *rejects],
        rows=pairs,
        worked=judged,
        busy=sum(f["seconds"] for f in facts),
        from_cache=cached,
        teacher=str(teacher),
        model=teacher.model,
        settings=teacher.settings,
        rejected=dict(rejected),
        **repairs,
    )
    return target


_ENGINES = {**teachers.KINDS, "vllm": VllmYesNo}


class PairSource(Protocol):
    """Where a scorer has its pairs from."""

    def read(self, number: int) -> Pairs:
        """The pairs of part ``number``."""
        ...


@dataclass(frozen=True)
class Pooled:
    """The pairs of a pool stage."""

    pool: Stage
    corpus: Stage

    def read(self, number: int) -> Pairs:
        return pool.read(self.pool, self.corpus, number)


class Scorer:
    """Judges the pairs of one part with a model, asking the cache first."""

    def __init__(
        self,
        teacher_id: str,
        source: PairSource,
        target: Stage,
        store: Location,
        parts: int,
        engine: str,
        arguments: dict[str, Any],
        tokens: Stage | None,
    ) -> None:
        self.teacher_id, self.source, self.target, self.parts = teacher_id, source, target, parts
        self.cache = ContentCache(store / "scores", teacher_id, SCORE)
        self.tokens = query_tokens.Stored(tokens) if tokens else None
        stored = {"query_tokens": self.tokens} if self.tokens else {}
        self.teacher = _ENGINES[engine](**arguments, **stored)
        self.answered: tuple[str, str] | None = None  # the texts of a pair of an earlier part
        self.place: dict[str, tuple[int, int]] = {}  # where its query stands

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        pairs = self.source.read(number)
        known = self.cache.read(number, self.parts)
        queries, passages = pairs.queries, pairs.passages
        keys = [self.cache.key(q, p) for q, p in zip(queries, passages, strict=True)]
        # each different pair of texts once, though it may stand there under several ids
        new = {key: at for at, key in enumerate(keys) if key not in known}
        if self.tokens is not None:
            self.tokens.places = self.place | dict(zip(queries, pairs.places, strict=True))
        at = list(new.values())
        with counting() as read:
            scores, failed = judge_pairs(
                self.teacher.score,
                [queries[i] for i in at],
                [passages[i] for i in at],
                answered=self.answered,
            )
        found = {key: float(s) for key, s in zip(new, scores, strict=True) if np.isfinite(s)}
        reasons = {key: failed[n] for n, key in enumerate(new) if n in failed}
        self.cache.write(number, self.parts, list(found), list(found.values()))
        known |= found
        if (judged := next((i for key, i in new.items() if key in found), None)) is not None:
            self.answered = queries[judged], passages[judged]
            self.place = {queries[judged]: pairs.places[judged]} if self.tokens else {}
        ids = list(zip(pairs.query_ids, pairs.passage_ids, keys, strict=True))
        rejects = [(f"{q} {p}", *reasons[key]) for q, p, key in ids if key in reasons]
        write_part(
            self.target,
            number,
            self.teacher_id,
            [(q, p, known[key]) for q, p, key in ids if key in known],
            rejects,
        )
        errors = Counter(reason for _, reason, _ in rejects)
        return {"judged": len(found), "cached": len(keys) - len(new), "tokens": read(), "errors": errors}
