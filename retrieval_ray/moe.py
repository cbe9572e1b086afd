"""Mixture of experts: copies of a feed-forward linear, and a router that chooses among them for each token.

After CLP + MoE (arXiv 2412.17364; upcycling: arXiv 2212.05055). An upcycled model computes what the dense
one does until its experts are trained. Torch alone: saved models carry a copy of this file.

Shapes: B texts of T tokens, N = B * T, I and O inputs and outputs of the linear, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_EXPERTS = 8
MAX_TOP_K = 2
_ROUTED_ROWS = 512
# of a transformer layer, where its first and its second linear stand
_FEED_FORWARDS = (
    {"intermediate": "intermediate.dense", "output": "output.dense"},  # BERT, XLM-R and their kin
    {"intermediate": "mlp.Wi", "output": "mlp.Wo"},  # ModernBERT
)
WHERE = ("intermediate", "output")


def _top(scores_BTE: Tensor, k: int) -> Tensor:
    """taken_BTE: True at each token's k highest."""
    chosen_BTk = scores_BTE.topk(k, dim=-1).indices
    return torch.zeros_like(scores_BTE, dtype=torch.bool).scatter(-1, chosen_BTk, True)


def _full_gates(logits_BTE: Tensor, taken_BTE: Tensor) -> Tensor:
    """p / stop_gradient(sum of the taken p), p the softmax over all experts; 0 where not taken.

    Of a token's taken experts the gates sum to 1, so copies add up to the dense layer; and the gradient by
    the router is that of p, which for one taken expert is not 0. In logarithms: nothing underflows.
    """
    log_p_BTE = logits_BTE.log_softmax(dim=-1)
    taken_log_p_BTE = log_p_BTE.masked_fill(~taken_BTE, -torch.inf)
    total_BT1 = taken_log_p_BTE.logsumexp(dim=-1, keepdim=True).detach()
    total_BT1 = total_BT1.masked_fill(~taken_BTE.any(dim=-1, keepdim=True), 0)
    return (log_p_BTE - total_BT1).masked_fill(~taken_BTE, -torch.inf).exp()


