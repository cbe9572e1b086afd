"""The load-balancing loss of routers (Switch Transformer, arXiv 2101.03961, eq. 4), summed over chunks.

With GradCache a batch goes through the model chunk by chunk. What experts took is counted over the whole
batch in the first pass and then held constant; so the loss is linear in the routers' probabilities, and
the chunks' gradients add up to the batch's.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrieval_ray.gradcache import seeded
from retrieval_ray.moe import Routing, jittering, moe_layers, watch


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
    """The routers of one step: their jitter, what experts took, and weight * balance_loss.

    First pass: ``embed`` every chunk; then ``settle``; then go backward, through the graphs kept or through
    chunks embedded again. The balance loss's gradient goes back with each chunk's embeddings.
    """

    def __init__(
        self, backbone: nn.Module, weight: float, *, jitter: float = 0.0, seed: Sequence[int] = ()
    ) -> None:
        """backbone: has experts. seed: from this and its number each chunk draws its jitter, twice alike."""
        self.backbone, self.weight, self.jitter, self.seed = backbone, weight, jitter, tuple(seed)
        layers = list(moe_layers(backbone).values())
        device = layers[0].weight_EOI.device
        shape = (len(layers), layers[0].layout.experts)
        self.routing = Routing(  # of the chunks so far, then of the whole batch; without graph
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )
        self.value = math.nan  # of the loss without its weight, once settled
        self._gradient_LE: Tensor | None = None

    def embed(self, number: int, embed: Callable[[], Tensor]) -> Tensor:
        """The embeddings of chunk ``number``; what goes back through them takes the chunk's share along."""
        with ExitStack() as around:
            if self.jitter:
                around.enter_context(seeded((*self.seed, number), self.routing.tokens.device))
                around.enter_context(jittering(self.backbone, self.jitter))
            seen = around.enter_context(watch(self.backbone))
            embeddings_ND = embed()
            routing = seen()
        if self._gradient_LE is None:
            self.routing = Routing(
                self.routing.counts_LE + routing.counts_LE,
                self.routing.probability_sums_LE + routing.probability_sums_LE.detach(),
                self.routing.tokens + routing.tokens,
            )
        if not self.weight:
            return embeddings_ND
        apply: Callable[..., Tensor] = _Attach.apply
        return apply(embeddings_ND, routing.probability_sums_LE, self)

    def settle(self, total: Callable[[Tensor], Tensor] = lambda mine: mine) -> None:
        """Fix the counts. total: sums a tensor over ranks, all of which call this, with chunks or without."""
        mine = self.routing
        self.routing = Routing(*map(total, (mine.counts_LE, mine.probability_sums_LE, mine.tokens)))
        sums_LE = self.routing.probability_sums_LE.detach().requires_grad_()
        loss = balance_loss(replace(self.routing, probability_sums_LE=sums_LE))
        (self._gradient_LE,) = torch.autograd.grad(self.weight * loss, sums_LE)
        self.value = float(loss.detach())

    @property
    def gradient_LE(self) -> Tensor:
        assert self._gradient_LE is not None, "settle() before going backward"
        return self._gradient_LE


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings_ND: Tensor, sums_LE: Tensor, balance: Balance) -> Tensor:
        ctx.balance, ctx.dtype = balance, sums_LE.dtype
        return embeddings_ND.view_as(embeddings_ND)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient_ND, ctx.balance.gradient_LE.to(ctx.dtype), None
