"""What a row of each stage takes: as finished stages of this store say, else as a short sample does.

On a cluster the sample runs on a worker, where a node is up that can hold one; without one here, in this
process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch

from retrieval_ray import teachers
from retrieval_ray.bm25 import Bm25
from retrieval_ray.forecast import Rate
from retrieval_ray.memory import activation_bytes
from retrieval_ray.model_files import hub_id
from retrieval_ray.objective import Objective
from retrieval_ray.progress import say
from retrieval_ray.stages import cluster
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import student_arguments, with_model
from retrieval_ray.stages.judges import Judge, arguments_of, teacher_id
from retrieval_ray.stages.parts import alone
from retrieval_ray.step import Lists, training_step
from retrieval_ray.student import Role, Student, default_chunk_tokens
from retrieval_ray.teachers.late import Late, late_interaction
from retrieval_ray.throughput import matmul_limit
from retrieval_ray.tokens import Tokens

SECONDS = 4.0  # that each part of the sample may take, about
TEXTS = 256  # that it reads, at most
_AT_ONCE = 16
_POOL_STARTS = 6.0  # seconds until Ray's actors are there, on a laptop (LOG.md); a model is loaded on top
_GROUP_STARTS = 12.0  # the same of a group that trains together
_START_COUNTS_LITTLE = 120.0  # seconds of a stage of which the start of its workers is a tenth
_UNKNOWN = Rate(None)


@dataclass
class Rates:
    """Rates by name, and in words where they come from.

    ``encode-passage`` and ``encode-query``, with ``of MODEL`` behind for a further retriever; ``judge NAME``,
    a pair, or ``late NAME``, a text, and ``late pair``; ``train``, a text forward and backward, and ``dev``,
    one forward.
    """

    known: dict[str, Rate] = field(default_factory=dict)
    source: str = "none: rows and bytes alone"
    flops: float | None = None  # of a worker's matrix products, in float32
    bm25: float = 0.0  # seconds for one query and passage

    def of(self, name: str) -> Rate:
        return self.known.get(name, _UNKNOWN)


def found(context: Context, judges: Sequence[Judge], least: float = 0.0) -> Rates:
    """What finished stages of the store say: the one of each kind that worked on most rows.

    least: seconds of a stage that counts where its workers' start is in its rate, because nobody knows how
    long they were busy.
    """
    rates, rows = Rates(), dict[str, int]()
    by_teacher = {
        _teacher(context, judge): judge.name for judge in judges if judge.kind not in ("bm25", "dense")
    }
    numeric = context.profile.numeric()
    for folder in context.store.names() if context.store.exists() else []:
        manifest = context.store / folder / "manifest.json"
        kind = folder.partition("-")[0]
        if kind not in ("encode", "score", "train") or not manifest.exists():
            continue
        facts = manifest.read_json()
        of, config, worked = facts["identity"], facts["config"], facts["rows_this_run"]
        if not worked or {key: of.get("profile", {}).get(key) for key in numeric} != numeric:
            continue
        seconds, workers = facts["seconds"], config["compute"]["workers"]
        if seconds < (least if "busy_seconds" not in facts else 0.0):
            continue
        busy = facts.get("busy_seconds", seconds * workers)
        at_work = min(workers, len(facts["parts"]))
        name, per_row, start = None, busy / worked, max(0.0, seconds - busy / at_work)
        model = config["student"]["model"]
        if kind == "encode":
            own = model == context.config.student.model
            name = f"encode-{of['role']}" + ("" if own else f" of {model}")
        elif kind == "score" and of["teacher"] in by_teacher and worked == facts["rows"]:
            name = f"judge {by_teacher[of['teacher']]}"
        elif kind == "train" and model == context.config.student.model:
            name = "train"
            size = config["groups"]["list_size"]
            size = min(size, config["train"].get("list_sample") or size)
            per_row /= facts["batch_queries"] * (size + 1)
        if name and worked > rows.get(name, 0):
            rows[name], rates.known[name] = worked, Rate(per_row, start)
            rates.source = "of finished stages in this store"
    if "train" in rates.known:  # dev measures are in it
        rates.known["dev"] = Rate(0.0)
    return rates


def sampled(
    context: Context, judges: Sequence[Judge], passages: Sequence[str], queries: Sequence[str], *, train: bool
) -> Rates:
    """What finished stages say, and of all else a sample of these texts: half a minute, on a machine at rest.

    train: whether a training step is tried too.
    """
    possible = not cluster.given() or cluster.ready(context.config.compute)
    rates = found(context, judges, _START_COUNTS_LITTLE if possible else 0.0)
    passages, queries = list(passages[:TEXTS]), list(queries[:TEXTS]) or list(passages[:8])
    given = (context, judges, passages, queries, rates, train)
    if not possible:
        say("no node is up that could hold a worker: no sample is tried")
        return rates
    if cluster.given():
        say("a short sample on a worker, for the rates")
        task = ray.remote(**context.worker_resources())(_sampled)
        sampled: Rates = ray.get(task.remote(*given, "a worker"))
        return sampled
    say("a short sample, for the rates")
    return _sampled(*given, "this machine")


def _sampled(
    context: Context,
    judges: Sequence[Judge],
    passages: list[str],
    queries: list[str],
    rates: Rates,
    train: bool,
    where: str,
) -> Rates:
    earlier = set(rates.known)
    began = time.monotonic()
    before = torch.get_num_threads()
    torch.set_num_threads(context.profile.threads)
    try:
        _encoding(context, rates, "", passages, queries, train=train)
        for name, config in context.config.retrieve.models.items():
            _encoding(
                with_model(context, name, config),
                rates,
                f" of {config.model}",
                passages,
                queries,
                train=False,
            )
        for judge in judges:
            if f"judge {judge.name}" not in rates.known and _can_be_tried(context, judge):
                _judging(context, judge, rates, passages, queries)
        rates.flops = matmul_limit(torch.device(context.profile.device), "float32")
        if "bm25" in context.config.retrieve.retrievers:
            rates.bm25 = _bm25(passages, queries)
    finally:
        torch.set_num_threads(before)
    sample = f"a sample of {time.monotonic() - began:.0f} s on {where} ({context.profile.device})"
    rates.source = f"{rates.source} and {sample}" if earlier else sample
    return rates


def _can_be_tried(context: Context, judge: Judge) -> bool:
    """Whether a sample says something; for a CPU no large model is fetched from a hub."""
    if judge.kind not in teachers.KINDS or judge.config.engine != "transformers":
        return False
    far = judge.model is not None and hub_id(judge.model.source) is not None
    return not far or context.profile.device == "cuda"


def _encoding(
    context: Context, rates: Rates, of: str, passages: list[str], queries: list[str], *, train: bool
) -> None:
    began = time.monotonic()
    student = Student(**student_arguments(context))
    start = (0.0 if alone(context) else _POOL_STARTS) + time.monotonic() - began
    sides: tuple[tuple[Role, list[str]], ...] = (("passage", passages), ("query", queries))
    for role, texts in sides:
        rows = student.tokenize(texts, role)
        tokens = sum(map(len, rows)) / len(rows)

        def encode(part: Sequence[Tokens], role: Role = role) -> None:
            student.encode_tokens(part, role, token_budget=context.profile.token_budget)

        name = f"encode-{role}{of}"
        known = rates.known.get(name)
        known = known or Rate(_per_row(rows, encode), start)
        rates.known[name] = replace(known, tokens=tokens)
    if train:
        reading = rates.of("encode-passage")
        dev = rates.known.get("dev", reading)
        rates.known["dev"] = Rate(dev.seconds, 0.0, reading.tokens)
        known, tokens = rates.known.get("train"), reading.tokens
        if known is None:
            seconds = _training(context, student, passages, queries, reading.seconds or 0.01)
            known = Rate(seconds, _GROUP_STARTS)
        limit = context.config.train.passage_tokens
        tokens = min(tokens, limit or tokens)
        rates.known["train"] = replace(known, tokens=tokens)


def _training(
    context: Context, student: Student, passages: list[str], queries: list[str], reading: float
) -> float:
    """Seconds of a text in one training step, forward and backward, on as many as the time allows."""
    config = context.config.train
    room = int(min(max(SECONDS / (3 * reading), 8), 128))
    length = min(context.config.encoded_of_a_list(), room)
    lists = max(1, room // (length + 1))
    texts = {f"p{n}": passages[n % len(passages)] for n in range(lists * length)}
    asked = {f"q{n}": queries[n % len(queries)] for n in range(lists)}
    rows = student.tokenize(list(texts.values()), "passage", limit=config.passage_tokens)
    tokens = dict(zip(texts, rows, strict=True))
    query_tokens = dict(zip(asked, student.tokenize(list(asked.values()), "query"), strict=True))
    student.prepare_training()
    weights = [p for p in student.model.parameters() if p.requires_grad]
    names = list(texts)
    teacher_BK = np.tile(np.linspace(1, 0, length), (lists, 1))

    def step(number: int) -> None:
        training_step(
            student,
            Lists(
                list(asked)[:number],
                [names[n * length : (n + 1) * length] for n in range(number)],
                teacher_BK[:number],
                [[]] * number,
            ),
            tokens.__getitem__,
            query_tokens.__getitem__,
            Objective({"kl": 1.0, "infonce": 0.1}, 0.05, 0.2, 0.01),
            chunk_tokens=config.chunk_tokens
            or default_chunk_tokens(context.profile.device, config.moe.experts),
            keep_bytes=activation_bytes(student.device, sum(p.numel() for p in weights)),
        )
        student.model.zero_grad(set_to_none=True)

    step(1)  # warms up
    return _seconds(student.device, lambda: step(lists)) / (lists * (length + 1))


def _judging(context: Context, judge: Judge, rates: Rates, passages: list[str], queries: list[str]) -> None:
    began = time.monotonic()
    arguments = arguments_of(context, judge)
    teacher: Any = teachers.KINDS[judge.kind](**arguments)
    start = (0.0 if alone(context) else _POOL_STARTS) + time.monotonic() - began
    if isinstance(teacher, Late):

        def read(texts: Sequence[str]) -> None:
            teacher.student.token_vectors(texts, "passage", token_budget=teacher.token_budget)

        tokens = [len(row) for row in teacher.student.tokenize(passages, "passage")]
        rates.known[f"late {judge.name}"] = Rate(_per_row(passages, read), start, sum(tokens) / len(tokens))
        query_TD = teacher.query_vectors(queries[:_AT_ONCE])
        (passage_TD,) = teacher.student.token_vectors(
            passages[:1], "passage", token_budget=teacher.token_budget
        )
        seconds = _seconds(teacher.student.device, lambda: late_interaction(query_TD, passage_TD))
        rates.known["late pair"] = Rate(seconds / len(query_TD))
        return
    pairs = [(queries[n % len(queries)], passage) for n, passage in enumerate(passages)]

    def judged(part: Sequence[tuple[str, str]]) -> None:
        teacher.score([q for q, _ in part], [p for _, p in part])

    lengths = [min(len(f"{q} {p}") / 4, judge.config.max_tokens) for q, p in pairs]
    rates.known[f"judge {judge.name}"] = Rate(_per_row(pairs, judged), start, sum(lengths) / len(lengths))


def _bm25(passages: list[str], queries: list[str]) -> float:
    """Seconds that a query takes longer for each further passage; what it takes anyway is not counted."""

    def searched(times: int) -> float:
        many = passages * times
        index = Bm25([str(n) for n in range(len(many))], many)
        asked = queries[:_AT_ONCE]
        return _seconds(torch.device("cpu"), lambda: [index.search(q, 100) for q in asked]) / len(asked)

    return max(0.0, searched(9) - searched(1)) / (8 * len(passages))


def _per_row(rows: Sequence[Any], work: Callable[[Sequence[Any]], object]) -> float:
    """Seconds of a row, measured until the time is over; the first few rows warm up."""
    work(rows[:2])
    done, began = 0, time.perf_counter()
    while done < len(rows) and time.perf_counter() - began < SECONDS:
        work(rows[done : done + _AT_ONCE])
        done += len(rows[done : done + _AT_ONCE])
    return (time.perf_counter() - began) / done


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """What the work takes; a GPU's is waited for."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _teacher(context: Context, judge: Judge) -> str:
    return str(teacher_id(context, judge, None))
