"""The load-balancing loss of routers (Switch Transformer, arXiv 2101.03961, eq. 4), summed over chunks.

With GradCache a batch goes through the model chunk by chunk. What experts took is counted over the whole
batch in the first pass and then held constant; so the loss is linear in the routers' probabilities, and
the chunks' gradients add up to the batch's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrieval_ray.moe import Routing


def balance_loss(routing: Routing) -> Tensor:
    """E * sum over experts of f * P, averaged over layers: 1 where experts share evenly, E at worst.

    f: the share of choices that fell on an expert, a constant; P: its mean probability. Shapes: L layers,
    E experts; a scalar comes out, with the graph of the probabilities.
    """
    counts_LE = routing.counts_LE.detach().to(routing.probability_sums_LE.dtype)
    f_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
    p_LE = routing.probability_sums_LE / routing.tokens
    return (counts_LE.shape[1] * (f_LE * p_LE).sum(dim=1)).mean()


class Balance:
    """weight * balance_loss of one step, whose gradient goes back with each chunk's embeddings.

    First pass: ``attach`` to every chunk's embeddings; then ``settle``; then go backward, through the graphs
    kept or through chunks attached again.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.routing: Routing | None = None  # of the whole batch, without graph
        self._gradient_LE: Tensor | None = None

    def attach(self, embeddings_ND: Tensor, routing: Routing) -> Tensor:
        """The same embeddings; what goes back through them takes the balance loss's share along."""
        if self._gradient_LE is None:
            seen = Routing(routing.counts_LE, routing.probability_sums_LE.detach(), routing.tokens)
            self.routing = seen if self.routing is None else _added(self.routing, seen)
        apply: Callable[..., Tensor] = _Attach.apply
        return apply(embeddings_ND, routing.probability_sums_LE, self)

    def settle(self, total: Callable[[Tensor], Tensor] = lambda mine: mine) -> float:
        """Fix the counts; returns the loss without its weight. total: sums a tensor over ranks."""
        assert self.routing is not None, "no chunk was attached"
        mine = self.routing
        sums_LE = total(mine.probability_sums_LE).requires_grad_()
        self.routing = Routing(total(mine.counts_LE), sums_LE, total(mine.tokens))
        loss = balance_loss(self.routing)
        (self._gradient_LE,) = torch.autograd.grad(self.weight * loss, sums_LE)
        return float(loss.detach())

    @property
    def gradient_LE(self) -> Tensor:
        assert self._gradient_LE is not None, "settle() before going backward"
        return self._gradient_LE


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings_ND: Tensor, sums_LE: Tensor, balance: Balance) -> Tensor:
        ctx.balance = balance
        return embeddings_ND.view_as(embeddings_ND)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient_ND, ctx.balance.gradient_LE, None


def _added(a: Routing, b: Routing) -> Routing:
    return Routing(
        a.counts_LE + b.counts_LE,
        a.probability_sums_LE + b.probability_sums_LE,
        a.tokens + b.tokens,
    )
