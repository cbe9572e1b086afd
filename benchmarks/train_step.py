"""How fast is one training step, and what memory does it take, against other libraries' way to its loss?

    python benchmarks/train_step.py [--quick] [--data FOLDER] [--batch 512 ...] [--precision float32]
                                    [--workers 2] [--device cuda]

Same weights, same lists, no dropout. Shown first: equal loss and gradient in float32. Then rounds in turn,
each side in a process of its own, and medians. The sides:

- ours, with what its kept graphs may take measured (``ours``), and held to the peer's peak (``lean``);
- sentence-transformers, two losses as it ships them: CachedMultipleNegativesRankingLoss, and
  DistillKLDivLoss accumulated over micro-batches; and the first alone;
- GradCache, which Tevatron's ``--grad_cache`` calls, around the same model, with InfoNCE alone and with the
  temperature that Tevatron's call leaves out (where the package gradcache is installed).

The step is loss and gradients; tokenising and the optimiser are no part of it. With ``--data`` (a BEIR
folder) a list is a judged passage and BM25's best others; without, it is drawn at random, with SciFact's
lengths and overlap. Libraries without ids take a query's own positive in another list for a negative, so
loss and gradient are compared on lists where there is none.

With ``--workers 2``: throughput of two workers of one core over one worker of one core instead.

The last line is one JSON object; without ``--quick`` it is also written to benchmarks/results/.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrieval_ray.bm25 import Bm25
from retrieval_ray.memory import activation_bytes
from retrieval_ray.objective import Objective
from retrieval_ray.step import Lists, training_step
from retrieval_ray.student import Student, probe_precision
from retrieval_ray.throughput import matmul_limit, training_flops
from retrieval_ray.tokens import Tokens

MODEL = "all-MiniLM-L6-v2"
CHUNK_TOKENS = 8192
PASSAGES_PER_CALL = 32  # of the peers
LISTS_PER_CALL = 4  # of sentence-transformers' KL: about as many tokens as a chunk
POOL = 4200  # synthetic passages; 512 lists of 20 refer to each of them 2.67 times, as on SciFact
OBJECTIVE = Objective({"kl": 1.0, "infonce": 0.1}, 0.05, 0.3, 0.02)


@dataclass(frozen=True)
class Task:
    """Lists, and the tokens of what they name."""

    lists: Lists
    rows: dict[str, Tokens]

    def first(self, size: int) -> "Task":
        return self.take(range(min(size, len(self.lists.query_ids))))

    def take(self, chosen: Any) -> "Task":
        lists = self.lists
        return replace(
            self,
            lists=Lists(
                [lists.query_ids[n] for n in chosen],
                [lists.passage_ids[n] for n in chosen],
                lists.teacher_BK[list(chosen)],
                [lists.excluded_ids[n] for n in chosen],
            ),
        )


# --- the sides: each a class with loss(task) that leaves gradients ------------------------------


class Ours:
    def __init__(self, device: str, precision: str) -> None:
        self.student = Student(MODEL, precision=precision, device=device)
        self.student.prepare_training()
        self.model = self.student.model
        self.terms = OBJECTIVE.weights
        self.keep_bytes: int | None = None

    def loss(self, task: Task) -> float:
        if self.keep_bytes is None:
            count = sum(p.numel() for p in self.model.parameters())
            self.keep_bytes = activation_bytes(self.student.device, count)
        return training_step(
            self.student,
            task.lists,
            task.rows.__getitem__,
            task.rows.__getitem__,
            replace(OBJECTIVE, weights=self.terms),
            chunk_tokens=CHUNK_TOKENS,
            keep_bytes=self.keep_bytes,
        )["loss"]


class _Peer:
    def __init__(self, device: str, precision: str) -> None:
        self.student = Student(MODEL, precision=precision, device=device)  # its weights and padding
        self.model = self.student.model

    def columns(self, task: Task, part: slice = slice(None)) -> list[dict[str, Any]]:
        """The queries, and the passages of each place of the lists."""
        lists, embed = task.lists, self.student._features
        columns = zip(*lists.passage_ids[part], strict=True)
        queries = embed([task.rows[q] for q in lists.query_ids[part]], "query")
        return [queries, *(embed([task.rows[p] for p in column], "passage") for column in columns)]


class CachedInfonce(_Peer):
    """sentence-transformers' contrastive loss alone."""

    terms = {"infonce": 0.1}

    def loss(self, task: Task) -> float:
        from sentence_transformers.sentence_transformer import losses

        cached = losses.CachedMultipleNegativesRankingLoss(
            self.model, scale=1 / OBJECTIVE.infonce_temperature, mini_batch_size=PASSAGES_PER_CALL
        )
        with self.student.autocast():
            loss = 0.1 * cached(self.columns(task), None)
            loss.backward()
        return float(loss.detach())


