"""How fast, and in how much memory, are hard negatives mined?

    python benchmarks/search.py [--quick]

Mining from texts: ours encodes passages in parts to float16 on disk and searches them mapped, with a
running top k; the peer is sentence-transformers' ``mine_hard_negatives``, with FAISS and without. Searching
alone: ``search`` on mapped vectors against ``util.semantic_search`` on the same vectors loaded from disk;
ours proposes in the precision that this machine is fast in.
The encoder is a tiny random one in float32 for both, so that mining is what is measured.

Every run is a process of its own; memory is its peak above what it held with the model and the texts
loaded. ``ratio`` is the peer's seconds over ours, ``memory_ratio`` ours over the peer's (less is better),
each against whichever of the peer's ways is better at it.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from made import tiny_encoder
from measure import PeakMemory, in_process, parser, report, seconds_of
from texts import passage_texts, query_texts

from retrieval_ray.artifacts import Location
from retrieval_ray.search import Block, block_sizes, peak_bytes, search
from retrieval_ray.student import Student, default_token_budget, probe_precision

HIDDEN, NEGATIVES, DEPTH = 384, 10, 50
MINING = ("ours", "mine_hard_negatives", "mine_hard_negatives, faiss")
SEARCHING = ("ours", "semantic_search")
_PART, _BUDGET = 512, default_token_budget("cpu")
_WORDS = 12  # of a passage: the encoder is not what is measured


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--passages", type=int)
    arguments.add_argument("--queries", type=int)
    arguments.add_argument("--rounds", type=int)
    arguments.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    passages = given.passages or (20_000 if given.quick else 100_000)
    queries = given.queries or (2_000 if given.quick else 10_000)
    os.environ["TQDM_DISABLE"] = "1"
    if given.part:
        kind, folder = given.part
        print(json.dumps(_one(kind, Path(folder), passages, queries)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tiny_encoder(folder, hidden=HIDDEN)
        _write_vectors(Path(folder), passages, queries)
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(given.rounds or (1 if given.quick else 3)):
            for kind in [f"mining {name}" for name in MINING] + [f"searching {name}" for name in SEARCHING]:
                command = ["--part", kind, folder, "--passages", str(passages), "--queries", str(queries)]
                found.setdefault(kind, []).append(in_process(__file__, command))
        overlap = {
            "mining": min(_overlap(folder, f"mining {MINING[0]}", f"mining {name}") for name in MINING[1:]),
            "searching": _overlap(folder, "searching ours", "searching semantic_search"),
        }
    seconds = {k: statistics.median(run["seconds"] for run in runs) for k, runs in found.items()}
    memory = {k: statistics.median(run["mib"] for run in runs) for k, runs in found.items()}
    mapped = {k: statistics.median(run["mib_with_mapped"] for run in runs) for k, runs in found.items()}
    peers = [f"mining {name}" for name in MINING[1:]]
    fastest, leanest = (min(peers, key=lambda kind: of[kind]) for of in (seconds, memory))
    rows = block_sizes("cpu")
    report(
        "search",
        quick=given.quick,
        ratio=seconds[fastest] / seconds["mining ours"],
        ours=seconds["mining ours"],
        peer=seconds[fastest],
        unit="seconds of mining",
        equal=min(overlap.values()) > 0.99,
        memory_ratio=memory["mining ours"] / max(memory[leanest], 1.0),
        search_ratio=seconds["searching semantic_search"] / seconds["searching ours"],
        search_memory_ratio=memory["searching ours"] / max(memory["searching semantic_search"], 1.0),
        seconds=seconds,
        peak_mib=memory,
        peak_mib_with_mapped=mapped,
        formula_mib=peak_bytes(min(rows[0], queries), rows[1], HIDDEN, DEPTH) / 2**20,
        overlap=overlap,
        passages=passages,
        queries=queries,
        dimension=HIDDEN,
        depth=DEPTH,
    )


def _one(kind: str, folder: Path, passages: int, queries: int) -> dict[str, Any]:
    """Measure one way in this process; its results are written for comparison."""
    what, name = kind.split(" ", 1)
    run = (_mining if what == "mining" else _searching)(name, folder, passages, queries)
    with PeakMemory() as peak:
        seconds = seconds_of(lambda: np.save(folder / f"{kind}.npy", run()))
    return {"seconds": seconds, "mib": peak.megabytes, "mib_with_mapped": peak.with_mapped}


def _mining(name: str, folder: Path, passages: int, queries: int) -> Callable[[], np.ndarray]:
    """A function that mines; loading is over when this returns. Rows: each query's negatives."""
    from sentence_transformers.util import mine_hard_negatives

    corpus = [" ".join(text.split()[:_WORDS]) for text in passage_texts(passages)]
    corpus = [f"{n} {text}" for n, text in enumerate(corpus)]  # all different
    anchors = [f"{n} {text}" for n, text in enumerate(query_texts(queries))]
    place = {text: n for n, text in enumerate(corpus)}
    student = Student(str(folder / "encoder"), precision="float32", device="cpu")
    student.encode(corpus[:64], "passage", token_budget=_BUDGET)
    if name == "ours":
        return lambda: _ours(student, folder, corpus, anchors)
    from datasets import Dataset

    pairs = Dataset.from_dict({"anchor": anchors, "positive": [corpus[n % passages] for n in range(queries)]})

    def mine() -> np.ndarray:
        found = mine_hard_negatives(
            pairs, student.model, corpus=corpus, range_max=DEPTH, num_negatives=NEGATIVES,
            use_faiss="faiss" in name, output_format="n-tuple", verbose=False,
        )  # fmt: skip
        columns = [found[f"negative_{n}"] for n in range(1, NEGATIVES + 1)]
        return np.array([[place[text] for text in column] for column in columns]).T

    return mine


