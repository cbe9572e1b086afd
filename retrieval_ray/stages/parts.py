"""Runs the missing fixed parts of a stage on a pool of Ray actors.

A part is the unit of work, of resuming and of the numbers' last bits: no batch crosses it. Each
worker writes its part atomically by itself; only counts come back to the driver.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray.data
import torch
from ray.experimental import internal_kv

from retrieval_ray.artifacts import Stage, digest
from retrieval_ray.errors import UserError
from retrieval_ray.memory import give_back
from retrieval_ray.progress import progress
from retrieval_ray.stages import cluster
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.meter import Counted

_FEW = 40  # parts of about 500 rows
_ATTEMPTS = 5  # at a part; Ray Data would start a worker after the other for one that kills them


class PartWorker(Protocol):
    """What runs in an actor: heavy objects load in ``__init__``, ``run`` writes one part."""

    def run(self, part: dict[str, Any]) -> dict[str, Any]: ...


def _facts(worker: PartWorker, part: dict[str, Any], counted: Counted | None) -> str:
    """Run one part, and count it; returns its facts as JSON, and the seconds that it took."""
    began = time.monotonic()
    facts = worker.run(part)
    seconds = time.monotonic() - began
    if counted is not None:
        counted.part(facts)
    return json.dumps({**facts, "seconds": seconds})


@dataclass(frozen=True)
class Attempts:
    """How often each part was begun, kept where it outlives a worker: in Ray's own table of keys."""

    label: str
    run: str  # a name of its own
    most: int

    def begin(self, part: str) -> None:
        """Count one. Raises ``UserError`` for a part that was begun too often and never came to an end."""
        key = f"{self.run}:{digest(part)}"
        before = int(internal_kv._internal_kv_get(key) or 0)
        if before == self.most:
            raise UserError(
                f"{self.label}: {before} workers died over the same part {part[:200]}. If memory ran out, "
                "give a worker more or lower compute.token_budget; `ray logs` tells what they died of. What "
                "is finished is kept, and the same command goes on"
            )
        internal_kv._internal_kv_put(key, str(before + 1).encode(), overwrite=True)

    def forget(self) -> None:
        """Take the counts off a cluster that other jobs use too."""
        internal_kv._internal_kv_del(f"{self.run}:", del_by_prefix=True)


class _Actor:
    """Adapts a PartWorker to ``map_batches``; parts travel as JSON, so Arrow types cannot drift."""

    def __init__(
        self,
        worker: type[PartWorker],
        arguments: Mapping[str, Any],
        threads: int,
        counted: Counted | None,
        attempts: Attempts,
    ) -> None:
        self._threads, self._counted, self._attempts = threads, counted, attempts
        torch.set_num_threads(threads)
        self._worker = worker(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # Again: OpenMP keeps the number per thread, and Ray has set OMP_NUM_THREADS to num_cpus.
        torch.set_num_threads(self._threads)
        return {"facts": [self._run(part) for part in batch["part"]]}

    def _run(self, part: str) -> str:
        self._attempts.begin(part)
        return _facts(self._worker, json.loads(part), self._counted)


def small(corpus: Stage) -> bool:
    """Whether all passages together are so few that reading them once takes a moment."""
    return int(corpus.manifest()["buckets"]) <= _FEW


def run_parts(
    context: Context,
    label: str,
    worker: type[PartWorker],
    arguments: Mapping[str, Any],
    parts: Sequence[dict[str, Any]],
    *,
    gpus: bool = True,
    light: bool = False,
    apart: bool = False,
    counted: Counted | None = None,
) -> list[dict[str, Any]]:
    """Run ``worker(**arguments).run(part)`` for each part, on as many actors as there are workers.

    gpus: whether a worker takes its share of GPUs, where there are some. light: a part takes a moment and
    no GPU, so that a few of them are done in this process, sooner than a worker has started; so are all
    where this process is ``alone``, unless apart: a worker must have a process of its own. counted: what
    parts count as, for Prometheus. Returns what the parts returned, each with its ``seconds``, in no fixed
    order. Raises what a worker raised, and ``UserError`` where one part is the death of every worker.
    """
    if not parts:
        return []
    if not apart and (alone(context) or (light and len(parts) <= _FEW)):
        return _here(context, label, worker, arguments, parts, counted)
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    settings.execution_no_progress_timeout_s = 24 * 3600  # one part of a slow teacher may take hours
    settings.execution_options.verbose_progress = False
    resources = context.worker_resources()
    compute = context.config.compute
    most = min(compute.workers, len(parts))
    pool = ray.data.ActorPoolStrategy(
        min_size=min(compute.fewest_workers(), most), max_size=most, max_tasks_in_flight_per_actor=2
    )
    attempts = Attempts(label, f"counted-{uuid.uuid4().hex}", _ATTEMPTS)
    dataset = ray.data.from_items(
        [{"part": json.dumps(part)} for part in parts], override_num_blocks=len(parts)
    ).map_batches(
        _Actor,
        fn_constructor_args=(worker, dict(arguments), context.profile.threads, counted, attempts),
        batch_size=1,
        compute=pool,
        **(resources if gpus else {**resources, "num_gpus": 0}),
    )
    facts = []
    try:
        with progress(label, len(parts)) as advance:
            for row in dataset.iter_rows():
                facts.append(json.loads(row["facts"]))
                advance(len(facts), "parts")
    finally:
        attempts.forget()
    return facts


def alone(context: Context) -> bool:
    """Whether this process is the only worker: as on a laptop, where each stage would start another anew.

    That takes some ten seconds, and it would compute with the same cores and the same memory.
    """
    return context.config.compute.workers == 1 and context.profile.device == "cpu" and not cluster.given()


def _here(
    context: Context,
    label: str,
    worker: type[PartWorker],
    arguments: Mapping[str, Any],
    parts: Sequence[dict[str, Any]],
    counted: Counted | None,
) -> list[dict[str, Any]]:
    """Run the parts in this process, with as many threads as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(context.profile.threads)
    try:
        working, facts = worker(**arguments), []
        with progress(label, len(parts)) as advance:
            for part in parts:
                facts.append(json.loads(_facts(working, part, counted)))
                advance(len(facts), "parts")
        return facts
    finally:
        torch.set_num_threads(before)
        give_back()
