"""The score stage: each teacher judges every pooled (query, passage) pair once, raw.

The pool of a query is the head of its fused ranking. Model teachers work by bucket of the passage
text, so a passage is encoded once however many queries it is judged for; dense and BM25 scores are
looked up by part of queries.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_ray import bm25, schema
from retrieval_ray.artifacts import Location, Stage, part_name, stage
from retrieval_ray.contentcache import SCORE, ContentCache
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import Model
from retrieval_ray.runs import exact_dot
from retrieval_ray.stages.collection import Judged, Ranked, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import Vectors, part_texts, student_arguments, student_identity
from retrieval_ray.stages.parts import run_parts
from retrieval_ray.stages.queries import queries_table
from retrieval_ray.stages.retrieve import FUSED, bm25_of
from retrieval_ray.student import TOKEN_VECTORS, Student
from retrieval_ray.teacher import CrossEncoderTeacher, late_interaction

VERSION = 1
EMBEDDED = ("late", "bm25", "dense")


def run(context: Context, ranked: Ranked, cross_encoder: Model | None) -> Judged:
    """Have every teacher judge the pools: one score stage per teacher, by its short name."""
    teachers = ("cross_encoder",) if cross_encoder is not None else EMBEDDED
    return extend(
        ranked,
        Judged,
        scores={teacher: _run_teacher(context, teacher, ranked, cross_encoder) for teacher in teachers},
    )


def _run_teacher(context: Context, teacher: str, ranked: Ranked, cross_encoder: Model | None) -> Stage:
    label = f"teacher on '{ranked.name}': {teacher}"
    config = context.config.teacher
    teacher_id = _teacher_id(context, teacher, ranked.corpus, cross_encoder)
    identity = {
        "version": VERSION,
        "teacher": teacher_id,
        "retrieved": ranked.retrieved.content(),
        "depth": config.depth,
        "profile": context.profile.numeric(),
    }
    target = stage(context.store, f"score-{teacher}", identity)
    if not context.start(target, label):
        return target
    by_passage = teacher in ("late", "cross_encoder")
    buckets = int((ranked.corpus if by_passage else ranked.queries).manifest()["buckets"])
    names = [part_name("scores", number, "parquet") for number in range(buckets)]
    missing = set(target.missing(names))
    arguments: dict[str, Any] = {
        "teacher_id": teacher_id, "ranked": ranked, "depth": config.depth, "target": target,
    }  # fmt: skip
    worker: type[_ModelScorer] | type[_LookupScorer]
    if by_passage:
        worker = _ModelScorer
        arguments |= {
            "store": context.store,
            "buckets": buckets,
            "late": student_arguments(context) if teacher == "late" else None,
            "cross_encoder": None
            if cross_encoder is None
            else {
                "model": cross_encoder.source,
                "max_tokens": config.max_tokens,
                "device": context.profile.device,
                "trust_remote_code": config.trust_remote_code,
            },
            "token_budget": context.profile.token_budget,
        }
    else:
        worker = _LookupScorer
        arguments |= {"teacher": teacher}
    facts = run_parts(
        context,
        label,
        worker,
        arguments,
        [{"number": n} for n, name in enumerate(names) if name in missing],
    )
    judged, cached = (sum(f[key] for f in facts) for key in ("judged", "cached"))
    pairs = sum(target.read(name, ["query_id"]).num_rows for name in names)
    context.finish(target, names, rows=pairs, worked=judged, from_cache=cached, teacher=teacher_id)
    return target


def scores_of(judged: Judged) -> dict[str, dict[tuple[str, str], float]]:
    """Raw scores by teacher and (query_id, passage_id)."""
    found = {}
    for teacher, scores in judged.scores.items():
        table = scores.read_all("scores-", ["query_id", "passage_id", "score"])
        q, p, s = (table.column(c).to_pylist() for c in ("query_id", "passage_id", "score"))
        found[teacher] = dict(zip(zip(q, p, strict=True), s, strict=True))
    return found


def _teacher_id(context: Context, teacher: str, corpus: Stage, cross_encoder: Model | None) -> str:
    """Everything that decides a score beside the two texts."""
    if teacher == "bm25":
        return f"bm25@{corpus.fingerprint}-{bm25.VERSION}"
    if cross_encoder is not None:
        config = context.config.teacher
        return f"cross_encoder@{cross_encoder.sha[:16]}-{config.max_tokens}-{context.profile.precision}"
    student = student_identity(context)
    settings = "-".join(f"{key}={student[key]!r}" for key in sorted(student) if key != "sha")
    numbers = "-".join(map(str, context.profile.numeric().values()))
    version = f"-v{TOKEN_VECTORS}" if teacher == "late" else ""
    return f"{teacher}@{context.student.sha[:16]}-{numbers}-{settings}{version}"


def _pool(retrieved: Stage, depth: int) -> pa.Table:
    """The pairs to judge: the head of every fused ranking."""
    table = retrieved.read_all("run-")
    keep = pc.and_(pc.equal(table.column("retriever"), FUSED), pc.less_equal(table.column("rank"), depth))
    return table.filter(keep).select(["query_id", "passage_id"])


def _scores_table(teacher_id: str, rows: list[tuple[str, str, float]]) -> pa.Table:
    ordered = sorted(rows)
    return pa.table(
        {
            "teacher": [teacher_id] * len(ordered),
            "query_id": [row[0] for row in ordered],
            "passage_id": [row[1] for row in ordered],
            "score": pa.array([row[2] for row in ordered], pa.float32()),
        },
        schema=schema.TABLES["scores"],
    )


class _ModelScorer:
    """Judges the pairs of one bucket of passages with a model, asking the cache first."""

    def __init__(
        self,
        teacher_id: str,
        ranked: Ranked,
        depth: int,
        target: Stage,
        store: Location,
        buckets: int,
        late: dict[str, Any] | None,
        cross_encoder: dict[str, Any] | None,
        token_budget: int,
    ) -> None:
        self.teacher_id, self.corpus, self.target = teacher_id, ranked.corpus, target
        self.buckets, self.budget = buckets, token_budget
        self.cache = ContentCache(store / "scores", teacher_id, SCORE)
        table = queries_table(ranked.queries)
        self.query_texts: dict[str, str] = dict(
            zip(table.column("query_id").to_pylist(), table.column("text").to_pylist(), strict=True)
        )
        self.pool = _pool(ranked.retrieved, depth)
        self.student = Student(**late) if late else None
        self.cross_encoder = CrossEncoderTeacher(**cross_encoder) if cross_encoder else None
        if self.student is not None:
            # Query tokens once per worker; batches are cut over all queries, whatever the part.
            ids = sorted(self.query_texts)
            vectors = self.student.token_vectors(
                [self.query_texts[key] for key in ids], "query", token_budget=token_budget
            )
            self.query_tokens = dict(zip(ids, vectors, strict=True))

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        ids, texts = part_texts(self.corpus, number, "passage")
        text_of = dict(zip(ids, texts, strict=True))
        mine = self.pool.filter(pc.is_in(self.pool.column("passage_id"), pa.array(ids, pa.string())))
        pairs = sorted(
            zip(
                mine.column("passage_id").to_pylist(),
                mine.column("query_id").to_pylist(),
                strict=True,
            )
        )
        known = self.cache.read(number, self.buckets)
        keys = {(p, q): self.cache.key(self.query_texts[q], text_of[p]) for p, q in pairs}
        new = [pair for pair in pairs if keys[pair] not in known]
        scores = self._judge(new, text_of)
        if not np.isfinite(scores).all():
            worst = new[int(np.argmin(np.isfinite(scores)))]
            raise UserError(
                f"teacher {self.teacher_id}: its score of query '{worst[1]}' and passage '{worst[0]}' is "
                "not a finite number; try compute.precision=float32, or another teacher"
            )
        known.update((keys[pair], score) for pair, score in zip(new, scores, strict=True))
        self.cache.write(number, self.buckets, [keys[pair] for pair in new], scores)
        self.target.write(
            part_name("scores", number, "parquet"),
            _scores_table(self.teacher_id, [(q, p, known[keys[p, q]]) for p, q in pairs]),
        )
        return {"judged": len(new), "cached": len(pairs) - len(new)}

    def _judge(self, pairs: list[tuple[str, str]], text_of: dict[str, str]) -> list[float]:
        if not pairs:
            return []
        if self.cross_encoder is not None:
            texts = [(self.query_texts[q], text_of[p]) for p, q in pairs]
            return [float(score) for score in self.cross_encoder.score(texts)]
        assert self.student is not None
        by_passage: dict[str, list[str]] = defaultdict(list)
        for passage, query in pairs:  # sorted by passage, so the order of scores is that of pairs
            by_passage[passage].append(query)
        vectors = self.student.token_vectors(
            [text_of[p] for p in by_passage], "passage", token_budget=self.budget
        )
        scores: list[float] = []
        for (_, queries), passage_TD in zip(by_passage.items(), vectors, strict=True):
            scores += late_interaction([self.query_tokens[q] for q in queries], passage_TD)
        return scores


class _LookupScorer:
    """Dense and BM25 scores of the pooled pairs of one part of queries."""

    def __init__(
        self,
        teacher_id: str,
        teacher: str,
        ranked: Ranked,
        depth: int,
        target: Stage,
    ) -> None:
        self.teacher_id, self.teacher, self.target = teacher_id, teacher, target
        self.queries, self.query_vectors = ranked.queries, ranked.query_vectors
        self.pool: dict[str, list[str]] = defaultdict(list)
        table = _pool(ranked.retrieved, depth)
        for q, p in zip(
            table.column("query_id").to_pylist(),
            table.column("passage_id").to_pylist(),
            strict=True,
        ):
            self.pool[q].append(p)
        if teacher == "dense":
            self.vectors = Vectors.all(ranked.passages)
            self.position = {p: n for n, p in enumerate(self.vectors.ids)}
        else:
            self.bm25 = bm25_of(ranked.corpus)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        rows: list[tuple[str, str, float]] = []
        if self.teacher == "dense":
            queries = Vectors(self.query_vectors, [number])
            for query_id, query_D in zip(queries.ids, queries.matrix, strict=True):
                passages = self.pool.get(query_id, [])
                if passages:
                    found = self.vectors.matrix[[self.position[p] for p in passages]]
                    scores = exact_dot(query_D, found)
                    rows += [(query_id, p, float(s)) for p, s in zip(passages, scores, strict=True)]
        else:
            for query_id, text in zip(*part_texts(self.queries, number, "query"), strict=True):
                passages = self.pool.get(query_id, [])
                scores_found = self.bm25.score(text, passages)
                rows += [(query_id, p, s) for p, s in zip(passages, scores_found, strict=True)]
        self.target.write(part_name("scores", number, "parquet"), _scores_table(self.teacher_id, rows))
        return {"judged": len(rows), "cached": 0}