class SentenceTransformers(CachedInfonce):
    """The whole loss: the contrastive one, and the KL over micro-batches of lists."""

    terms = OBJECTIVE.weights

    def loss(self, task: Task) -> float:
        from sentence_transformers.sentence_transformer import losses

        total = super().loss(task)
        tau = OBJECTIVE.student_temperature
        kl = losses.DistillKLDivLoss(
            self.model, student_temperature=tau, teacher_temperature=OBJECTIVE.teacher_temperature
        )
        size = len(task.lists.query_ids)
        teacher = torch.from_numpy(task.lists.teacher_BK).float().to(self.student.device)
        for start in range(0, size, LISTS_PER_CALL):
            part = slice(start, start + LISTS_PER_CALL)
            with self.student.autocast():
                loss = kl(self.columns(task, part), teacher[part])
            loss = loss / tau**2 * len(teacher[part]) / size  # it multiplies by the temperature squared
            loss.backward()
            total += float(loss.detach())
        return total


class GradCachePackage(_Peer):
    """luyug/GradCache as Tevatron calls it, one model for queries and passages."""

    terms = {"infonce": 0.1}

    def __init__(self, device: str, precision: str) -> None:
        import gradcache

        sys.modules["grad_cache"] = gradcache  # the name that its own modules import each other by
        from gradcache.grad_cache import GradCache

        super().__init__(device, precision)
        self.cache = GradCache(
            models=[self.model, self.model],
            chunk_sizes=PASSAGES_PER_CALL,
            loss_fn=self.infonce,
            split_input_fn=self.split,
            get_rep_fn=lambda output: output["sentence_embedding"].float(),
        )

    def split(self, features: dict[str, Any], size: int) -> list[dict[str, Any]]:
        parts = zip(features["input_ids"].split(size), features["attention_mask"].split(size), strict=True)
        # the model is called as model(features): one argument
        return [{"input": {"input_ids": ids, "attention_mask": mask}} for ids, mask in parts]

    def infonce(self, queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
        scores = queries @ passages.T / OBJECTIVE.infonce_temperature
        target = torch.arange(len(queries), device=scores.device) * (len(passages) // len(queries))
        return 0.1 * torch.nn.functional.cross_entropy(scores, target)

    def loss(self, task: Task) -> float:
        lists, embed = task.lists, self.student._features
        queries = embed([task.rows[q] for q in lists.query_ids], "query")
        passages = embed([task.rows[p] for row in lists.passage_ids for p in row], "passage")
        with self.student.autocast():
            return float(self.cache(queries, passages))


SIDES = {
    "ours": Ours,
    "lean": Ours,
    "sentence_transformers": SentenceTransformers,
    "infonce_alone": CachedInfonce,
    "gradcache": GradCachePackage,
}


# --- a side in its process ------------------------------------------------------------------------


def _serve(connection: Any, side: str, device: str, precision: str, threads: int) -> None:
    torch.set_num_threads(threads)
    runner: Any = SIDES[side](device, precision)
    while (request := connection.recv()) is not None:
        what, *given = request
        if what == "gradients":
            terms, runner.terms = runner.terms, given[1]
            runner.student.precision = "float32"
            loss = runner.loss(given[0])
            gradients = [p.grad for p in runner.model.parameters()]
            flat = [g.flatten().cpu().numpy() for g in gradients if g is not None]
            connection.send((loss, np.concatenate(flat)))
            runner.student.precision, runner.terms = precision, terms
        elif what == "step":
            start = time.perf_counter()
            runner.loss(given[0])
            if device == "cuda":
                torch.cuda.synchronize()
            connection.send(time.perf_counter() - start)
        elif what == "keep":
            runner.keep_bytes = given[0]
            connection.send(None)
        elif what == "peak":
            connection.send(_peak_bytes(device))
        elif what == "limit":
            connection.send(matmul_limit(torch.device(device), precision))
        runner.model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_reserved())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Process:
    """A side, started and ready; ``ask`` sends one request and waits for the answer."""

    def __init__(self, side: str, device: str, precision: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, side, device, precision, threads))
        self._process.start()
        other.close()

    def ask(self, *request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


# --- the lists ------------------------------------------------------------------------------------


def synthetic(size: int, places: int, limit: int) -> Task:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(0.85 * limit, 0.2 * limit, POOL), 16, limit).astype(int)
    rows = {f"p{n}": _tokens(rng, length) for n, length in enumerate(lengths)}
    rows |= {f"q{n}": _tokens(rng, length) for n, length in enumerate(rng.integers(8, 32, size))}
    lists = [[f"p{n}" for n in rng.choice(POOL, places, replace=False)] for _ in range(size)]
    return Task(_lists([f"q{n}" for n in range(size)], lists), rows)


