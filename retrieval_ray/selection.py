"""Which epoch to return: dev measures, and the choice by them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval_ray.batching import unique_passages
from retrieval_ray.losses import listwise_kl
from retrieval_ray.metrics import Qrels, per_query
from retrieval_ray.runs import top_k
from retrieval_ray.step import Lists, embed_shared
from retrieval_ray.student import Role, Student
from retrieval_ray.tokens import Tokens

_KL_GUARD = 1.5  # times the untouched student's
Rows = Mapping[Role, Mapping[str, Tokens]]


@dataclass(frozen=True)
class Dev:
    """What the dev measures of one corpus read: lists held out, and judged queries where there are some."""

    lists: Lists
    qrels: Qrels
    pools: Mapping[str, Sequence[str]]  # passages that a judged query's order is made of
    rows: Rows  # tokens of all of these


def chosen(history: Sequence[Mapping[str, float]]) -> int:
    """The epoch to return, 0 being the untouched student.

    With judged dev queries the highest nDCG@10. Without, the highest nDCG@10 against the teacher's
    order, the dev KL being a guard: an epoch far from the teacher's distribution is not taken. The KL
    itself does not choose: it fell while quality fell, and rose while quality rose (LOG.md).
    """
    base = history[0]
    best, best_value = 0, _value(base)
    for row in history[1:]:
        if "dev_ndcg@10" not in row and row["dev_kl"] > _KL_GUARD * base["dev_kl"]:
            continue
        if _value(row) > best_value:
            best, best_value = int(row["epoch"]), _value(row)
    return best


def candidate(history: Sequence[Mapping[str, float]]) -> int:
    """The best trained epoch, whether or not it beats the untouched student."""
    picked = chosen(history)
    if picked:
        return picked
    return int(max(history[1:], key=lambda row: (_value(row), -row["epoch"]))["epoch"])


def gain(history: Sequence[Mapping[str, float]], epoch: int) -> float:
    """By how much the measure that chooses rose from the untouched student to this epoch."""
    values = {int(row["epoch"]): _value(row) for row in history}
    return values[epoch] - values[0]


def measure(row: Mapping[str, float]) -> str:
    """The name of the measure that chooses."""
    return "dev_ndcg@10" if "dev_ndcg@10" in row else "teacher_ndcg@10"


def _value(row: Mapping[str, float]) -> float:
    return row[measure(row)]


def evaluate(
    student: Student,
    corpora: Sequence[Dev],
    *,
    student_temperature: float,
    teacher_temperature: float,
    chunk_tokens: int,
) -> tuple[dict[str, float], list[float]]:
    """Dev measures, averaged over corpora by their number of dev queries; and the one that chooses, by query.

    ``dev_ndcg@10`` on judged queries over their pools where any corpus has them; ``dev_kl`` and
    ``teacher_ndcg@10`` (the teacher's favourites as relevant) on the lists held out. Values by query stand
    in the order of corpora, then of query ids or, without judged queries, of lists.
    """
    values: dict[str, list[float]] = {}

    for dev in corpora:
        count = len(dev.lists.query_ids)
        if count:
            student_BK = scores_of_lists(student, dev.lists, dev.rows, chunk_tokens)
            teacher_BK = torch.from_numpy(np.asarray(dev.lists.teacher_BK, dtype=np.float64))
            kl = listwise_kl(
                student_BK,
                teacher_BK,
                student_temperature=student_temperature,
                teacher_temperature=teacher_temperature,
            )
            values.setdefault("dev_kl", []).extend([float(kl)] * count)
            against = _ndcg_against(student_BK.numpy(), teacher_BK.numpy())
            values.setdefault("teacher_ndcg@10", []).extend(against)
        if dev.qrels:
            queries = sorted(dev.qrels)
            pools = [list(dev.pools.get(query, ())) for query in queries]
            run = _rank_pools(student, queries, pools, dev.rows, chunk_tokens)
            by_query = per_query(dev.qrels, run)
            values.setdefault("dev_ndcg@10", []).extend(by_query[query]["ndcg@10"] for query in queries)
    means = {name: sum(found) / len(found) for name, found in values.items()}
    return means, values[measure(means)]


def scores_of_lists(student: Student, lists: Lists, rows: Rows, chunk_tokens: int) -> Tensor:
    """student_BK: cosines of each query with its own list, float64, no graph.

    A list shorter than K is filled up with its first passage.
    """
    longest = max(map(len, lists.passage_ids))
    unique = unique_passages([[*row, *[row[0]] * (longest - len(row))] for row in lists.passage_ids])
    queries_BD, passages_ND = _embed(student, list(lists.query_ids), unique.passage_ids, rows, chunk_tokens)
    index_BK = torch.from_numpy(unique.index_BK)
    return torch.einsum("bd,bkd->bk", queries_BD, passages_ND[index_BK])


def _rank_pools(
    student: Student,
    queries: list[str],
    pools: list[list[str]],
    rows: Rows,
    chunk_tokens: int,
) -> dict[str, list[str]]:
    passages = list(dict.fromkeys(passage for pool in pools for passage in pool))
    position = {passage: n for n, passage in enumerate(passages)}
    queries_BD, passages_ND = _embed(student, queries, passages, rows, chunk_tokens)
    run = {}
    for b, (query, pool) in enumerate(zip(queries, pools, strict=True)):
        scores = passages_ND[[position[p] for p in pool]] @ queries_BD[b]
        run[query] = [p for p, _ in top_k(pool, scores.tolist(), len(pool))]
    return run


def _embed(
    student: Student,
    queries: list[str],
    passages: list[str],
    rows: Rows,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeddings_MD, _ = embed_shared(
            student,
            [rows["query"][query] for query in queries],
            [rows["passage"][passage] for passage in passages],
            chunk_tokens=2 * chunk_tokens,  # no graph is made
        )
    doubles = embeddings_MD.double().cpu()
    return doubles[: len(queries)], doubles[len(queries) :]


def _ndcg_against(student_BK: Any, teacher_BK: Any) -> list[float]:
    """nDCG@10 of the student's order of each list, with exp(z / 0.5) of the teacher's scores as gains.

    z: the teacher's scores standardised per list, so that its few favourites carry the measure. Of six
    kinds of gains this one followed judged nDCG best on two collections (LOG.md). Where a list is shorter
    than K, the teacher's scores are minus infinity, of no gain.
    """
    there_BK = teacher_BK > -np.inf
    deviation_B1 = np.maximum(teacher_BK.std(axis=1, keepdims=True, where=there_BK), 1e-9)
    gains_BK = np.exp((teacher_BK - teacher_BK.max(axis=1, keepdims=True)) / deviation_B1 / 0.5)
    order_BK = np.argsort(np.where(there_BK, -student_BK, np.inf), axis=1, kind="stable")
    by_student_BK = np.take_along_axis(gains_BK, order_BK, 1)
    ideal_BK = -np.sort(-gains_BK, axis=1)
    discount = 1 / np.log2(np.arange(2, 12))[: student_BK.shape[1]]
    width = len(discount)
    found_B: list[float] = ((by_student_BK[:, :width] @ discount) / (ideal_BK[:, :width] @ discount)).tolist()
    return found_B
