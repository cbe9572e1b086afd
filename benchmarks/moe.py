"""What do batched experts cost against the dense linear they were copied from?

    python benchmarks/moe.py [--quick]

Forward and backward of a layer at top-1 on the tokens of one training chunk, with the shapes of the bundled
student on a CPU and of BGE-M3 on a GPU; the linear against it, interleaved, medians. Weights are
cast once, as for all chunks of a step. Equal outputs are shown first. ``ratio`` is of the worst case where
each token has one expert: dense time / time with experts, at least 1 / 1.3. ``expert_choice`` is shown beside
it: a token may have several experts there, or the dense linear. ``layers``: the same of a whole transformer
layer, attention and both linears, of which one has experts: what a student pays.
"""

import copy
import itertools
import json
import sys
from functools import partial
from typing import Any

import torch
from measure import interleaved, parser, report
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from retrieval_ray.memory import keep_freed
from retrieval_ray.moe import WHERE, Layout, MoELinear, casts_kept
from retrieval_ray.student import default_chunk_tokens, probe_precision

SIZES = {"cpu": (384, 1536), "cuda": (1024, 4096)}  # hidden and inner: all-MiniLM-L6-v2, BGE-M3
HEADS = {384: 12, 1024: 16}
MODES = ("encode", "train")


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = probe_precision()
    keep_freed()  # as training does
    rounds, several = (3, (2, 8)) if quick else (9, (2, 4, 8))
    cases, layers = [], []
    for where, router, experts, mode in itertools.product(
        WHERE, ("softmax", "released", "expert_choice"), several, MODES
    ):
        layout = Layout(experts, 1, router, where)
        for found, whole in ((cases, False), (layers, True)):
            if not whole or router == "softmax":
                found.append(_case(device, precision, layout, mode, rounds, whole=whole))
                print(json.dumps(found[-1]), file=sys.stderr)
    worst = min((case for case in cases if case["router"] != "expert_choice"), key=lambda case: case["ratio"])
    report(
        "moe",
        quick=quick,
        ratio=worst["ratio"],
        ours=worst["ours"],
        peer=worst["peer"],
        unit="ms",
        equal=all(case["equal"] for case in (*cases, *layers)),
        bound=round(1 / 1.3, 3),
        cases=cases,
        layers=layers,
        precision=precision,
    )


def _linear(hidden: int, inner: int, layout: Layout) -> tuple[nn.Module, nn.Module, int, int]:
    """The linear, the same with experts, and what goes in and comes out."""
    inputs, outputs = (hidden, inner) if layout.where == "intermediate" else (inner, hidden)
    dense = nn.Linear(inputs, outputs)
    return dense, MoELinear(copy.deepcopy(dense), layout), inputs, outputs


def _layer(hidden: int, inner: int, layout: Layout) -> tuple[nn.Module, nn.Module, int, int]:
    """The same of a BERT layer, with heads of 64 as BGE-M3 has them on a GPU and 32 on a CPU."""
    config = BertConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=HEADS[hidden],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    dense = BertLayer(config)
    experts = copy.deepcopy(dense)
    holder = getattr(experts, layout.where)
    holder.dense = MoELinear(holder.dense, layout)
    return dense, experts, hidden, hidden


def _case(
    device: torch.device, precision: str, layout: Layout, mode: str, rounds: int, *, whole: bool = False
) -> dict[str, Any]:
    torch.manual_seed(0)
    dense, experts, inputs, outputs = (_layer if whole else _linear)(*SIZES[device.type], layout)
    layers = {"peer": dense, "ours": experts}
    # as in the model: a LayerNorm's output, in float32, or an activation's, in the precision of the products
    dtype = torch.bfloat16 if inputs == SIZES[device.type][1] and precision == "bfloat16" else torch.float32
    tokens = default_chunk_tokens(device.type, layout.experts)
    x = torch.randn(tokens // 128, 128, inputs, device=device, dtype=dtype, requires_grad=mode == "train")
    gradient = torch.randn(tokens // 128, 128, outputs, device=device)

    def run(layer: nn.Module) -> Tensor:
        with torch.set_grad_enabled(mode == "train"):
            out = layer(x)
            out = out[0] if isinstance(out, tuple) else out
        if mode == "train":
            out.backward(gradient.to(out.dtype))
        return out.detach()

    with torch.autocast(device.type, torch.bfloat16, precision == "bfloat16"), casts_kept(layers["ours"]):
        results = {name: run(layer.to(device)) for name, layer in layers.items()}
        seconds = interleaved({name: partial(run, layer) for name, layer in layers.items()}, rounds)
    ms = {name: 1000 * value for name, value in seconds.items()}
    return {
        "where": layout.where,
        "router": layout.router,
        "experts": layout.experts,
        "mode": mode,
        "tokens": tokens,
        "ratio": round(ms["peer"] / ms["ours"], 3),
        "ours": round(ms["ours"], 3),
        "peer": round(ms["peer"], 3),
        "equal": bool(torch.allclose(results["ours"], results["peer"], atol=1e-4, rtol=1e-2)),
    }


if __name__ == "__main__":
    main()