def _tokens(rng: np.random.Generator, length: int) -> Tokens:
    return np.array([101, *rng.integers(1000, 30_000, length - 2), 102], dtype=np.int64)


def beir(folder: Path, size: int, places: int, limit: int) -> Task:
    """The first queries that have a judged passage, and BM25's best passages beside it."""
    corpus = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _jsonl(folder, "corpus")}
    queries = {row["_id"]: row["text"] for row in _jsonl(folder, "queries")}
    judged: dict[str, list[str]] = {}
    for file in sorted((folder / "qrels").glob("*.tsv")):
        for line in file.read_text().splitlines()[1:]:
            query, passage, relevance = line.split("\t")
            if int(relevance) > 0 and passage in corpus:
                judged.setdefault(query, []).append(passage)
    chosen = [str(q) for q in np.random.default_rng(0).permutation(sorted(judged))[:size]]
    index = Bm25(list(corpus), list(corpus.values()))
    spare = list(corpus)[: 2 * places]  # for a query that shares words with few passages
    lists = []
    for query in chosen:
        found = [passage for passage, _ in index.search(queries[query], 2 * places)]
        others = [p for p in dict.fromkeys([*found, *spare]) if p not in judged[query]]
        lists.append([judged[query][0], *others[: places - 1]])
    student = Student(MODEL, precision="float32", device="cpu")
    passages = sorted({p for row in lists for p in row})
    rows = dict(
        zip(passages, student.tokenize([corpus[p] for p in passages], "passage", limit=limit), strict=True)
    )
    found_rows = student.tokenize([queries[q] for q in chosen], "query", limit=64)
    return Task(
        _lists([f"query {q}" for q in chosen], lists),
        rows | {f"query {q}": row for q, row in zip(chosen, found_rows, strict=True)},
    )


def _jsonl(folder: Path, name: str) -> list[dict[str, Any]]:
    with open(folder / f"{name}.jsonl") as file:
        return [json.loads(line) for line in file]


def _lists(queries: list[str], lists: list[list[str]]) -> Lists:
    teacher = np.random.default_rng(1).random((len(lists), len(lists[0])))
    teacher[:, 0] = 1.0
    return Lists(queries, lists, teacher, [[] for _ in lists])


def without_clashes(task: Task, most: int) -> Task:
    """Lists none of which holds another one's positive: there both ways to InfoNCE are the same."""
    chosen: list[int] = []
    positives: set[str] = set()
    passages: set[str] = set()
    for n, row in enumerate(task.lists.passage_ids):
        if row[0] not in passages and not positives & set(row) and len(chosen) < most:
            chosen.append(n)
            positives.add(row[0])
            passages |= set(row)
    return task.take(chosen)


# --- the comparison -------------------------------------------------------------------------------


def differences(ours: Process, peer: Process, task: Task, terms: Any) -> dict[str, float]:
    """Relative differences of loss and gradient (its L2 norm), in float32."""
    (loss, gradient), (other_loss, other) = (p.ask("gradients", task, terms) for p in (ours, peer))
    norm = float(np.linalg.norm(other))
    return {
        "loss": abs(loss - other_loss) / abs(other_loss),
        "gradient": float(np.linalg.norm(gradient - other)) / norm,
    }


