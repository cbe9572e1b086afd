"""What do several workers of one core gain in a training step over one worker of one core?

    python benchmarks/train_workers.py [--quick] [--data FOLDER] [--batch 512] [--workers 2]

The same lists on both, in turn, medians; no graph is kept, so the work is the same. ``equal``: loss and norm
of the gradient agree to 1e-4 (that all of the gradient does is shown by tests/test_step.py). The last line is
one JSON object; without ``--quick`` it is also written to benchmarks/results/.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import measure
import torch
from lists import Task, beir, synthetic
from sides import Ours

from retrieval_ray.student import probe_precision


def step(workers: int, task: Task, precision: str) -> dict[str, float]:
    """Of one step: its seconds from when all workers are ready, its loss, and the norm of its gradient."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (workers, folder, task, precision), nprocs=workers)
        found: dict[str, float] = json.loads((Path(folder) / "found").read_text())
    print(f"{workers} workers: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def _worker(rank: int, workers: int, folder: str, task: Task, precision: str) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=workers
        )
    side = Ours("cpu", precision, keep_bytes=0)
    side.loss(task.first(2))
    if workers > 1:
        torch.distributed.barrier()
    side.model.zero_grad()
    start = time.perf_counter()
    loss = side.loss(task)
    seconds = time.perf_counter() - start
    if rank == 0:
        norm = float(
            torch.nn.utils.get_total_norm([p.grad for p in side.model.parameters() if p.grad is not None])
        )
        (Path(folder) / "found").write_text(json.dumps({"seconds": seconds, "loss": loss, "norm": norm}))
    if workers > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--data", type=Path, help="a BEIR folder")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--places", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="of a passage, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.batch, options.places, options.tokens, options.rounds = 64, 4, 64, 2
    make = partial(beir, options.data) if options.data else synthetic
    task = make(options.batch, options.places, options.tokens)
    precision = probe_precision("cpu")
    runs: dict[int, list[dict[str, float]]] = {1: [], options.workers: []}
    for _ in range(options.rounds):
        for workers, found in runs.items():
            found.append(step(workers, task, precision))
    seconds = {workers: [run["seconds"] for run in found] for workers, found in runs.items()}
    one, several = (statistics.median(found) for found in seconds.values())
    alone, together = runs[1][0], runs[options.workers][0]
    lists = len(task.lists.query_ids)
    measure.report(
        "train_workers",
        quick=options.quick,
        ratio=one / several,
        ours=lists / several,
        peer=lists / one,
        unit="queries/s",
        equal=all(math.isclose(alone[what], together[what], rel_tol=1e-4) for what in ("loss", "norm")),
        workers=options.workers,
        precision=precision,
        data=options.data.name if options.data else "synthetic",
        batch=lists,
        places=options.places,
        seconds={str(workers): found for workers, found in seconds.items()},
    )


if __name__ == "__main__":
    main()
