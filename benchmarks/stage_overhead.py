"""What does Ray cost, and what does a second worker bring?

    python benchmarks/stage_overhead.py [--quick]

The encode stage with one worker against the same model in a plain loop over the same parts, reading the
same tables, making tokens ahead and writing the same vectors. From a short and a long corpus: the
stage's start-up and its cost per passage beyond the loop's. ``ratio`` is the loop's seconds over the stage's
on a run of ten minutes of the loop, from these two; ``measured_ratio`` is that of the long corpus as it was.
``workers`` is passages per second without start-up with two workers of one thread over one such worker.
"""

import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from made import collection, context, start_ray
from measure import parser, report, seconds_of
from texts import passage_texts, query_texts

from retrieval_ray.artifacts import Location, Stage, part_name, stage
from retrieval_ray.model_files import resolve_model
from retrieval_ray.stages import encode
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.student import Role, Student, default_token_budget, probe_precision
from retrieval_ray.tokens import Tokens

MODEL, MINUTES, PART = "all-MiniLM-L6-v2", 10, 64


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int)
    given = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    short, long = (64, 192) if given.quick else (256, 2048)
    if device == "cuda":
        short, long = 20 * short, 20 * long
    precision, budget = probe_precision(device), default_token_budget(device)
    threads = torch.get_num_threads()
    student = Student(MODEL, precision=precision, device=device)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        start_ray()
        numbers: dict[str, Any] = {"precision": precision, "budget": budget}
        for turn in range(given.rounds or (1 if given.quick else 3)):
            for size in (short, long):
                for name, workers, each in (
                    ("loop", 1, threads), ("ray", 1, threads), ("one", 1, 1), ("two", 2, 1)
                ):  # fmt: skip
                    run = context(
                        f"{folder}/{turn}-{size}-{name}", resolve_model(MODEL, "model"),
                        workers=workers, threads=each, **numbers,
                    )  # fmt: skip
                    made = collection(run, "texts", passage_texts(size), size, query_texts(1), part_rows=PART)
                    took = seconds_of(
                        (lambda made=made, run=run: _loop(run, made, student))
                        if name == "loop"
                        else (lambda made=made, run=run: encode.run(run, made))
                    )
                    seconds.setdefault(f"{name} {size}", []).append(took)
        equal = _same(folder, long)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    per_passage = {
        name: (median[f"{name} {long}"] - median[f"{name} {short}"]) / (long - short)
        for name in ("loop", "ray", "one", "two")
    }
    start_up = median[f"ray {short}"] - median[f"loop {short}"]
    passages = 60 * MINUTES / per_passage["loop"]
    ten_minutes = start_up + per_passage["ray"] * passages
    report(
        "stage_overhead",
        quick=given.quick,
        ratio=60 * MINUTES / ten_minutes,
        ours=ten_minutes,
        peer=60.0 * MINUTES,
        unit="seconds, for ten minutes of the loop",
        equal=equal,
        measured_ratio=median[f"loop {long}"] / median[f"ray {long}"],
        workers=per_passage["one"] / per_passage["two"],
        start_up_seconds=start_up,
        seconds=median,
        precision=precision,
        passages=[short, long],
    )


def _loop(run: Context, made: Collection, student: Student) -> None:
    """What a worker does, without Ray: the next part's tokens ahead, and queries as well."""
    for texts, role in ((made.corpus, "passage"), (made.queries, "query")):
        target = stage(run.store, f"loop-{role}", {})

        def tokenised(number: int, texts: Stage = texts, role: Role = role) -> tuple[list[str], list[Tokens]]:
            ids, rows = encode.part_texts(texts, number, role)
            return ids, student.tokenize(rows, role)

        buckets = int(texts.manifest()["buckets"])
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(tokenised, 0)
            for number in range(buckets):
                ids, tokens = following.result()
                if number + 1 < buckets:
                    following = ahead.submit(tokenised, number + 1)
                vectors = student.encode_tokens(tokens, role, token_budget=run.profile.token_budget)
                column = pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.astype(np.float16).ravel()), student.dimension
                )
                name = part_name("vectors", number, "arrow")
                target.write(name, pa.table({"id": ids, "vector": column}))


def _same(folder: str, size: int) -> bool:
    """Whether the loop and the stages wrote the same vectors, one worker and two to the last bit."""
    found = {}
    for name in ("loop", "ray", "one", "two"):
        parts = Path(folder, f"0-{size}-{name}").glob("*/vectors-*.arrow")
        tables = [Location.of(str(path)).read_table() for path in sorted(parts, key=str)]
        found[name] = {
            key: vector
            for table in tables
            for key, vector in zip(
                table.column("id").to_pylist(), table.column("vector").to_pylist(), strict=True
            )
        }
    near = [np.abs(np.array(found["loop"][key]) - np.array(found["ray"][key])).max() for key in found["loop"]]
    same = found["one"] == found["two"] and found["loop"].keys() == found["ray"].keys()
    return same and bool(max(near) < 1e-3)


if __name__ == "__main__":
    main()
