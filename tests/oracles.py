"""Slow, obvious references: plain loops over ids, written from the formulas, not from the package."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Row = tuple[str, float]


def top_k(rows: Sequence[Row], k: int) -> list[Row]:
    """Take the best row k times: higher score, then smaller id."""
    left, best = list(rows), []
    while left and len(best) < k:
        first = left[0]
        for row in left:
            if row[1] > first[1] or (row[1] == first[1] and row[0] < first[0]):
                first = row
        best.append(first)
        left.remove(first)
    return best


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile with linear interpolation between the two neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def bm25(query: Sequence[str], documents: Sequence[Sequence[str]]) -> list[float]:
    """Lucene's BM25 with k1 = 1.5 and b = 0.75, over terms."""
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in query:
            holders = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            count = document.count(term)
            if count:
                length = 1 - 0.75 + 0.75 * len(document) / mean_length
                score += idf * count / (count + 1.5 * length)
        scores.append(score)
    return scores


def listwise_kl(
    student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """KL(teacher || student) row by row, passage by passage; mean over rows."""
    total = student.new_zeros(())
    for row in range(len(student)):
        p = [(t / teacher_temperature).exp() for t in teacher[row]]
        q = [(s / student_temperature).exp() for s in student[row]]
        for place in range(len(p)):
            p_here, q_here = p[place] / sum(p), q[place] / sum(q)
            total = total + p_here * (p_here.log() - q_here.log())
    return total / len(student)


def infonce(
    queries: Tensor,
    vectors: Sequence[Sequence[Tensor]],
    lists: Sequence[Sequence[str]],
    excluded: Sequence[Sequence[str]],
    temperature: float,
) -> Tensor:
    """InfoNCE where the candidates are the rows of all lists, a repeated passage repeated.

    A query leaves out rows of excluded ids and of its own positive, which counts once. vectors: one
    for each place of each list.
    """
    losses = []
    for query, own, own_vectors, left_out in zip(queries, lists, vectors, excluded, strict=True):
        positive = ((query * own_vectors[0]).sum() / temperature).exp()
        below = positive
        for row, row_vectors in zip(lists, vectors, strict=True):
            for passage, vector in zip(row, row_vectors, strict=True):
                if passage != own[0] and passage not in left_out:
                    below = below + ((query * vector).sum() / temperature).exp()
        losses.append(-(positive / below).log())
    return sum(losses) / len(losses)


def infonce_list(student: Tensor, excluded: Sequence[Sequence[bool]], temperature: float) -> Tensor:
    """Each list's first against the rest of its list; mean over lists."""
    total = student.new_zeros(())
    for row, left_out in zip(student, excluded, strict=True):
        positive = (row[0] / temperature).exp()
        below = positive
        for place in range(1, len(row)):
            if not left_out[place]:
                below = below + (row[place] / temperature).exp()
        total = total - (positive / below).log()
    return total / len(student)


def margin_mse(
    student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Mean over all negatives of the squared difference of the positive's leads over it."""
    errors = []
    for row, taught in zip(student, teacher, strict=True):
        for place in range(1, len(row)):
            lead = (row[0] - row[place]) / student_temperature
            errors.append((lead - (taught[0] - taught[place]) / teacher_temperature) ** 2)
    return sum(errors) / len(errors)


def ranking(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """RankNet: mean over a list's pairs that the teacher orders, then over lists."""
    total = student.new_zeros(())
    for row, taught in zip(student, teacher, strict=True):
        pairs = []
        for better in range(len(row)):
            for worse in range(len(row)):
                if taught[better] > taught[worse]:
                    pairs.append((1 + ((row[worse] - row[better]) / temperature).exp()).log())
        total = total + (sum(pairs) / len(pairs) if pairs else 0.0)
    return total / len(student)


def clp(cosines: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """1 - the cosine of a negative and its own query (None: it has none), mean of means."""
    means = []
    for row in cosines:
        there = [1 - cosine for cosine in row if cosine is not None]
        means.append(sum(there) / len(there) if there else 0.0)
    return sum(means) / len(means)


def minimum_on_grid(f: Callable[[float], float], low: float, high: float, points: int) -> float:
    """The place of the least value among evenly spaced (in the logarithm) points."""
    step = (math.log(high) - math.log(low)) / (points - 1)
    return min((math.exp(math.log(low) + step * i) for i in range(points)), key=f)


def ndcg(judged: Mapping[str, int], ranking: Sequence[str], k: int) -> float:
    gained = sum(
        max(judged.get(passage, 0), 0) / math.log2(rank + 1)
        for rank, passage in enumerate(ranking[:k], start=1)
    )
    ideal = sum(
        max(relevance, 0) / math.log2(rank + 1)
        for rank, relevance in enumerate(sorted(judged.values(), reverse=True)[:k], start=1)
    )
    return gained / ideal if ideal else 0.0


def recall(relevant: set[str], ranking: Sequence[str], k: int) -> float:
    return len(relevant & set(ranking[:k])) / len(relevant) if relevant else 0.0


def reciprocal_rank(relevant: set[str], ranking: Sequence[str], k: int) -> float:
    for rank, passage in enumerate(ranking[:k], start=1):
        if passage in relevant:
            return 1 / rank
    return 0.0


def average_precision(relevant: set[str], ranking: Sequence[str], k: int) -> float:
    found, total = 0, 0.0
    for rank, passage in enumerate(ranking[:k], start=1):
        if passage in relevant:
            found += 1
            total += found / rank
    return total / len(relevant) if relevant else 0.0


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p of the paired randomisation test: every assignment of signs."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return sum(value >= observed - 1e-9 for value in sums) / len(sums)


def late_interaction(query: Tensor, passage: Tensor) -> float:
    """Mean over query tokens of the best dot product with a passage token."""
    if len(query) == 0 or len(passage) == 0:
        return 0.0
    best = [
        max(sum(a * b for a, b in zip(q.tolist(), p.tolist(), strict=True)) for p in passage) for q in query
    ]
    return sum(best) / len(best)


def released_clp(
    cosine_BK: Sequence[Sequence[Tensor]], own_BJ: Sequence[Sequence[Tensor]], *, penalty: float
) -> Tensor:
    """The published code's loss, query by query, at its temperature; the positive is each list's first."""
    losses = []
    for cosines, own in zip(cosine_BK, own_BJ, strict=True):
        total = sum((c / 0.02).exp() for c in cosines)
        crossed = -((cosines[0] / 0.02).exp() / total).log()
        pushed = sum(1 - c for c in own) / len(own)
        losses.append((1 - penalty) * crossed + penalty * pushed)
    return sum(losses) / len(losses)


def near_duplicates(normal: Mapping[str, str]) -> list[tuple[str, str]]:
    """(dropped id, keeper) of normalised texts, by indices into whole sorted lists, first dropped first."""
    found: list[tuple[str, str]] = []
    for turn in (1, -1):
        left = {key: text[::turn] for key, text in normal.items() if key not in dict(found)}
        ids = sorted(sorted(left, reverse=True), key=lambda key: left[key])
        for place, key in enumerate(ids):
            for other in ids[place + 1 : place + 10]:
                if left[key] in left[other]:
                    found.append((key, other))
                    break
    return found
