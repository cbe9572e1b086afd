"""Runs ``fit`` on the workers of a Ray ``TorchTrainer``, to a pause or to the end."""

import math
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from retrieval_ray.artifacts import Location
from retrieval_ray.checkpoints import load_weights, newest
from retrieval_ray.config import MoeConfig
from retrieval_ray.errors import UserError
from retrieval_ray.experts import prepare
from retrieval_ray.fit import Settings, best_weights, fit
from retrieval_ray.lora import add_lora
from retrieval_ray.model_files import Model, weights_sha
from retrieval_ray.moe import Layout, moe_layers
from retrieval_ray.progress import progress, say
from retrieval_ray.ranks import from_rank_zero, world
from retrieval_ray.selection import gain
from retrieval_ray.sharding import shard
from retrieval_ray.stages import cluster
from retrieval_ray.stages.cluster import beside_me
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import student_arguments
from retrieval_ray.stages.lists import data_of
from retrieval_ray.stages.meter import count
from retrieval_ray.student import Student

_FACTS = "fit.json"
_TOO_LARGE = "too-large-"  # files that say how often chunks were larger than memory
_FAILURES, _ELASTIC_FAILURES = 2, 20  # of workers; machines that announce their going are not counted
_LEAST_CHUNK = 512  # tokens: smaller chunks save no memory worth having
_LAST_SECONDS = 20  # before a machine is taken away


def advance(
    context: Context,
    corpora: list[Grouped],
    settings: Settings,
    folder: Location,
    bar: Any,
    until: int | None,
) -> bool:
    """Train from the folder's checkpoint to step ``until``, None: to the end; returns whether it ended.

    At the end ``candidate/`` and, last, ``fit.json`` are in the folder; at a pause the student as it is
    then, for ``snapshot``. What is there already is not done again. Raises ``UserError`` for what a worker
    cannot do and would not on another try; ``TrainingStopped``, one of these, where steps are not finite.
    """
    if until is not None and (folder / _snapshot_facts(until)).exists():
        return False
    if not (folder / _FACTS).exists():
        stopped = _trainer(context, corpora, settings, folder, bar, until).fit().return_value
        if stopped is not None:
            raise stopped
    return (folder / _FACTS).exists()


def facts_of(folder: Location) -> dict[str, Any]:
    """What ``fit`` found, of a training that ended."""
    facts: dict[str, Any] = (folder / _FACTS).read_json()
    return facts


def snapshot(folder: Location, step: int) -> Model:
    """The student as it was when training paused at this step."""
    return Model(folder / _snapshot_name(step), (folder / _snapshot_facts(step)).read_json()["sha"])


def remove_traces(folder: Location) -> None:
    """Delete what only an unfinished training needs."""
    for name in folder.names():
        if name.startswith(("checkpoint-", "best-", "ray", "snapshot-", _TOO_LARGE)):
            (folder / name).remove()


def lora_of(context: Context) -> dict[str, Any] | None:
    """What ``add_lora`` takes beside the student."""
    lora = context.config.student.lora
    return None if lora.r is None else {**vars(lora), "seed": context.config.training_seed()}


def _snapshot_name(step: int) -> str:
    return f"snapshot-{step:08d}"


def _snapshot_facts(step: int) -> str:
    """Written last: a snapshot without it is not whole."""
    return f"snapshot-{step:08d}.json"


def _trainer(
    context: Context,
    corpora: list[Grouped],
    settings: Settings,
    folder: Location,
    bar: Any,
    until: int | None,
) -> TorchTrainer:
    compute = context.config.compute
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker}
    gpus = context.worker_resources()["num_gpus"]
    workers, at_least = (training_workers(n, gpus) for n in (compute.workers, compute.fewest_workers()))
    if gpus:
        resources["GPU"] = math.ceil(gpus)
    return TorchTrainer(
        _train_worker,
        train_loop_config={
            "corpora": corpora,
            "settings": settings,
            **_made_of(context),
            "threads": context.profile.threads,
            "folder": folder,
            "until": until,
            "depth": context.config.teacher.depth,
            "share": context.config.train.share,
            "bar": bar,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if compute.min_workers is None else (at_least, workers),
            use_gpu=bool(gpus),
            resources_per_worker=resources,
            # a larger group starts from the last checkpoint
            elastic_resize_monitor_interval_s=120 * context.config.train.checkpoint_minutes,
        ),
        run_config=ray.train.RunConfig(
            name="ray" if until is None else f"ray-{until:08d}",
            storage_path=folder.path,
            storage_filesystem=folder.filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=_FAILURES if compute.min_workers is None else _ELASTIC_FAILURES
            ),
            callbacks=[TuneReportCallback()] if context.claims else [],  # a sweep's trial
        ),
    )


