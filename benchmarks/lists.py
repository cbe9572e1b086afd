"""Lists to take training steps on: drawn at random, or from a BEIR folder with BM25's negatives."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_ray.bm25 import Bm25
from retrieval_ray.step import Lists
from retrieval_ray.student import Student
from retrieval_ray.tokens import Tokens

MODEL = "all-MiniLM-L6-v2"
POOL = 4200  # synthetic passages; 512 lists of 20 refer to each of them 2.67 times, as on SciFact


@dataclass(frozen=True)
class Task:
    """Lists, and the tokens of what they name."""

    lists: Lists
    rows: dict[str, Tokens]

    def first(self, size: int) -> "Task":
        return self.take(range(min(size, len(self.lists.query_ids))))

    def take(self, chosen: Iterable[int]) -> "Task":
        """Some of the lists, and the tokens of no other text."""
        places, lists = list(chosen), self.lists
        queries = [lists.query_ids[n] for n in places]
        passages = [lists.passage_ids[n] for n in places]
        named = [*queries, *(passage for row in passages for passage in row)]
        left_out = [lists.excluded_ids[n] for n in places]
        return Task(
            Lists(queries, passages, lists.teacher_BK[places], left_out),
            {name: self.rows[name] for name in named},
        )


def synthetic(size: int, places: int, limit: int) -> Task:
    """Passages of SciFact's lengths and overlap."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(0.85 * limit, 0.2 * limit, POOL), 16, limit).astype(int)
    rows = {f"p{n}": _tokens(rng, length) for n, length in enumerate(lengths)}
    rows |= {f"q{n}": _tokens(rng, length) for n, length in enumerate(rng.integers(8, 32, size))}
    lists = [[f"p{n}" for n in rng.choice(POOL, places, replace=False)] for _ in range(size)]
    return Task(_lists([f"q{n}" for n in range(size)], lists), rows)


def _tokens(rng: np.random.Generator, length: int) -> Tokens:
    return np.array([101, *rng.integers(1000, 30_000, length - 2), 102], dtype=np.int64)


def beir(folder: Path, size: int, places: int, limit: int) -> Task:
    """The first queries that have a judged passage, and BM25's best passages beside it."""
    corpus = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _jsonl(folder, "corpus")}
    queries = {row["_id"]: row["text"] for row in _jsonl(folder, "queries")}
    judged: dict[str, list[str]] = {}
    for file in sorted((folder / "qrels").glob("*.tsv")):
        for line in file.read_text().splitlines()[1:]:
            query, passage, relevance = line.split("\t")
            if int(relevance) > 0 and passage in corpus:
                judged.setdefault(query, []).append(passage)
    chosen = [str(q) for q in np.random.default_rng(0).permutation(sorted(judged))[:size]]
    index = Bm25(list(corpus), list(corpus.values()))
    spare = list(corpus)[: 2 * places]  # for a query that shares words with few passages
    lists = []
    for query in chosen:
        found = [passage for passage, _ in index.search(queries[query], 2 * places)]
        others = [p for p in dict.fromkeys([*found, *spare]) if p not in judged[query]]
        lists.append([judged[query][0], *others[: places - 1]])
    student = Student(MODEL, precision="float32", device="cpu")
    passages = sorted({p for row in lists for p in row})
    rows = dict(
        zip(passages, student.tokenize([corpus[p] for p in passages], "passage", limit=limit), strict=True)
    )
    found_rows = student.tokenize([queries[q] for q in chosen], "query", limit=64)
    return Task(
        _lists([f"query {q}" for q in chosen], lists),
        rows | {f"query {q}": row for q, row in zip(chosen, found_rows, strict=True)},
    )


def _jsonl(folder: Path, name: str) -> list[dict[str, Any]]:
    with open(folder / f"{name}.jsonl") as file:
        return [json.loads(line) for line in file]


def _lists(queries: list[str], lists: list[list[str]]) -> Lists:
    teacher = np.random.default_rng(1).random((len(lists), len(lists[0])))
    teacher[:, 0] = 1.0
    return Lists(queries, lists, teacher, [[] for _ in lists])


def without_clashes(task: Task, most: int) -> Task:
    """Lists none of which holds another one's positive: there both ways to InfoNCE are the same."""
    chosen: list[int] = []
    positives: set[str] = set()
    passages: set[str] = set()
    for n, row in enumerate(task.lists.passage_ids):
        if row[0] not in passages and not positives & set(row) and len(chosen) < most:
            chosen.append(n)
            positives.add(row[0])
            passages |= set(row)
    return task.take(chosen)
