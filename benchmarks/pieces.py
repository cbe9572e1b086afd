"""One step of one side, in a process of its own: its seconds, and the peak of the whole process's memory."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lists import Task
from sides import PEERS, Ours

from retrieval_ray.throughput import matmul_limit


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def gradients(
    side: str, device: str, precision: str, threads: int, task: Task, terms: Mapping[str, float]
) -> tuple[float, np.ndarray]:
    """Loss and gradient of a step in float32, all else as ``precision`` would have it. terms: of ours."""
    torch.set_num_threads(threads)
    runner: Any = _side(side, device, precision, 0, None)
    runner.student.precision = "float32"
    runner.terms = terms
    loss = runner.loss(task)
    found = [p.grad.flatten().cpu().numpy() for p in runner.model.parameters() if p.grad is not None]
    return loss, np.concatenate(found)


def step(
    side: str,
    device: str,
    precision: str,
    threads: int,
    task: Task,
    keep_bytes: int | None,
    chunk_tokens: int | None,
) -> dict[str, float]:
    """Seconds of one step after a small first one; peak and what was there before it, in MiB.

    keep_bytes, chunk_tokens: of ours, see ``Ours``. Ours also says the device's rate of matrix products.
    """
    torch.set_num_threads(threads)
    runner: Any = _side(side, device, precision, keep_bytes, chunk_tokens)
    runner.loss(task.first(2))
    runner.model.zero_grad(set_to_none=True)
    loaded = _peak_mib(device)
    start = time.perf_counter()
    runner.loss(task)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "loaded_mib": loaded, "peak_mib": _peak_mib(device), **runner.facts}
    if side not in PEERS:
        found["gemm"] = matmul_limit(torch.device(device), precision)
    return found


def _side(side: str, device: str, precision: str, keep_bytes: int | None, chunk_tokens: int | None) -> Any:
    if side in PEERS:
        return PEERS[side](device, precision)
    return Ours(device, precision, keep_bytes, chunk_tokens)


def _peak_mib(device: str) -> float:
    """The most memory that this process has held: libraries, model and all; on a GPU what torch reserved."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
