"""How fast is encoding against sentence-transformers' own ``encode``, at the same precision?

    python benchmarks/encode.py [--quick]

Same model, same texts (the demo's passages), equal vectors shown first; runs are interleaved and medians
compared. The last line is one JSON object; without ``--quick`` it is also written to benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from retrieval_ray.demo.corpus import passages
from retrieval_ray.student import Student, probe_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds")
    quick = parser.parse_args().quick
    texts = [f"{title} {text}" for _, title, text in passages()]
    texts = texts[:: max(1, len(texts) // (600 if quick else 2400))]
    precision = probe_precision()
    student = Student("all-MiniLM-L6-v2", precision=precision)

    def ours() -> np.ndarray:
        return student.encode(texts, "passage", token_budget=16_384)

    def peer() -> np.ndarray:
        with torch.autocast(student.device.type, torch.bfloat16, precision == "bfloat16"):
            return np.asarray(student.model.encode(texts, batch_size=32, show_progress_bar=False))

    equal = bool(np.allclose(ours(), peer(), atol=1e-5 if precision == "float32" else 1e-2))
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(2 if quick else 5):
        for name, run in (("ours", ours), ("peer", peer)):
            seconds[name].append(_timed(run))
    rates = {name: len(texts) / statistics.median(values) for name, values in seconds.items()}
    result = {
        "benchmark": "encode",
        "ratio": round(rates["ours"] / rates["peer"], 3),
        "ours": round(rates["ours"], 1),
        "peer": round(rates["peer"], 1),
        "unit": "passages/s",
        "equal": equal,
        "precision": precision,
        "texts": len(texts),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {student.device.type}",
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    if not quick:
        target = Path(__file__).parent / "results" / "encode.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