def compare(task: Task, options: argparse.Namespace, sides: list[str]) -> dict[str, Any]:
    """One row of the table: equality, seconds, memory and shares for one batch size."""
    processes = {
        side: Process(side, options.device, options.precision, options.threads)
        for side in ("ours", *sides, "lean")
    }
    try:
        few = without_clashes(task, 8 if options.quick else 24)
        equal = {
            side: differences(processes["ours"], processes[side], few, SIDES[side].terms) for side in sides
        }
        _say(f"equal to {equal}")
        started, seconds = time.monotonic(), {side: [] for side in processes}  # type: ignore[var-annotated]
        limit = processes["ours"].ask("limit")
        resting = processes["lean"].ask("peak")
        for process in processes.values():
            process.ask("step", few.first(2))
        for turn in range(options.rounds):
            if options.quick and turn and time.monotonic() - started > 90:
                break
            for side in ("sentence_transformers", *(s for s in processes if s != "sentence_transformers")):
                if side == "lean" and not turn:
                    peak = processes["sentence_transformers"].ask("peak")
                    processes["lean"].ask("keep", max(0, int(0.8 * (peak - resting))))
                seconds[side].append(processes[side].ask("step", task))
                _say(f"round {turn + 1}: {side} {seconds[side][-1]:.2f} s")
        peaks = {side: process.ask("peak") for side, process in processes.items()}
    finally:
        for process in processes.values():
            process.end()
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    named = {p for row in task.lists.passage_ids for p in row} | set(task.lists.query_ids)
    lengths = [len(task.rows[name]) for name in named]
    model = Student(MODEL, precision="float32", device="cpu").model
    work = training_flops(model, lengths)
    places = np.asarray(task.lists.passage_ids)
    return {
        "batch": len(places),
        "places": places.shape[1],
        "references_per_passage": round(places.size / len(set(places.ravel().tolist())), 3),
        "tokens": sum(lengths),
        "differences": equal,
        "equal": all(value <= 1e-5 for row in equal.values() for value in row.values()),
        "rounds": min(map(len, seconds.values())),
        "seconds": {side: round(value, 3) for side, value in medians.items()},
        "ratios": {
            side: {peer: round(medians[peer] / medians[side], 3) for peer in sides}
            for side in ("ours", "lean")
        },
        "peak_mib": {side: round(value / 2**20) for side, value in peaks.items()},
        "tokens_per_second": {s: round(sum(lengths) / medians[s], 1) for s in ("ours", "lean")},
        "gemm_gflops": round(limit / 1e9, 1),
        "gemm_share": {s: round(work / medians[s] / limit, 3) for s in ("ours", "lean")},
    }


def scaling(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step on one worker of one core, and on several, in turn."""
    seconds: dict[int, list[float]] = {1: [], options.workers: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for workers in seconds:
                meeting = f"{folder}/{turn}-{workers}"
                torch.multiprocessing.spawn(
                    _worker, (workers, meeting, task, options.device, options.precision), nprocs=workers
                )
                seconds[workers].append(float(Path(f"{meeting}.seconds").read_text()))
                _say(f"round {turn + 1}: {workers} workers {seconds[workers][-1]:.2f} s")
    return {workers: statistics.median(values) for workers, values in seconds.items()}


def _worker(rank: int, workers: int, meeting: str, task: Task, device: str, precision: str) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers
        )
    side = Ours(device, precision)
    side.keep_bytes = 0  # the same work on any number of workers
    side.loss(task.first(2))
    if workers > 1:
        torch.distributed.barrier()
    start = time.perf_counter()
    side.loss(task)
    if rank == 0:
        Path(f"{meeting}.seconds").write_text(str(time.perf_counter() - start))
    if workers > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="128 lists of 4, 64 tokens")
    parser.add_argument("--data", type=Path, help="a BEIR folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[512])
    parser.add_argument("--places", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="of a passage, at most")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default: the faster")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.quick:
        options.batch, options.places, options.tokens = [128], 4, 64
    options.precision = options.precision or probe_precision(options.device)
    options.threads = torch.get_num_threads()
    largest = max(options.batch)
    name = options.data.name if options.data else "synthetic"
    make = (lambda *given: beir(options.data, *given)) if options.data else synthetic
    task = make(largest, options.places, options.tokens)
    facts: dict[str, Any] = {
        "benchmark": "train_step",
        "data": name,
        "precision": options.precision,
        "machine": f"{platform.machine()}, {options.threads} threads, {options.device}",
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    if options.workers > 1:
        name += f"-{options.workers}-workers"
        seconds = scaling(task, options)
        rates = {workers: len(task.lists.query_ids) / value for workers, value in seconds.items()}
        result = {
            "ratio": round(rates[options.workers] / rates[1], 3),
            "ours": round(rates[options.workers], 3),
            "peer": round(rates[1], 3),
            "unit": "queries/s",
            "equal": True,  # tests/test_step.py shows it
            **facts,
        }
    else:
        sides = ["sentence_transformers", "infonce_alone"]
        try:
            import gradcache  # noqa: F401

            sides.append("gradcache")
        except ImportError:
            _say("no package gradcache: Tevatron's step is left out (pip install --no-deps gradcache)")
        table = [compare(task.first(size), options, sides) for size in options.batch]
        last = table[-1]
        rates = {side: last["batch"] / value for side, value in last["seconds"].items()}
        result = {
            "ratio": last["ratios"]["lean"]["sentence_transformers"],
            "ours": round(rates["lean"], 3),
            "peer": round(rates["sentence_transformers"], 3),
            "unit": "queries/s",
            "equal": all(row["equal"] for row in table),
            **facts,
            "table": table,
        }
    if not options.quick:
        target = Path(__file__).parent / "results" / f"train_step-{name}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
