"""Teachers that need no model of their own in a worker: the student's cosine, and BM25."""

from collections import defaultdict
from typing import Any

import numpy as np

from retrieval_ray.artifacts import Stage, part_name
from retrieval_ray.runs import exact_dot
from retrieval_ray.stages import pool
from retrieval_ray.stages.collection import Ranked
from retrieval_ray.stages.encode import Vectors, part_texts
from retrieval_ray.stages.query_rows import QueryRows
from retrieval_ray.stages.retrieve import bm25_of
from retrieval_ray.stages.scores import scores_table


class DenseScorer:
    """The student's cosine of the pairs of one part; holds the vectors of one part of the corpus alone."""

    def __init__(self, teacher_id: str, ranked: Ranked, pairs: Stage, target: Stage) -> None:
        self.teacher_id, self.pool, self.target = teacher_id, pairs, target
        self.corpus, self.passages = ranked.corpus, Vectors(ranked.passages, [])
        self.queries = QueryRows(ranked.query_vectors, "vectors")

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        pairs = pool.read(self.pool, self.corpus, number)
        (where,) = pool.corpus_parts(self.pool, [number])
        vectors = self.passages.part(where)
        row_of = {passage_id: row for row, passage_id in enumerate(vectors.ids)}
        query_D = self.queries.take(pairs.places, "vector")
        by_query: dict[tuple[int, int], list[int]] = defaultdict(list)
        for at, place in enumerate(pairs.places):
            by_query[place].append(at)
        rows: list[tuple[str, str, float]] = []
        for place, ats in by_query.items():
            found = vectors.matrix[[row_of[pairs.passage_ids[at]] for at in ats]]
            query = np.asarray(query_D[place].values.to_numpy(zero_copy_only=False))
            scores = exact_dot(query, found).tolist()
            rows += [
                (pairs.query_ids[at], pairs.passage_ids[at], s) for at, s in zip(ats, scores, strict=True)
            ]
        self.target.write(part_name("scores", number, "parquet"), scores_table(self.teacher_id, rows))
        return {"judged": len(rows), "cached": 0}


class Bm25Scorer:
    """BM25 scores of the pools of one part of queries; holds the index of the corpus."""

    def __init__(self, teacher_id: str, heads: pool.Heads, target: Stage) -> None:
        self.teacher_id, self.heads, self.target = teacher_id, heads, target
        self.bm25 = bm25_of(heads.ranked.corpus)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        number = int(part["number"])
        passages: dict[str, list[str]] = defaultdict(list)
        table = self.heads.part(number)
        columns = (table.column(name).to_pylist() for name in ("query_id", "passage_id"))
        for query_id, passage_id in zip(*columns, strict=True):
            passages[query_id].append(passage_id)
        rows: list[tuple[str, str, float]] = []
        for query_id, text in zip(*part_texts(self.heads.ranked.queries, number, "query"), strict=True):
            own = passages.get(query_id, [])
            rows += [(query_id, p, s) for p, s in zip(own, self.bm25.score(text, own), strict=True)]
        self.target.write(part_name("scores", number, "parquet"), scores_table(self.teacher_id, rows))
        return {"judged": len(rows), "cached": 0}