def _ours(student: Student, folder: Path, corpus: list[str], anchors: list[str]) -> np.ndarray:
    parts = folder / "parts"
    for start in range(0, len(corpus), _PART):
        vectors = student.encode(corpus[start : start + _PART], "passage", token_budget=_BUDGET)
        _write_part(parts, start, vectors)
    rows = []
    size, _ = block_sizes("cpu")
    precision = probe_precision("cpu")
    for start in range(0, len(anchors), size):
        queries_QD = student.encode(anchors[start : start + size], "query", token_budget=_BUDGET)
        rankings = search(_blocks(parts), queries_QD, DEPTH, precision=precision)
        for n, ranking in enumerate(rankings, start=start):
            positive = n % len(corpus)
            rows.append([int(p) for p, _ in ranking if int(p) != positive][:NEGATIVES])
    return np.array(rows)


def _searching(name: str, folder: Path, passages: int, queries: int) -> Callable[[], np.ndarray]:
    queries_QD = np.load(folder / "queries.npy")
    few = [(ids[:DEPTH], vectors[:DEPTH]) for ids, vectors in itertools.islice(_blocks(folder / "given"), 1)]
    if name == "ours":
        size, _ = block_sizes("cpu")
        precision = probe_precision("cpu")
        search(few, queries_QD[:8], DEPTH, precision=precision)  # what the first call loads is not the search
        return lambda: np.array(
            [
                [int(p) for p, _ in ranking]
                for start in range(0, queries, size)
                for ranking in search(
                    _blocks(folder / "given"), queries_QD[start : start + size], DEPTH, precision=precision
                )
            ]
        )
    from sentence_transformers.util import dot_score, semantic_search

    semantic_search(*(torch.from_numpy(some.astype(np.float32)) for some in (queries_QD[:8], few[0][1])))

    def theirs() -> np.ndarray:
        vectors = np.concatenate([block for _, block in _blocks(folder / "given")])
        found = semantic_search(
            torch.from_numpy(queries_QD.astype(np.float32)),
            torch.from_numpy(vectors.astype(np.float32)),
            top_k=DEPTH,
            score_function=dot_score,
        )
        return np.array([[hit["corpus_id"] for hit in row] for row in found])

    return theirs


def _write_vectors(folder: Path, passages: int, queries: int) -> None:
    """Random unit vectors around common centres, written in parts."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, HIDDEN))

    def drawn(count: int) -> np.ndarray:
        vectors = centres[rng.integers(0, 200, count)] + rng.standard_normal((count, HIDDEN))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)

    np.save(folder / "queries.npy", drawn(queries))
    for start in range(0, passages, _PART):
        _write_part(folder / "given", start, drawn(min(_PART, passages - start)))


def _write_part(folder: Path, start: int, vectors: np.ndarray) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), HIDDEN)
    ids = [str(start + n) for n in range(len(vectors))]
    (Location.of(str(folder)) / f"{start:09d}.arrow").write_table(pa.table({"id": ids, "vector": column}))


def _blocks(folder: Path) -> Iterator[Block]:
    for path in sorted(folder.glob("*.arrow")):
        table = Location.of(str(path)).read_table()
        column = table.column("vector").chunk(0)
        yield (
            table.column("id").to_pylist(),
            column.flatten().to_numpy(zero_copy_only=False).reshape(-1, HIDDEN),
        )


def _overlap(folder: str, one: str, other: str) -> float:
    """The share of one's results that the other found too, query by query."""
    pairs = zip(np.load(Path(folder) / f"{one}.npy"), np.load(Path(folder) / f"{other}.npy"), strict=True)
    return round(float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs])), 4)


if __name__ == "__main__":
    main()
