"""What do batched experts cost against the dense linear they were copied from?

    python benchmarks/moe.py [--quick]

Forward and backward of a layer at top-1 on the tokens of one training chunk, with the shapes of the bundled
student on a CPU and of BGE-M3 on a GPU; the linear against it, interleaved, medians. Weights are
cast once, as for all chunks of a step. Equal outputs are shown first. ``ratio`` is of the worst case where
each token has one expert: dense time / time with experts, at least 1 / 1.3. ``expert_choice`` is shown beside
it: a token may have several experts there, or the dense linear.
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

from retrieval_ray.memory import keep_freed
from retrieval_ray.moe import WHERE, Layout, MoELinear, casts_kept
from retrieval_ray.student import default_chunk_tokens, probe_precision

SIZES = {"cpu": (384, 1536), "cuda": (1024, 4096)}  # hidden and inner: all-MiniLM-L6-v2, BGE-M3
MODES = ("encode", "train")


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = probe_precision()
    keep_freed()  # as training does
    cases = []
    for where, router, experts, mode in itertools.product(
        WHERE, ("softmax", "released", "expert_choice"), (2, 8) if quick else (2, 4, 8), MODES
    ):
        cases.append(_case(device, precision, Layout(experts, 1, router, where), mode, 3 if quick else 9))
        print(json.dumps(cases[-1]), file=sys.stderr)
    worst = min((case for case in cases if case["router"] != "expert_choice"), key=lambda case: case["ratio"])
    report(
        "moe",
        quick=quick,
        ratio=worst["ratio"],
        ours=worst["ours"],
        peer=worst["peer"],
        unit="ms",
        equal=all(case["equal"] for case in cases),
        bound=round(1 / 1.3, 3),
        cases=cases,
        precision=precision,
    )


def _case(device: torch.device, precision: str, layout: Layout, mode: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, inner = SIZES[device.type]
    inputs, outputs = (hidden, inner) if layout.where == "intermediate" else (inner, hidden)
    dense = nn.Linear(inputs, outputs)
    layers = {"peer": dense, "ours": MoELinear(copy.deepcopy(dense), layout)}
    # as in the model: a LayerNorm's output, in float32, or an activation's, in the precision of the products
    dtype = torch.bfloat16 if layout.where == "output" and precision == "bfloat16" else torch.float32
    tokens = default_chunk_tokens(device.type, layout.experts)
    x = torch.randn(tokens // 128, 128, inputs, device=device, dtype=dtype, requires_grad=mode == "train")
    gradient = torch.randn(tokens // 128, 128, outputs, device=device)

    def run(layer: nn.Module) -> Tensor:
        with torch.set_grad_enabled(mode == "train"):
            out: Tensor = layer(x)
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
