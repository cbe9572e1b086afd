"""How far training moved vectors, and what became of their geometry. Pure functions on arrays.

Shapes: N texts, Q queries, P passages, D and E dimensions. Vectors have length 1 but for rounding.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]
HEAD = 10  # passages of a query's ranking in which hubs are counted
_ALIKE = 1e-6  # of the mean squared length: texts that vary less are one point, told apart by rounding alone


@dataclass(frozen=True)
class Sample:
    """One model's vectors of a sample of queries and passages, at one layer."""

    queries_QD: Vectors
    passages_PD: Vectors


def compare(base: Sample, trained: Sample, positive_Q: npt.NDArray[np.integer]) -> dict[str, Any]:
    """All measures of one layer, before and after training; None where one is undefined.

    positive_Q: where a relevant passage of each query stands among P.
    """
    return {
        "cka": {
            "passages": linear_cka(base.passages_PD, trained.passages_PD),
            "queries": linear_cka(base.queries_QD, trained.queries_QD),
        },
        "cosine": {
            "passages": float(cosines(base.passages_PD, trained.passages_PD).mean()),
            "queries": float(cosines(base.queries_QD, trained.queries_QD).mean()),
        },
        "base": _geometry(base, positive_Q),
        "trained": _geometry(trained, positive_Q),
    }


def _geometry(sample: Sample, positive_Q: npt.NDArray[np.integer]) -> dict[str, float | None]:
    return {
        "alignment": alignment(sample.queries_QD, sample.passages_PD[positive_Q]),
        "uniformity_passages": uniformity(sample.passages_PD),
        "uniformity_queries": uniformity(sample.queries_QD),
        "hubness": hubness(sample.queries_QD, sample.passages_PD),
    }


def linear_cka(one_ND: Vectors, other_NE: Vectors) -> float | None:
    """Likeness of what two models tell apart in the same texts, whatever the directions they use for it.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the matrices of dot products (Kornblith et al. 2019,
    arXiv 1905.00414, section 3) with the unbiased estimate of HSIC: the biased one calls even unrelated
    vectors alike unless N is much larger than D. 1: the same but for rotation and scale; about 0: unrelated.
    None: fewer than four texts, or all of them at one point.
    """
    if len(one_ND) < 4 or _alike(one_ND) or _alike(other_NE):
        return None
    one_NN, other_NN = _products(one_ND), _products(other_NE)
    own = _hsic(one_NN, one_NN) * _hsic(other_NN, other_NN)
    return float(_hsic(one_NN, other_NN) / np.sqrt(own)) if own > 0 else None


def _products(vectors_ND: Vectors) -> Floats:
    """Dot products of centred vectors, 0 on the diagonal. Centring changes nothing but rounding."""
    centred_ND = vectors_ND.astype(np.float64)
    centred_ND -= centred_ND.mean(axis=0)
    products_NN: Floats = centred_ND @ centred_ND.T
    np.fill_diagonal(products_NN, 0)
    return products_NN


def _hsic(one_NN: Floats, other_NN: Floats) -> float:
    """The unbiased estimate, Song et al. 2012 (JMLR 13), equation 5; the diagonals are 0."""
    n = len(one_NN)
    one_N, other_N = one_NN.sum(axis=0), other_NN.sum(axis=0)
    total = (one_NN * other_NN).sum() + one_N.sum() * other_N.sum() / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * (one_N @ other_N)) / (n * (n - 3)))


def cosines(one_ND: Vectors, other_ND: Vectors) -> Floats:
    """cosine_N of row n with row n."""
    one, other = one_ND.astype(np.float64), other_ND.astype(np.float64)
    lengths_N = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found_N: Floats = (one * other).sum(axis=1) / lengths_N
    return found_N


def alignment(queries_QD: Vectors, positives_QD: Vectors) -> float:
    """Mean squared distance of a query and its relevant passage, 0 to 4; less is better.

    Wang & Isola 2020 (arXiv 2005.10242), section 4.1.1, with exponent 2.
    """
    apart_QD = queries_QD.astype(np.float64) - positives_QD.astype(np.float64)
    return float((apart_QD**2).sum(axis=1).mean())


def uniformity(vectors_ND: Vectors) -> float | None:
    """log mean exp(-2 ||x - y||^2) over all pairs: 0, all at one point; the less, the more evenly spread.

    Wang & Isola 2020, section 4.1.2, with t = 2. None: fewer than two texts.
    """
    if len(vectors_ND) < 2:
        return None
    vectors = vectors_ND.astype(np.float64)
    squared_N = (vectors**2).sum(axis=1)
    apart_NN = np.maximum(squared_N[:, None] + squared_N[None, :] - 2 * vectors @ vectors.T, 0)
    return float(np.log(np.exp(-2 * apart_NN[np.triu_indices(len(vectors), 1)]).mean()))


def hubness(queries_QD: Vectors, passages_PD: Vectors) -> float | None:
    """Skewness of how often passages stand among queries' ``HEAD`` nearest: high, a few stand everywhere.

    Radovanovic, Nanopoulos & Ivanovic 2010 (JMLR 11), section 3, N_k with k = ``HEAD``. None where nothing
    is nearer than anything else.
    """
    return None if _alike(passages_PD) else skewness(occurrences(queries_QD, passages_PD, HEAD))


def occurrences(queries_QD: Vectors, passages_PD: Vectors, k: int) -> npt.NDArray[np.int64]:
    """count_P: of how many queries' k nearest by dot product each passage is one; of equal ones the first."""
    scores_QP = queries_QD.astype(np.float64) @ passages_PD.astype(np.float64).T
    nearest_QK = np.argsort(-scores_QP, axis=1, kind="stable")[:, :k]
    return np.bincount(nearest_QK.ravel(), minlength=len(passages_PD)).astype(np.int64)


def skewness(values_N: npt.NDArray[Any]) -> float | None:
    """The third standardised moment; None where all values are equal."""
    centred_N = values_N - values_N.mean()
    deviation = np.sqrt((centred_N**2).mean())
    return float((centred_N**3).mean() / deviation**3) if deviation > 0 else None


def _alike(vectors_ND: Vectors) -> bool:
    """Whether all texts have the same vector, as that of a first token has no text in it at first."""
    vectors = vectors_ND.astype(np.float64)
    spread = ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1).mean()
    return bool(spread <= _ALIKE * (vectors**2).sum(axis=1).mean())
