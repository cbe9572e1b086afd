"""How fast is one training step, and what memory does it take, against other libraries' way to its loss?

    python benchmarks/train_step.py [--quick] [--data FOLDER] [--batch 64 512 ...] [--precision float32]
                                    [--rounds 3] [--peer-lists 64] [--device cuda]

Same weights, same lists, no dropout. Shown first: equal loss and gradient in float32. Then rounds: each side
in turn takes a step in a process of its own; medians, and the peak of the whole process. The sides:

- ours, thrice: with what its kept graphs may take measured (``ours``); held to the peer's peak (``within``);
  with nothing kept (``lean``). These two with chunks half as large on a CPU, for memory;
- sentence-transformers, two losses as it ships them: CachedMultipleNegativesRankingLoss, and
  DistillKLDivLoss accumulated over micro-batches; the first is also timed by itself (``contrastive``);
- GradCache, which Tevatron's ``--grad_cache`` calls, around the same model, with InfoNCE alone and with the
  temperature that Tevatron's call leaves out (where the package gradcache is installed).

The step is loss and gradients; tokenising and the optimiser are no part of it. With ``--data`` (a BEIR
folder) a list is a judged passage and BM25's best others; without, it is drawn at random, with SciFact's
lengths and overlap. Libraries without ids take a query's own positive in another list for a negative, so
loss and gradient are compared on lists where there is none.

The peers encode every reference to a passage and go by micro-batches, so their time grows with the number
of lists and nothing else; ``--peer-lists`` times them on the first so many and multiplies.

What is measured is kept in benchmarks/results/ piece by piece, so a run that was stopped goes on where it was
(same committed package, same settings). The last line is one JSON object, its ratio and rates those of
``within`` at the last batch; without ``--quick`` it is also written to benchmarks/results/.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from lists import Task, beir, synthetic, without_clashes
from pieces import alone, gradients, step
from sides import PEERS

from retrieval_ray.batching import cut_chunks
from retrieval_ray.student import WIDTH, default_chunk_tokens, probe_precision

OURS = ("lean", "within", "ours")  # in this order: `within` needs to know what lean takes
LEAN_CHUNK = {"cpu": 1024, "cuda": None}
Pieces = dict[str, list[Any]]  # by side, one a round; and the differences that were found, by peer


class Notebook:
    """The pieces of one setting, in a file of lines that is only added to; without a file, in memory."""

    def __init__(self, file: Path | None, setting: dict[str, Any]) -> None:
        self.file, self.setting = file, setting
        self.pieces: Pieces = {}
        for line in file.read_text().splitlines() if file and file.exists() else ():
            entry = json.loads(line)
            if entry["setting"] == setting:
                self.pieces.setdefault(entry["what"], []).append(entry["found"])

    def had(self, what: str, number: int, find: Callable[[], Any]) -> Any:
        """The piece of that number; found now if it is not there yet."""
        found = self.pieces.setdefault(what, [])
        if len(found) <= number:
            found.append(find())
            print(f"{what} {number + 1}: {found[-1]}", file=sys.stderr, flush=True)
            if self.file:
                with open(self.file, "a") as file:
                    entry = {"setting": self.setting, "what": what, "found": found[-1]}
                    file.write(json.dumps(entry) + "\n")
        return found[number]


def difference(side: str, task: Task, options: Any) -> dict[str, float]:
    """Relative differences of a peer's loss and gradient (its L2 norm) from ours, in float32."""
    terms = PEERS[side].terms
    common = (options.device, options.precision, options.threads, task, terms)
    loss, gradient = alone(gradients, "lean", *common)
    other_loss, other = alone(gradients, side, *common)
    return {
        "loss": abs(loss - other_loss) / abs(other_loss),
        "gradient": float(np.linalg.norm(gradient - other) / np.linalg.norm(other)),
    }


def measured(task: Task, notebook: Notebook, options: Any, peers: list[str]) -> Pieces:
    """Every piece of one batch size."""
    few = without_clashes(task, 8 if options.quick else 24)
    for side in peers:
        notebook.had(f"{side} differs by", 0, lambda peer=side: difference(peer, few, options))
    fewer = task.first(options.peer_lists) if options.peer_lists else task
    started = time.monotonic()
    for turn in range(options.rounds):
        if options.quick and turn and time.monotonic() - started > 100:
            break
        peaks: dict[str, float] = {}
        for side in (*peers, *OURS):
            keep, chunk = (0, LEAN_CHUNK[options.device]) if side in ("lean", "within") else (None, None)
            if side == "within":  # graphs take more than they count: the allocator leaves gaps
                keep = max(0, int(0.8 * 2**20 * (peaks["sentence_transformers"] - peaks["lean"])))
            on = fewer if side in peers else task
            common = (side, options.device, options.precision, options.threads, on, keep, chunk)
            piece = notebook.had(side, turn, lambda given=common: alone(step, *given))
            peaks[side] = piece["peak_mib"]
    return notebook.pieces