def released(logits_BTE: Tensor, mask_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The published code's router: softmax over the k chosen experts alone.

    With k = 1 the gate is always 1 and the router has no gradient: tokens stay parted as its random start
    has it. Kept for reproduction.
    """
    taken_BTE = _top(logits_BTE, k)
    gates_BTE = logits_BTE.masked_fill(~taken_BTE, -torch.inf).softmax(dim=-1)
    return taken_BTE, gates_BTE.detach() if k == 1 else gates_BTE


def softmax(logits_BTE: Tensor, mask_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable of all experts, with gates that let the router learn (``_full_gates``)."""
    taken_BTE = _top(logits_BTE, k)
    return taken_BTE, _full_gates(logits_BTE, taken_BTE)


def expert_choice(logits_BTE: Tensor, mask_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each expert takes its most probable k * T / E tokens (rounded up) of each text (arXiv 2202.09368).

    Within a text, so that nothing else in the batch changes an embedding. Padding is never taken; a token
    may be taken by several experts or by none (gates 0).
    """
    experts = logits_BTE.shape[-1]
    capacity_B = -(-mask_BT.sum(dim=1) * k // experts)
    p_BTE = logits_BTE.detach().softmax(dim=-1).masked_fill(~mask_BT[..., None], -1)
    order_BTE = p_BTE.argsort(dim=1, descending=True, stable=True)  # stable: ties go by place in the text
    rank_BTE = order_BTE.argsort(dim=1)
    taken_BTE = (rank_BTE < capacity_B[:, None, None]) & mask_BT[..., None]
    return taken_BTE, _full_gates(logits_BTE, taken_BTE)


# (logits_BTE, mask_BT, k) -> (taken_BTE, gates_BTE)
ROUTERS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "released": released,
    "softmax": softmax,
    "expert_choice": expert_choice,
}


@dataclass(frozen=True)
class Layout:
    """Which linears have experts, how many, and how they are chosen.

    layers: numbers of the transformer layers from 0; None: all. Raises ``ValueError`` for what cannot be.
    """

    experts: int
    top_k: int = 1
    router: str = "softmax"
    where: str = "intermediate"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= MAX_EXPERTS:
            raise ValueError(f"experts: {self.experts} is not within 1 to {MAX_EXPERTS}")
        if not 1 <= self.top_k <= min(MAX_TOP_K, self.experts):
            raise ValueError(f"top_k: {self.top_k} is not within 1 to {min(MAX_TOP_K, self.experts)}")
        for key, value, known in (("router", self.router, ROUTERS), ("where", self.where, WHERE)):
            if value not in known:
                raise ValueError(f"{key}: '{value}' is not one of {', '.join(known)}")


@dataclass(frozen=True)
class Routing:
    """What L layers did with the tokens they saw, padding left out."""

    counts_LE: Tensor  # tokens that each expert took, int64
    probability_sums_LE: Tensor  # sums over tokens of the softmax over all experts, with a graph
    tokens: Tensor  # that each layer saw, a scalar


class MoELinear(nn.Module):
    """A linear with E experts: (B, T, I) -> (B, T, O); the routers that need no texts take (..., I) too.

    ``mask_BT`` says which tokens are no padding (None: all), see ``note_mask``. ``jitter``: in training
    mode the router's inputs are multiplied by draws from [1 - jitter, 1 + jitter].
    """

    def __init__(
        self,
        dense: nn.Linear,
        layout: Layout,
        *,
        generator: torch.Generator | None = None,
        noise: float = 0.0,
    ) -> None:
        """Experts are copies of ``dense``, plus ``noise`` times its weights' deviation of normal noise."""
        super().__init__()
        experts, weight = layout.experts, dense.weight.detach()
        copies_EOI = weight.expand(experts, *weight.shape).clone()
        if noise:
            drawn = torch.randn(copies_EOI.shape, generator=generator)
            copies_EOI += noise * weight.std() * drawn.to(copies_EOI)
        self.weight_EOI = nn.Parameter(copies_EOI)
        bias = dense.bias
        self.bias_EO = None if bias is None else nn.Parameter(bias.detach().expand(experts, -1).clone())
        bound = dense.in_features**-0.5  # as nn.Linear starts, which the published code uses
        start_EI = (2 * torch.rand(experts, dense.in_features, generator=generator) - 1) * bound
        self.router_EI = nn.Parameter(start_EI.to(weight))
        # for the tokens that no expert takes
        self.dense = dense if layout.router == "expert_choice" else None
        self.layout = layout
        self.jitter = 0.0
        self.mask_BT: Tensor | None = None
        self.seen: list[Routing] | None = None  # see ``watch``
        self.casts: dict[torch.dtype, Tensor] | None = None  # see ``casts_kept``

    def forward(self, x: Tensor) -> Tensor:
        layout = self.layout
        mask = self._mask(x)
        shake = None
        if self.training and self.jitter:
            shake = 1 + self.jitter * (2 * torch.rand(x.shape, device=x.device) - 1)
        route: Callable[..., tuple[Tensor, Tensor]] = _Route.apply
        x, logits = route(x, self.router_EI, shake)
        taken, gates = ROUTERS[layout.router](logits, mask, layout.top_k)
        if self.seen is not None:
            self.seen.append(_routing(logits, taken & mask[..., None], mask))
        x_NI, taken_NE = x.reshape(-1, x.shape[-1]), taken.reshape(-1, layout.experts)
        out_NO = self._mix(x_NI, taken_NE, gates.reshape_as(taken_NE), mask.reshape(-1))
        return out_NO.view(*x.shape[:-1], -1)

    def _mask(self, x: Tensor) -> Tensor:
        if self.mask_BT is None:
            return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if self.mask_BT.shape != x.shape[:-1]:
            raise ValueError(
                f"experts got tokens of shape {tuple(x.shape[:-1])} and an attention mask of shape "
                f"{tuple(self.mask_BT.shape)}; the model must not flatten or cut its batches"
            )
        return self.mask_BT.bool()

    def _mix(self, x_NI: Tensor, taken_NE: Tensor, gates_NE: Tensor, mask_N: Tensor) -> Tensor:
        """The gated sum of the experts' outputs; pairs of expert and token are sorted by expert once."""
        token_P, counts = taken_NE.T.nonzero()[:, 1], taken_NE.sum(dim=0).tolist()
        # where each token has one expert, the gates are 1: they matter for the gradient alone
        alone = self.layout.top_k == 1 and self.dense is None
        mix: Callable[..., Tensor] = _Mix.apply
        gates_P = gates_NE.T[taken_NE.T]
        out_NO = mix(x_NI, gates_P, self.weight_EOI, self.bias_EO, token_P, counts, alone, self._cast)
        if self.dense is not None:
            rest = (~taken_NE.any(dim=1) & mask_N).nonzero()[:, 0]  # of padding nothing is read
            out_NO = out_NO.index_add(0, rest, self.dense(x_NI[rest]))
        return out_NO

    def _cast(self, dtype: torch.dtype) -> Tensor:
        """The experts' weights in this precision; see ``casts_kept``."""
        weight_EOI = self.weight_EOI.detach()
        if dtype == weight_EOI.dtype or self.casts is None:
            return weight_EOI.to(dtype)
        if dtype not in self.casts:
            self.casts[dtype] = weight_EOI.to(dtype)
        return self.casts[dtype]

    @torch.no_grad()
    def merged(self, weights_E: Tensor | None = None) -> nn.Linear:
        """A dense linear: the mean of the experts, weighted; None: equally."""
        experts, outputs, inputs = self.weight_EOI.shape
        if weights_E is None:
            weights_E = torch.ones(experts)
        share_E = (weights_E.double() / weights_E.double().sum()).to(self.weight_EOI.device)
        dense = nn.Linear(inputs, outputs, bias=self.bias_EO is not None)
        dense = dense.to(self.weight_EOI)  # device and precision
        dense.weight.copy_(torch.einsum("e,eoi->oi", share_E, self.weight_EOI.double()))
        if self.bias_EO is not None:
            dense.bias.copy_(share_E @ self.bias_EO.double())
        return dense


class _Route(torch.autograd.Function):
    """x -> (x, router logits in float32, whatever the precision of the rest).

    Both gradients of x meet in the array of the first. shake: what the router's inputs are multiplied by.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, router_EI: Tensor, shake: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, router_EI, shake)
        with torch.autocast(x.device.type, enabled=False):
            logits = [router_EI.float() @ seen.T for seen in _seen(x, shake)]  # faster than seen @ router.T
            return x.view_as(x), torch.cat(logits, dim=1).T.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dlogits: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, router_EI, shake = ctx.saved_tensors
        router = router_EI.float()
        drouter = torch.zeros_like(router)
        for part, seen in zip(_rows(dlogits), _seen(x, shake), strict=True):
            drouter.addmm_(part.T, seen)
        if ctx.needs_input_grad[0] and shake is not None:
            dx = dx + ((dlogits @ router) * shake).to(dx.dtype)
        elif ctx.needs_input_grad[0]:  # in place: this gradient was made by ``_Mix`` for this place alone
            dx.view(-1, dx.shape[-1]).addmm_(dlogits.flatten(0, -2).to(dx.dtype), router.to(dx.dtype))
        return dx if ctx.needs_input_grad[0] else None, drouter.to(router_EI.dtype), None


def _seen(x: Tensor, shake: Tensor | None) -> Iterator[Tensor]:
    """What a router sees, in float32, some rows at a time."""
    parts = _rows(x)
    shakes = [None] * len(parts) if shake is None else _rows(shake)
    for part, factor in zip(parts, shakes, strict=True):
        yield part.float() if factor is None else part.float() * factor


def _rows(x: Tensor) -> Sequence[Tensor]:
    return torch.split(x.flatten(0, -2), _ROUTED_ROWS)


class _Mix(torch.autograd.Function):
    """out[t] = sum over the experts that took t of gate * (W x[t] + b).

    token_P: the tokens that each expert took, expert after expert; counts: how many each did. alone: each
    token has one expert, whose gate is 1. cast: gives the weights in a precision.
    Written out, because each new array as large as the layer's inputs or outputs costs time: products are
    written where they stay, and no sorted copy of the tokens is kept for going backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        gates_P: Tensor,
        weight_EOI: Tensor,
        bias_EO: Tensor | None,
        token_P: Tensor,
        counts: list[int],
        alone: bool,
        cast: Callable[[torch.dtype], Tensor],
    ) -> Tensor:
        device = x_NI.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_EOI.dtype
        ctx.save_for_backward(x_NI, gates_P, weight_EOI, bias_EO, token_P)
        ctx.counts, ctx.alone, ctx.cast, ctx.dtype = counts, alone, cast, dtype
        with torch.autocast(device, enabled=False):
            x_PI, weights_EOI = _sorted(x_NI, token_P, dtype), cast(dtype)
            y_PO = x_PI.new_empty(len(token_P), weight_EOI.shape[1])
            for e, (x, y) in enumerate(
                zip(torch.split(x_PI, counts), torch.split(y_PO, counts), strict=True)
            ):
                if bias_EO is None:
                    torch.mm(x, weights_EOI[e].T, out=y)
                else:
                    torch.addmm(bias_EO[e].to(dtype), x, weights_EOI[e].T, out=y)
            if alone:
                return y_PO.index_select(0, _places(token_P))
            out_NO = y_PO.new_zeros(len(x_NI), y_PO.shape[1])
            return out_NO.index_add_(0, token_P, y_PO.mul_(gates_P[:, None].to(dtype)))

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, gates_P, weight_EOI, bias_EO, token_P = ctx.saved_tensors
        dtype, counts = ctx.dtype, ctx.counts
        g_PO, x_PI = _sorted(gradient_NO, token_P, dtype), _sorted(x_NI, token_P, dtype)
        weights_EOI = ctx.cast(dtype)
        dx_PI = torch.empty_like(x_PI)
        dgate_P = dbias_EO = None
        for e, (g, dx) in enumerate(zip(torch.split(g_PO, counts), torch.split(dx_PI, counts), strict=True)):
            torch.mm(g, weights_EOI[e], out=dx)  # before the gate, so that the gate's own comes of it
        if ctx.needs_input_grad[1]:
            dgate_P = torch.linalg.vecdot(dx_PI, x_PI)
            if bias_EO is not None:
                biases = zip(torch.split(g_PO, counts), bias_EO.to(dtype), strict=True)
                dgate_P = dgate_P + torch.cat([g @ bias for g, bias in biases])
            dgate_P = dgate_P.to(gates_P.dtype)
        if not ctx.alone:
            gate_P1 = gates_P[:, None].to(dtype)
            g_PO, dx_PI = g_PO.mul_(gate_P1), dx_PI.mul_(gate_P1)
        if bias_EO is not None:
            sums = [g.sum(dim=0, dtype=bias_EO.dtype) for g in torch.split(g_PO, counts)]
            dbias_EO = torch.stack(sums)
        dweight_EOI = torch.empty_like(weight_EOI, dtype=dtype)
        for e, (g, x) in enumerate(zip(torch.split(g_PO, counts), torch.split(x_PI, counts), strict=True)):
            torch.mm(g.T, x, out=dweight_EOI[e])
        if ctx.alone:
            dx_NI = dx_PI.index_select(0, _places(token_P)).to(x_NI.dtype)
        else:
            dx_NI = torch.zeros_like(x_NI).index_add_(0, token_P, dx_PI.to(x_NI.dtype))
        return dx_NI, dgate_P, dweight_EOI.to(weight_EOI.dtype), dbias_EO, None, None, None, None


def _sorted(rows_N: Tensor, token_P: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens' rows, expert after expert."""
    return rows_N.to(dtype).index_select(0, token_P)


def _places(token_P: Tensor) -> Tensor:
    """Where each token stands among the sorted ones; each stands there once."""
    places_N = torch.empty_like(token_P)
    places_N[token_P] = torch.arange(len(token_P), device=token_P.device)
    return places_N


@contextmanager
def casts_kept(model: nn.Module) -> Iterator[None]:
    """Inside, experts' weights are cast once for all batches; no weight may change there.

    As autocast keeps its casts, which sees no parts of a weight.
    """
    layers = list(moe_layers(model).values())
    for layer in layers:
        layer.casts = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.casts = None


def feed_forwards(backbone: nn.Module, where: str) -> list[tuple[str, nn.Linear]]:
    """Name and module of each transformer layer's first (intermediate) or second (output) linear."""
    found = []
    for name, module in backbone.named_modules():
        for names in _FEED_FORWARDS:
            linears = {key: _at(module, path) for key, path in names.items()}
            if all(isinstance(linear, nn.Linear | MoELinear) for linear in linears.values()):
                found.append((f"{name}.{names[where]}".lstrip("."), linears[where]))
    return found


def upcycle(backbone: nn.Module, layout: Layout, *, seed: int = 0, noise: float = 0.0) -> None:
    """Give the backbone's chosen linears experts, in place. The same seed gives the same routers and noise.

    Raises ``ValueError`` for a backbone without feed-forward layers of a known kind, one that has experts
    already, and layers that it does not have.
    """
    if moe_layers(backbone):
        raise ValueError("the model has experts already")
    linears = feed_forwards(backbone, layout.where)
    if not linears:
        raise ValueError(
            f"{type(backbone).__name__} has no feed-forward layers like those of BERT, XLM-R or ModernBERT"
        )
    wrong = sorted(set(layout.layers or ()) - set(range(len(linears))))
    if wrong:
        raise ValueError(f"layers: no layer {', '.join(map(str, wrong))}; there are {len(linears)}, from 0")
    generator = torch.Generator().manual_seed(seed)
    for number in sorted(set(range(len(linears)) if layout.layers is None else layout.layers)):
        name, dense = linears[number]
        experts = MoELinear(dense, layout, generator=generator, noise=noise)
        backbone.set_submodule(name, experts.train(dense.training))


def moe_layers(backbone: nn.Module) -> dict[str, MoELinear]:
    """The layers with experts, by name."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, MoELinear)}


def freeze_all_but_experts(backbone: nn.Module) -> None:
    """Only experts and routers stay trainable."""
    backbone.requires_grad_(False)
    for layer in moe_layers(backbone).values():
        for parameter in (layer.weight_EOI, layer.bias_EO, layer.router_EI):
            if parameter is not None:
                parameter.requires_grad_(True)


def note_mask(backbone: nn.Module, mask_BT: Tensor | None) -> None:
    """Tell the layers which tokens of the coming batch are no padding."""
    for layer in moe_layers(backbone).values():
        layer.mask_BT = mask_BT


@contextmanager
def watch(backbone: nn.Module) -> Iterator[Callable[[], Routing]]:
    """Notes what the layers do; what is yielded gives the sums so far, and needs one forward at least."""
    layers = list(moe_layers(backbone).values())
    for layer in layers:
        layer.seen = []
    seen = [layer.seen for layer in layers]

    def sums() -> Routing:
        return Routing(
            torch.stack([sum(r.counts_LE for r in rows) for rows in seen if rows]),  # type: ignore[misc]
            torch.stack([sum(r.probability_sums_LE for r in rows) for rows in seen if rows]),  # type: ignore[misc]
            torch.stack([r.tokens for r in seen[0] or ()]).sum(),
        )

    try:
        yield sums
    finally:
        for layer in layers:
            layer.seen = None


@contextmanager
def jittering(backbone: nn.Module, jitter: float) -> Iterator[None]:
    """Training mode for the routers alone, dropout elsewhere untouched. Draws come from torch's stream."""
    layers = list(moe_layers(backbone).values())
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.jitter, layer.training = jitter, True
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.jitter, layer.training = 0.0, mode


def _routing(logits: Tensor, taken: Tensor, mask: Tensor) -> Routing:
    """Of one layer: its sums, without the axis of layers."""
    p_NE = logits.softmax(dim=-1)[mask]
    return Routing(taken.flatten(0, -2).sum(dim=0), p_NE.sum(dim=0), mask.sum())


def _at(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module