def check(context: Context) -> None:
    """Raises ``UserError`` for experts or LoRA that the student cannot have, or settings of experts it lacks.

    On a worker, which has the packages and the memory, before anything is paid for: training comes last.
    """
    moe = context.config.train.moe
    routed = bool(moe.jitter or moe.balance_weight)
    if moe.experts or routed or moe.train == "experts" or context.config.student.lora.r is not None:
        cluster.join(context.config.compute, context.worker_resources()["num_gpus"])
        made_of = _made_of(context) | {"shard": True}  # on the CPU
        ray.get(ray.remote(_can_be_made).remote(made_of, routed))


def _can_be_made(made_of: Mapping[str, Any], routed: bool) -> None:
    student, _ = _student(made_of)
    if routed and not moe_layers(student.model[0].auto_model):
        raise UserError(
            "train.moe.jitter and train.moe.balance_weight are for experts, and the student has none; "
            "set train.moe.experts"
        )


def _made_of(context: Context) -> dict[str, Any]:
    """What ``_student`` makes the student to train of."""
    train = context.config.train
    return {
        "student": student_arguments(context),
        "lora": lora_of(context),
        "shard": train.shard,
        "layout": _layout(train.moe),
        "only_experts": train.moe.train == "experts",
        "seed": context.config.training_seed(),
    }


def training_workers(workers: int, gpus: float) -> int:
    """Ranks of training: a GPU holds one (NCCL refuses a second), however many workers share it elsewhere."""
    return max(1, int(workers * gpus)) if 0 < gpus < 1 else workers


def _layout(moe: MoeConfig) -> Layout | None:
    """The experts to add; None: none."""
    if not moe.experts:
        return None
    layers = None if moe.layers is None else tuple(moe.layers)
    return Layout(moe.experts, moe.top_k, moe.router, moe.where, layers)


def _train_worker(config: dict[str, Any]) -> UserError | None:
    """Runs on each worker of the TorchTrainer; returns why training ended, where it would do so again.

    What is raised is tried again, from the last checkpoint. So is a step that had too little memory on its
    GPU, with smaller chunks, of which fewer are kept: the same step, up to rounding.
    """
    folder: Location = config["folder"]
    marks = f"{_TOO_LARGE}{config['settings'].chunk_tokens}-"  # a chunk that is told anew is tried as told
    before = from_rank_zero(sum(name.startswith(marks) for name in folder.names()))
    settings = _smaller(config["settings"], before)
    if before and world()[0] == 0:
        told = f"  chunks of {settings.chunk_tokens:,} tokens from here on: larger ones do not fit on a GPU"
        config["bar"].tell.remote(told)
    try:
        _train({**config, "settings": settings})
    except UserError as error:
        return error
    except torch.OutOfMemoryError as error:
        (folder / f"{marks}{before}.json").write_json({"error": str(error)})
        raise UserError(
            f"training: no memory is left on the GPU, {before} times with smaller chunks already. Set "
            f"train.chunk_tokens below {settings.chunk_tokens}, or train.activation_gib, or train on larger "
            f"GPUs ({error})"
        ) from error
    return None


def _smaller(settings: Settings, times: int) -> Settings:
    """Half the chunk, and half of what graphs may keep, so many times."""
    return replace(
        settings,
        chunk_tokens=max(min(_LEAST_CHUNK, settings.chunk_tokens), settings.chunk_tokens >> times),
        activation_share=settings.activation_share / 2**times,
    )