def row(task: Task, pieces: Pieces, options: Any, peers: list[str]) -> dict[str, Any]:
    """One batch size of the table."""
    size = len(task.lists.query_ids)
    timed = min(options.peer_lists or size, size)
    equal = {side: pieces[f"{side} differs by"][0] for side in peers}

    def median(side: str, what: str = "seconds") -> float:
        return statistics.median(piece[what] for piece in pieces[side])

    seconds = {side: median(side) for side in OURS}
    others = {side: median(side) * size / timed for side in peers}
    others["contrastive"] = median("sentence_transformers", "contrastive_seconds") * size / timed
    peaks = {side: max(piece["peak_mib"] for piece in pieces[side]) for side in (*OURS, *peers)}
    kinds = task.lists.query_ids, sorted({p for lst in task.lists.passage_ids for p in lst})
    lengths = [[len(task.rows[name]) for name in names] for names in kinds]
    budget = default_chunk_tokens(options.device)
    padded = sum(
        len(chunk) * -(-own[chunk[0]] // WIDTH) * WIDTH
        for own in lengths
        for chunk in cut_chunks(own, budget, multiple=WIDTH)
    )
    limit = max(piece["gemm"] for side in OURS for piece in pieces[side])
    tokens, work = (pieces["ours"][0][what] for what in ("tokens", "tflop"))
    return {
        "batch": size,
        "places": len(task.lists.passage_ids[0]),
        "peers_timed_on": timed,
        "references_per_passage": task.lists.teacher_BK.size / len(kinds[1]),
        "tokens": tokens,
        "padding": 1 - tokens / padded,
        "differences": equal,
        "equal": all(value <= 1e-5 for found in equal.values() for value in found.values()),
        "rounds": min(len(pieces[side]) for side in (*OURS, *peers)),
        "seconds": {**seconds, **others},
        "ratios": {side: {peer: others[peer] / seconds[side] for peer in others} for side in OURS},
        "peak_mib": peaks,
        "loaded_mib": {side: median(side, "loaded_mib") for side in (*OURS, *peers)},
        "within_the_peers_memory": peaks["within"] <= peaks["sentence_transformers"],
        "tokens_per_second": {side: tokens / seconds[side] for side in OURS},
        "gemm_gflops": limit / 1e9,
        "gemm_share": {side: work * 1e12 / seconds[side] / limit for side in OURS},
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--data", type=Path, help="a BEIR folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[512])
    parser.add_argument("--places", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="of a passage, at most")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default: the faster")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-lists", type=int, help="lists that the peers are timed on; default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.quick:
        options.batch, options.places, options.tokens = [128], 4, 64
    options.precision = options.precision or probe_precision(options.device)
    options.threads = torch.get_num_threads()
    peers = [side for side in PEERS if side != "gradcache" or importlib.util.find_spec("gradcache")]
    if "gradcache" not in peers:
        print("no package gradcache: Tevatron's step is left out", file=sys.stderr)
    name = f"train_step-{options.data.name if options.data else 'synthetic'}"
    make = (lambda *given: beir(options.data, *given)) if options.data else synthetic
    task = make(max(options.batch), options.places, options.tokens)
    same = ("places", "tokens", "precision", "threads", "peer_lists", "device")
    setting = {what: getattr(options, what) for what in same} | {"code": measure.commit("HEAD:retrieval_ray")}
    file = None if options.quick else measure.RESULTS / f"{name}.pieces.jsonl"
    if file:
        file.parent.mkdir(exist_ok=True)
    table = []
    for size in options.batch:
        part = task.first(size)
        pieces = measured(part, Notebook(file, {**setting, "batch": size}), options, peers)
        table.append(row(part, pieces, options, peers))
    last = table[-1]
    measure.report(
        name,
        quick=options.quick,
        ratio=last["ratios"]["within"]["sentence_transformers"],
        ours=last["batch"] / last["seconds"]["within"],
        peer=last["batch"] / last["seconds"]["sentence_transformers"],
        unit="queries/s",
        equal=all(found["equal"] for found in table),
        precision=options.precision,
        table=table,
    )


if __name__ == "__main__":
    main()
