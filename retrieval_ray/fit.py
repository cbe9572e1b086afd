"""The training loop without Ray: steps, epochs, and going on where it was, to the same bits.

Runs alike on one process or on every rank of a process group; only rank 0 writes.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from retrieval_ray.artifacts import Location
from retrieval_ray.balance import Balance
from retrieval_ray.batching import epoch_batches
from retrieval_ray.checkpoints import load_checkpoint, load_weights, save_checkpoint, save_weights
from retrieval_ray.errors import TrainingStopped
from retrieval_ray.memory import activation_bytes
from retrieval_ray.moe import moe_layers
from retrieval_ray.objective import Objective
from retrieval_ray.ranks import from_rank_zero, wait_for_all, world
from retrieval_ray.schedule import learning_rate_scale
from retrieval_ray.selection import Dev, candidate, chosen, evaluate
from retrieval_ray.step import Clock, NotFinite, training_step
from retrieval_ray.student import Student
from retrieval_ray.throughput import matmul_limit
from retrieval_ray.training_data import CorpusData, shortened, some_of_each, taken, tokenised

_SKIPS_IN_A_ROW, _SKIPS = 3, 10  # steps that were not finite, at which training stops
OnStep = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Settings:
    """How to train; the numbers of config.TrainConfig with temperatures resolved."""

    objective: Objective
    batch_queries: int
    max_epochs: int
    patience: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    min_warmup_steps: int
    lr_floor: float
    passage_tokens: int | None  # training reads passages only so far; dev measures read them whole
    chunk_tokens: int
    activation_bytes: int | None  # that kept graphs may take; None: measured
    dropout: bool
    checkpoint_seconds: float
    seed: int
    list_sample: int | None = None  # passages of a list that a step encodes, drawn anew each time; None: all
    balance_weight: float = 0.0  # of the load-balancing loss of a student with experts
    jitter: float = 0.0  # of its routers
    runs: int = 1  # trainings that there may be on this machine at the same time
    activation_share: float = 1.0  # of ``activation_bytes``, where more has been too much


@dataclass
class Progress:
    """Where training stands; a checkpoint holds exactly this, the weights and the optimiser."""

    epoch: int = 0  # the epoch being trained; 0 until the untouched student is evaluated
    seen: list[int] = field(default_factory=list)  # lists of each corpus that this epoch has had
    turn: int = 0  # the corpus whose turn it is
    step: int = 0
    stale: int = 0  # epochs since the last improvement
    best_epoch: int | None = None  # the best trained epoch, kept as the candidate
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    by_query: list[list[float]] = field(default_factory=list)  # by epoch: what chooses, per dev query
    steps: list[dict[str, float]] = field(default_factory=list)  # one row a step
    skipped: list[dict[str, Any]] = field(default_factory=list)  # steps that were not finite
    speed: list[dict[str, float]] = field(default_factory=list)  # one row a step; no two runs have it alike
    load: list[dict[str, Any]] = field(default_factory=list)  # one row an epoch: what each expert took
    done: bool = False


def fit(
    student: Student,
    corpora: Sequence[CorpusData],
    settings: Settings,
    folder: Location,
    *,
    on_step: OnStep = lambda step, total, terms: None,
    on_epoch: Callable[[Sequence[Mapping[str, float]]], None] = lambda history: None,
    should_checkpoint: Callable[[], bool] = lambda: False,
    until: int | None = None,
) -> Progress:
    """Train, and leave the best trained weights in the student and in ``best_weights`` of
    the folder.

    Continues from the newest checkpoint in ``folder``; the batches to come do not depend on the number of
    ranks, so any number may go on. Whether the best trained epoch beats the untouched student is
    ``chosen(progress.history) > 0``.
    until: pause after this step, with a checkpoint, and leave the weights as they are then; the lists'
    passages may be others when training goes on, the queries may not. Where training ends before, it has
    ended. At every checkpoint ``folder / steps.jsonl`` gets a row a step with its terms, its seconds by part
    and its speed, and ``epochs.jsonl`` the history. The routers of a student with experts are jittered and
    balanced as told.
    should_checkpoint: asked on every rank after every step; rank 0's answer counts. For a machine that is
    about to be taken away.
    A step whose loss or gradient is not finite changes no weight and is counted; raises
    ``TrainingStopped`` naming the queries after 3 in a row or 10 in all.
    """
    torch.manual_seed(settings.seed)
    student.prepare_training()
    token_rows = [tokenised(student, corpus) for corpus in corpora]
    short_rows = [shortened(student, corpus, settings.passage_tokens) for corpus in corpora]
    dev = [Dev(c.dev, c.dev_qrels, c.dev_pools, rows) for c, rows in zip(corpora, token_rows, strict=True)]
    sizes = [len(corpus.train.query_ids) for corpus in corpora]
    per_epoch = len(epoch_batches(sizes, settings.batch_queries, seed=settings.seed, epoch=1))
    total = per_epoch * settings.max_epochs
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    keep_bytes = settings.activation_bytes
    if keep_bytes is None:
        count = sum(p.numel() for p in parameters)
        keep_bytes = activation_bytes(student.device, count, runs=settings.runs)
    keep_bytes = int(keep_bytes * settings.activation_share)
    backbone = student.model[0].auto_model
    experts = list(moe_layers(backbone))
    limit = matmul_limit(student.device, student.precision)
    progress = Progress(**(load_checkpoint(student, optimiser, folder) or {}))
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved_at
        name = f"{progress.step:08d}-{progress.epoch:03d}"
        save_checkpoint(student, optimiser, vars(progress), folder, name)
        if world()[0] == 0:
            (folder / "steps.jsonl").write(_lines(_steps(progress)))
            (folder / "epochs.jsonl").write(_lines(progress.history))
            if progress.best_epoch is not None:
                best = best_weights(folder, progress.best_epoch)
                for name in folder.names():
                    if name.startswith("best-") and not best.path.endswith(name):
                        (folder / name).remove()
        saved_at = time.monotonic()

    def finish_epoch() -> None:
        row = {"epoch": float(progress.epoch), "step": float(progress.step)}
        measures, by_query = from_rank_zero(  # what they decide, all ranks must decide alike
            evaluate(
                student,
                dev,
                student_temperature=settings.objective.student_temperature,
                teacher_temperature=settings.objective.teacher_temperature,
                chunk_tokens=settings.chunk_tokens,
            ),
        )
        progress.history.append(row | measures)
        progress.by_query.append(by_query)
        on_epoch(progress.history)
        if progress.epoch > 0:
            if candidate(progress.history) == progress.epoch:
                progress.best_epoch = progress.epoch
                save_weights(student, best_weights(folder, progress.epoch))
            improved = chosen(progress.history) == progress.epoch
            progress.stale = 0 if improved else progress.stale + 1
        progress.done = progress.stale >= settings.patience or progress.epoch >= settings.max_epochs
        progress.epoch, progress.seen, progress.turn = progress.epoch + 1, [0] * len(sizes), 0
        save()

    def take_step(which: int, indices: Any) -> None:
        started = time.monotonic()
        scale = learning_rate_scale(
            progress.step,
            steps_per_epoch=per_epoch,
            steps=total,
            min_warmup_steps=settings.min_warmup_steps,
            floor=settings.lr_floor,
        )
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * scale
        lists = taken(corpora[which].train, indices)
        if settings.list_sample is not None:
            lists = some_of_each(
                lists, settings.list_sample, np.random.default_rng([settings.seed, progress.step])
            )
        clock = Clock(student.device)
        seed = (settings.seed, progress.step)
        balance = (
            Balance(backbone, settings.balance_weight, jitter=settings.jitter, seed=seed) if experts else None
        )
        progress.seen[which] += len(indices)
        progress.turn = (which + 1) % len(corpora)
        progress.step += 1
        try:
            terms = training_step(
                student,
                lists,
                short_rows[which].__getitem__,
                token_rows[which]["query"].__getitem__,
                settings.objective,
                chunk_tokens=settings.chunk_tokens,
                keep_bytes=keep_bytes,
                dropout_seed=seed if settings.dropout else None,
                balance=balance,
                clock=clock,
            )
            norm = _clip(parameters, settings.clip_norm)
            if not math.isfinite(norm):
                raise NotFinite("gradient", lists.query_ids, known=False)
            optimiser.step()
        except NotFinite as error:
            row = {"step": progress.step, "corpus": corpora[which].name, "what": error.what}
            progress.skipped.append({**row, "queries": error.query_ids})
            _stop_if_hopeless(progress)
            on_step(progress.step, total, {"loss": math.nan})
            return
        finally:
            optimiser.zero_grad(set_to_none=True)
        if balance is not None:
            _add_load(progress, dict(zip(experts, balance.routing.counts_LE.tolist(), strict=True)))
        progress.steps.append({"step": float(progress.step), "lr": scale, "norm": norm, **terms})
        seconds = time.monotonic() - started
        progress.speed.append(
            {
                "step": float(progress.step),
                "time": time.time(),
                "seconds": seconds,
                **{f"{part}_seconds": spent for part, spent in clock.seconds.items()},  # "loss" is one
                "tokens_per_second": terms["tokens"] / seconds,
                "matmul_share": terms["tflop"] * 1e12 / seconds / limit / world()[1],
            }
        )
        on_step(progress.step, total, {**terms, "norm": norm, "seconds": seconds})

    def paused() -> bool:
        return until is not None and progress.step >= until

    if progress.epoch == 0:
        finish_epoch()
    while not (progress.done or paused()):
        for which, indices in epoch_batches(
            sizes,
            settings.batch_queries,
            seed=settings.seed,
            epoch=progress.epoch,
            seen=progress.seen,
            turn=progress.turn,
        ):
            take_step(which, indices)
            noticed = should_checkpoint()
            late = time.monotonic() - saved_at > settings.checkpoint_seconds
            if from_rank_zero(late or noticed) or paused():
                save()
            if paused():
                break  # the epoch's last step or not: going on finishes the epoch
        else:
            finish_epoch()
    if progress.done and progress.best_epoch is not None:
        wait_for_all()  # and so for rank 0's file
        load_weights(student, best_weights(folder, progress.best_epoch))
    return progress


def best_weights(folder: Location, epoch: int) -> Location:
    """Where the best trained weights lie, by their epoch: a checkpoint never names those of another."""
    return folder / f"best-{epoch:03d}.safetensors"


def _add_load(progress: Progress, taken: Mapping[str, Sequence[int]]) -> None:
    """Tokens that each expert of each layer took in a step, added to the epoch's."""
    if not progress.load or progress.load[-1]["epoch"] != progress.epoch:
        progress.load.append({"epoch": progress.epoch, "taken": {}})
    sums = progress.load[-1]["taken"]
    for layer, counts in taken.items():
        sums[layer] = [a + b for a, b in zip(sums.get(layer, [0] * len(counts)), counts, strict=True)]


