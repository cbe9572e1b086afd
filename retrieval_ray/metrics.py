"""Retrieval metrics per query (trec_eval's, through pytrec_eval) and what differences are worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytrec_eval

METRICS = ("ndcg@5", "ndcg@10", "recall@100", "mrr@10", "map@100")
Qrels = Mapping[str, Mapping[str, int]]


def per_query(
    qrels: Qrels, run: Mapping[str, Sequence[str]], *, relevance_threshold: int = 1
) -> dict[str, dict[str, float]]:
    """The metrics of each judged query: ``{query_id: {"ndcg@10": ...}}``.

    run: passage ids, best first. A judged query that the run does not answer counts 0. nDCG uses
    graded gains; recall, MRR and MAP count a passage as relevant from ``relevance_threshold`` on.
    trec_eval breaks ties of score by id in its own way, so ranks are handed to it as scores.
    """
    judged = {q: dict(rows) for q, rows in qrels.items()}
    graded = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.5,10"})
    binary = pytrec_eval.RelevanceEvaluator(
        judged, {"recall.100", "map_cut.100"}, relevance_level=relevance_threshold
    )
    first_ten = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}, relevance_level=relevance_threshold)
    ranked = {q: _as_scores(run.get(q, ())) for q in judged}
    by_ndcg, by_recall = graded.evaluate(ranked), binary.evaluate(ranked)
    by_mrr = first_ten.evaluate({q: _as_scores(run.get(q, ())[:10]) for q in judged})
    zero: dict[str, float] = {}
    return {
        q: {
            "ndcg@5": by_ndcg.get(q, zero).get("ndcg_cut_5", 0.0),
            "ndcg@10": by_ndcg.get(q, zero).get("ndcg_cut_10", 0.0),
            "recall@100": by_recall.get(q, zero).get("recall_100", 0.0),
            "mrr@10": by_mrr.get(q, zero).get("recip_rank", 0.0),
            "map@100": by_recall.get(q, zero).get("map_cut_100", 0.0),
        }
        for q in judged
    }


def _as_scores(passages: Sequence[str]) -> dict[str, float]:
    return {passage: float(len(passages) - rank) for rank, passage in enumerate(passages)}


def mean(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over queries of each metric; 0 for no queries."""
    return {m: float(np.mean([row[m] for row in values.values()] or [0.0])) for m in METRICS}


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with a 95 % bootstrap interval and a two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float


NO_DIFFERENCE = Difference(0.0, 0.0, 0.0, 1.0)


def paired_difference(
    base: Sequence[float], other: Sequence[float], *, seed: int = 0, rounds: int = 10_000
) -> Difference:
    """other - base over the same queries.

    p: Fisher's paired randomisation test (signs of the differences flipped at random), with the
    observed one counted among the rounds. Interval: percentile bootstrap over queries.
    """
    difference_Q = np.asarray(other, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    if len(difference_Q) == 0 or not difference_Q.any():
        return NO_DIFFERENCE
    rng = np.random.default_rng(seed)
    observed = float(difference_Q.mean())
    flipped = _blocks(rounds, lambda n: _signs(rng, n, len(difference_Q)) @ difference_Q)
    extreme = int((np.abs(flipped) >= abs(difference_Q.sum()) - 1e-9).sum())
    resampled = _blocks(
        rounds,
        lambda n: difference_Q[rng.integers(0, len(difference_Q), (n, len(difference_Q)))].mean(1),
    )
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(observed, float(low), float(high), (extreme + 1) / (rounds + 1))


def spearman(one_N: npt.NDArray[np.floating], other_N: npt.NDArray[np.floating]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks, 0 where all are equal."""
    return float(_standard_ranks(one_N) @ _standard_ranks(other_N))


def spearman_p(
    one_N: npt.NDArray[np.floating],
    other_N: npt.NDArray[np.floating],
    *,
    seed: int = 0,
    rounds: int = 10_000,
) -> float:
    """Two-sided p of ``spearman``: one side permuted at random, the observed order among the rounds."""
    one, other = _standard_ranks(one_N), _standard_ranks(other_N)
    rng = np.random.default_rng(seed)
    shuffled = _blocks(rounds, lambda n: rng.permuted(np.tile(one, (n, 1)), axis=1) @ other)
    extreme = int((np.abs(shuffled) >= abs(float(one @ other)) - 1e-9).sum())
    return (extreme + 1) / (rounds + 1)


def _standard_ranks(values_N: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Ranks less their mean, as a vector of length 1; of 0 where all values are equal."""
    _, place, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    ranks_N: npt.NDArray[np.float64] = (below + (counts - 1) / 2)[place]
    ranks_N -= (len(values_N) - 1) / 2
    return ranks_N / max(float(np.linalg.norm(ranks_N)), 1e-12)


def _signs(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.float64]:
    return 2.0 * rng.integers(0, 2, (rows, columns)).astype(np.float64) - 1.0


def _blocks(
    rounds: int, draw: Callable[[int], npt.NDArray[np.float64]], block: int = 500
) -> npt.NDArray[np.float64]:
    """Draw in blocks, so that many queries times many rounds need little memory."""
    return np.concatenate([draw(min(block, rounds - at)) for at in range(0, rounds, block)])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction for several comparisons: adjusted p-values, never above 1."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for position, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, p * (len(p_values) - position)))
        adjusted[name] = running
    return adjusted
