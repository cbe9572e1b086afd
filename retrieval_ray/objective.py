"""The loss of a training step: named, weighted terms over the embeddings of the whole batch.

Every term is a mean over queries. So the batch is taken in blocks of queries, each block's gradient is
added to the embeddings' and its scores are freed: exact, and B x N scores never stand together.

Shapes: B queries with lists of K passages (the positive first, J = K - 1 negatives), N different passages
and U different queries in the whole batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval_ray import losses

_BLOCK_QUERIES = 64  # their scores, copies and gradients take about what the embeddings in float64 do


@dataclass(frozen=True)
class Block:
    """What the terms see of some queries. Scores are cosines in float64."""

    scores_BN: Tensor
    index_BK: Tensor  # where each list's passages stand among N
    teacher_BK: Tensor
    judged_BW: Tensor  # where all passages of the batch stand that the teacher judged for a query
    judged_teacher_BW: Tensor  # minus infinity where a query has fewer than W
    excluded_BN: Tensor  # True where a passage is no negative for the query
    counts_N: Tensor  # in how many list places each passage stands
    own_BJ: Tensor  # cosines of each negative with the query it does answer
    own_there_BJ: Tensor  # False where no such query is known

    @property
    def student_BK(self) -> Tensor:
        return self.scores_BN.gather(1, self.index_BK)


@dataclass(frozen=True)
class Objective:
    """Weights of the terms by name (see ``TERMS``; a term of weight 0 is left out), and temperatures.

    Raises ``ValueError`` for a weight that no term has.
    """

    weights: Mapping[str, float]
    student_temperature: float
    teacher_temperature: float
    infonce_temperature: float

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(TERMS))
        if unknown:
            raise ValueError(f"no term is named {', '.join(unknown)}; known: {', '.join(TERMS)}")

    def __call__(self, block: Block) -> dict[str, Tensor]:
        """The terms by name and their weighted sum ``loss``."""
        on = {name: weight for name, weight in self.weights.items() if weight}
        terms = {name: TERMS[name](self, block) for name in on}
        loss = torch.zeros((), dtype=block.scores_BN.dtype, device=block.scores_BN.device)
        return {**terms, "loss": sum((on[name] * term for name, term in terms.items()), start=loss)}


def _kl(o: Objective, b: Block) -> Tensor:
    return losses.listwise_kl(
        b.scores_BN.gather(1, b.judged_BW),
        b.judged_teacher_BW,
        student_temperature=o.student_temperature,
        teacher_temperature=o.teacher_temperature,
    )


def _infonce(o: Objective, b: Block) -> Tensor:
    return losses.infonce(
        b.scores_BN,
        b.index_BK[:, 0],
        excluded_BN=b.excluded_BN,
        counts_N=b.counts_N,
        temperature=o.infonce_temperature,
    )


def _infonce_list(o: Objective, b: Block) -> Tensor:
    return losses.infonce_list(
        b.student_BK,
        excluded_BK=b.excluded_BN.gather(1, b.index_BK),
        temperature=o.infonce_temperature,
    )


def _margin_mse(o: Objective, b: Block) -> Tensor:
    return losses.margin_mse(
        b.student_BK,
        b.teacher_BK,
        student_temperature=o.student_temperature,
        teacher_temperature=o.teacher_temperature,
    )


def _ranking(o: Objective, b: Block) -> Tensor:
    return losses.ranking(b.student_BK, b.teacher_BK, temperature=o.student_temperature)


def _clp(o: Objective, b: Block) -> Tensor:
    return losses.clp(b.own_BJ, b.own_there_BJ)


TERMS: dict[str, Callable[[Objective, Block], Tensor]] = {
    "kl": _kl,
    "infonce": _infonce,
    "infonce_list": _infonce_list,
    "margin_mse": _margin_mse,
    "ranking": _ranking,
    "clp": _clp,
}


@dataclass(frozen=True)
class Batch:
    """The whole batch of B lists, as places among U queries and N passages."""

    query_B: Tensor
    index_BK: Tensor
    teacher_BK: Tensor
    judged: Callable[[slice], tuple[Tensor, Tensor]]  # judged_BW and judged_teacher_BW of some queries
    excluded: Callable[[slice], Tensor]  # excluded_BN of some queries
    counts_N: Tensor
    own_BJ: Tensor  # which query each negative does answer; -1: none is known


def loss_and_gradient(
    objective: Objective, embeddings: Sequence[Tensor], batch: Batch
) -> tuple[dict[str, float], Tensor]:
    """The terms' values, and the gradient of the loss by the embeddings of all queries, then passages.

    embeddings: (queries_UD, passages_ND), normalised. Computed in float64, as in the papers: InfoNCE's
    temperature magnifies what float32 would round off. Memory: the embeddings in float64, twice, and about
    10 arrays of 64 x N.
    """
    leaves = [part.detach().double().requires_grad_() for part in embeddings]
    queries_UD, passages_ND = leaves
    size = len(batch.query_B)
    values: dict[str, float] = {}
    for start in range(0, size, _BLOCK_QUERIES):
        part = slice(start, min(start + _BLOCK_QUERIES, size))
        terms = objective(_block(queries_UD, passages_ND, batch, part))
        share = (part.stop - start) / size
        if terms["loss"].requires_grad:  # not where CLP alone is on and no negative has its query
            (share * terms["loss"]).backward()  # type: ignore[no-untyped-call]
        for name, term in terms.items():
            values[name] = values.get(name, 0.0) + share * float(term.detach())
    gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    return values, torch.cat(gradients)


def _block(queries_UD: Tensor, passages_ND: Tensor, batch: Batch, part: slice) -> Block:
    index_BK, own_BJ = batch.index_BK[part], batch.own_BJ[part]
    judged_BW, judged_teacher_BW = batch.judged(part)
    own_there_BJ = own_BJ >= 0
    cosine_BJ = own_there_BJ.new_zeros(own_BJ.shape, dtype=queries_UD.dtype)
    if own_there_BJ.any():
        pairs = (queries_UD[own_BJ[own_there_BJ]] * passages_ND[index_BK[:, 1:][own_there_BJ]]).sum(dim=1)
        cosine_BJ = cosine_BJ.masked_scatter(own_there_BJ, pairs)
    return Block(
        scores_BN=queries_UD[batch.query_B[part]] @ passages_ND.T,
        index_BK=index_BK,
        teacher_BK=batch.teacher_BK[part],
        judged_BW=judged_BW,
        judged_teacher_BW=judged_teacher_BW,
        excluded_BN=batch.excluded(part),
        counts_N=batch.counts_N,
        own_BJ=cosine_BJ,
        own_there_BJ=own_there_BJ,
    )