def _train(config: dict[str, Any]) -> None:
    torch.set_num_threads(config["threads"])
    rank = ray.train.get_context().get_world_rank()
    student, merge = _student(config)
    if config["shard"]:
        shard(student, ray.train.torch.get_device())
    folder: Location = config["folder"]
    trained_on = "+".join(corpus.name for corpus in config["corpora"])

    def on_step(step: int, total: int, terms: Mapping[str, float]) -> None:
        if rank == 0:
            config["bar"].put.remote(step, f"loss {terms['loss']:.4f}")
            if "tokens" in terms:
                count("train", trained_on, rows=1, tokens={"in": int(terms["tokens"])})
            else:
                count("train", trained_on, errors={"not_finite": 1})

    def on_epoch(history: Sequence[Mapping[str, float]]) -> None:
        row = history[-1]
        if rank == 0:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in ("epoch", "step"))
            config["bar"].put.remote(int(row["step"]), "", f"  epoch {row['epoch']:.0f}: {shown}")
        ray.train.report({**row, "gain": gain(history, int(row["epoch"]))})

    done = fit(
        student,
        [data_of(corpus, config["depth"], config["share"]) for corpus in config["corpora"]],
        config["settings"],
        folder,
        on_step=on_step,
        on_epoch=on_epoch,
        should_checkpoint=_preemption_notice(),
        until=config["until"],
    )
    if rank != 0:
        return
    if config["shard"]:
        student, merge = _student(config)
        weights = newest(folder)
        if done.done:
            weights = None if done.best_epoch is None else best_weights(folder, done.best_epoch)
        if weights is not None:
            load_weights(student, weights)
    merge()
    if not done.done:
        sha = _save(student, folder / _snapshot_name(done.step))
        (folder / _snapshot_facts(done.step)).write_json({"sha": sha})
        return
    _save(student, folder / "candidate")
    facts = ("history", "by_query", "steps", "skipped", "best_epoch", "load")
    (folder / _FACTS).write_json({name: getattr(done, name) for name in facts})


def _save(student: Student, target: Location) -> str:
    """Write the student's model folder; returns the hash of its files."""
    with tempfile.TemporaryDirectory() as local:
        student.save(local)
        target.remove()
        Location.of(local).copy_to(target)
        return weights_sha(local)


def _student(config: Mapping[str, Any]) -> tuple[Student, Callable[[], None]]:
    """The student to train, whole and with its experts, and the function that merges its LoRA, if any."""
    student = Student(**config["student"] | ({"device": "cpu"} if config["shard"] else {}))
    prepare(
        student.model,
        config["layout"],
        only_experts=config["only_experts"],
        seed=config["seed"],  # every rank draws the same routers
    )
    if config["lora"] is None:
        return student, lambda: None
    return student, add_lora(student, **config["lora"])


def _preemption_notice() -> Callable[[], bool]:
    """True when Ray tells of a further node that is about to be taken away, and once more just before.

    Asking is a barrier of a few milliseconds; an older Ray has nothing to ask.
    """
    ask = getattr(ray.train, "get_preemption_info", None)
    told: set[str] = set()
    closing: set[int] = set()  # deadlines that are near

    def answer() -> bool:
        info = None if ask is None else ask()
        if info is None:
            return False
        before = len(told) + len(closing)
        told.update(info.preempted_node_ids)
        if info.deadline_ms is not None and info.deadline_ms / 1000 - time.time() < _LAST_SECONDS:
            closing.add(info.deadline_ms)
        return len(told) + len(closing) > before

    return answer


@ray.remote(num_cpus=0)
class _Bar:
    """Carries progress from the workers to the driver."""

    def __init__(self) -> None:
        self.state: tuple[int, str] = (0, "")
        self.lines: list[str] = []

    def put(self, step: int, note: str, line: str = "") -> None:
        self.state = (step, note)
        if line:
            self.lines.append(line)

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def get(self) -> tuple[int, str, list[str]]:
        lines, self.lines = self.lines, []
        return (*self.state, lines)


@contextmanager
def step_bar(total: int) -> Iterator[Any]:
    """A progress bar fed by rank 0 while ``fit`` blocks the driver."""
    actor = _Bar.options(scheduling_strategy=beside_me()).remote()  # type: ignore[attr-defined]
    stop = threading.Event()
    seen: dict[str, int] = defaultdict(int)

    def watch() -> None:
        with progress("training", total) as advance:
            while not stop.wait(1.0):
                step, note, lines = ray.get(actor.get.remote())
                for line in lines:
                    say(line)
                if step != seen["step"]:
                    seen["step"] = step
                    advance(step, f"steps; {note}")
        for line in ray.get(actor.get.remote())[2]:
            say(line)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join(timeout=10)