def _clip(parameters: Sequence[torch.nn.Parameter], most: float) -> float:
    """Scale the gradient down to a norm of ``most``; returns the norm that it had."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # sharded: summed over ranks


def _stop_if_hopeless(progress: Progress) -> None:
    last = [row["step"] for row in progress.skipped[-_SKIPS_IN_A_ROW:]]
    in_a_row = last == list(range(progress.step - _SKIPS_IN_A_ROW + 1, progress.step + 1))
    if in_a_row or len(progress.skipped) >= _SKIPS:
        rows = progress.skipped[-_SKIPS_IN_A_ROW:]
        seen = "; ".join(
            f"step {row['step']} of '{row['corpus']}': {row['what']} {', '.join(row['queries'])}"
            for row in rows
        )
        raise TrainingStopped(
            f"training stopped: {len(progress.skipped)} steps of {progress.step} had a loss or gradient that "
            f"is not finite ({seen}). Look at these queries and their lists, lower train.learning_rate, or "
            "set compute.precision=float32"
        )


def _steps(progress: Progress) -> Iterator[Mapping[str, float]]:
    """A row a step, with what it computed and how fast."""
    for step, speed in zip(progress.steps, progress.speed, strict=True):
        yield {**step, **speed}


def _lines(rows: Iterable[Mapping[str, float]]) -> bytes:
    """A line of JSON a row."""
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
