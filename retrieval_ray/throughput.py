"""How fast training goes against the device's matrix multiplication: its own measure of a limit."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retrieval_ray.moe import moe_layers

RATES = ("tokens_per_second", "matmul_share")


def training_flops(model: Any, lengths: Sequence[int]) -> float:
    """Floating-point operations of one forward and backward over texts of these lengths.

    6 per token and parameter that a token goes through (2 forward, 4 backward; embedding tables are read,
    not multiplied), and for attention 12 per layer, hidden unit, token and token attended to (arXiv
    2001.08361, 2.1; here both directions, no causal half left out).
    Of an expert layer's stacked weights a token goes through top_k of E.
    Recomputation and padding are not counted: they are the price, not the work. model: a
    SentenceTransformer that begins with a transformers model.
    """
    share = {id(p): 0.0 for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    for layer in moe_layers(model).values():
        share[id(layer.weight_EOI)] = layer.layout.top_k / layer.layout.experts
        share[id(layer.bias_EO)] = 0.0  # biases are added, not multiplied
    dense = sum(float(p.numel()) * share.get(id(p), 1.0) for p in model.parameters() if p.dim() > 1)
    text = model[0].auto_model.config.get_text_config()
    squares = sum(float(length) ** 2 for length in lengths)
    per_square = 12.0 * int(text.num_hidden_layers) * int(text.hidden_size)
    return 6.0 * dense * sum(lengths) + per_square * squares


def matmul_limit(device: torch.device, precision: str) -> float:
    """Multiplications and additions per second of one large product at this precision, the best of five."""
    size = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def speed(steps: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """Of rows of ``steps.jsonl``: medians of the rates, and the share of all time that each part took."""
    if not steps:
        return None
    total = sum(row["seconds"] for row in steps)
    parts = [name for name in steps[0] if name.endswith("_seconds")]
    return {
        **{rate: statistics.median(row[rate] for row in steps) for rate in RATES},
        "shares": {
            part.removesuffix("_seconds"): sum(row.get(part, 0.0) for row in steps) / total for part in parts
        },
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
