"""The train stage: how training is set up from tables and config, and the choice of its result."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from retrieval_ray.amounts import refreshes as count_refreshes
from retrieval_ray.artifacts import Location, Stage, digest, stage
from retrieval_ray.batching import epoch_batches
from retrieval_ray.checkpoints import step_of
from retrieval_ray.config import to_dict
from retrieval_ray.errors import UserError
from retrieval_ray.fit import Settings
from retrieval_ray.model_files import Model
from retrieval_ray.objective import Objective
from retrieval_ray.progress import say
from retrieval_ray.schedule import LEAST_STEPS, batch_size
from retrieval_ray.selection import chosen
from retrieval_ray.stages import refresh, tracking
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import student_identity
from retrieval_ray.stages.judges import Judge
from retrieval_ray.stages.lists import calibrated, lists_of
from retrieval_ray.stages.trainer import (
    advance,
    facts_of,
    lora_of,
    remove_traces,
    snapshot,
    step_bar,
    training_workers,
)
from retrieval_ray.step import Lists
from retrieval_ray.student import default_chunk_tokens

VERSION = 12
_NOT_IN_IDENTITY = ("checkpoint_minutes", "activation_gib", "rounds", "seed")


def run(context: Context, corpora: list[Grouped], judges: list[Judge]) -> Stage:
    """Train on the lists of these corpora; the best trained model ends in ``candidate/``.

    judges: whom fresh negatives are shown to, where the config asks for some.
    """
    config = context.config
    if not config.train.terms.clp:  # the queries of negatives are not read
        corpora = [replace(corpus, negatives=None) for corpus in corpora]
    identity = {
        "version": VERSION,
        "corpora": [[c.name, c.corpus.fingerprint, *_read_by_training(c)] for c in corpora],
        "depth": config.teacher.depth,
        "student": student_identity(context),
        "lora": lora_of(context),
        "train": {k: v for k, v in to_dict(config.train).items() if k not in _NOT_IN_IDENTITY},
        "seed": config.training_seed(),
        "profile": {**context.profile.numeric(), "workers": _world(context)},
        "refresh": [refresh.read_of(corpus) for corpus in corpora] if refresh.wanted(config.train) else None,
    }
    target = stage(context.store, "train", identity)
    if not context.start(target, f"training on {', '.join(c.name for c in corpora)}"):
        return target
    lists = [lists_of(c.groups, "train", c.negatives, config.train.share) for c in corpora]
    if not any(len(part.query_ids) for part in lists):
        raise UserError("no training list is left on any corpus; see the groups stage's rejects")
    settings = _settings(context, corpora, lists)
    sizes = [len(part.query_ids) for part in lists]
    per_epoch = len(epoch_batches(sizes, settings.batch_queries, seed=settings.seed, epoch=1))
    total, between = per_epoch * settings.max_epochs, refresh.steps_between(config.train, per_epoch)
    if between is not None and not count_refreshes(total, between):
        say(
            f"  warning: no negatives are mined anew: what is mined at step {between} is used from step "
            f"{2 * between}, and training has {total}. Lower train.refresh_steps or train.refresh_epochs"
        )
    begun_at = step_of(target.folder)
    with step_bar(total) as bar, tracking.following(context):
        train = partial(advance, context, settings=settings, folder=target.folder, bar=bar)
        if between is None:
            train(corpora, until=None)
            refreshes = []
        else:
            mine = partial(refresh.run, context, corpora, judges)
            refreshes = _with_refreshes(train, mine, corpora, target, total, between)
    facts = facts_of(target.folder)
    if facts["skipped"]:
        say(f"  warning: {len(facts['skipped'])} steps were skipped: their loss or gradient was not finite")
    model_files = [f"candidate/{name}" for name in _files(target.folder / "candidate")]
    context.finish(
        target,
        [*model_files, "fit.json"],
        rows=len(facts["steps"]),
        worked=sum(row["step"] > begun_at for row in facts["steps"]),
        epoch=chosen(facts["history"]),
        candidate_epoch=facts["best_epoch"],
        temperatures={
            "student": settings.objective.student_temperature,
            "teacher": settings.objective.teacher_temperature,
            "infonce": settings.objective.infonce_temperature,
        },
        batch_queries=settings.batch_queries,
        queries=[len(part.query_ids) for part in lists],
        skipped=facts["skipped"],
        refreshes=refreshes,
    )
    remove_traces(target.folder)
    return target


def _with_refreshes(
    train: Callable[..., bool],
    mine: Callable[[Model, int], list[Grouped]],
    corpora: list[Grouped],
    target: Stage,
    total: int,
    between: int,
) -> list[dict[str, Any]]:
    """Train ``total`` steps with lists mined anew every N = ``between``; returns the facts of each refresh.

    Refresh r is mined beside training from the student at step r N, and used exactly from step (r + 1) N:
    training waits for it. So the lists do not depend on how fast either is.
    """
    lists, found = corpora, []
    for start in range(0, total, between):
        until = start + between
        mining = None
        if start and until < total:
            mining = _beside(partial(mine, snapshot(target.folder, start), start))
        if train(lists, until=until if until < total else None):
            if mining is not None:
                wait([mining])  # patience ended training; what is mined reads files that are deleted next
            break
        if mining is not None:
            lists = mining.result()
            found.append({"mined_at": start, "used_from": until, "corpora": refresh.facts(lists)})
    return found


def _beside(work: Callable[[], list[Grouped]]) -> "Future[list[Grouped]]":
    """Run the work in a thread that does not keep a run alive which fails."""
    done: Future[list[Grouped]] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # raised where the result is asked for
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def _world(context: Context) -> int | str:
    """The number of workers decides the last bits of sums; an elastic run gives up that promise."""
    if context.config.compute.min_workers is not None:
        return "elastic"
    return training_workers(context.profile.workers, context.worker_resources()["num_gpus"])


def _read_by_training(corpus: Grouped) -> list[str]:
    """The contents of every stage whose tables training reads."""
    read = [corpus.queries, corpus.passages, corpus.query_vectors, corpus.retrieved, corpus.groups]
    if corpus.negatives is not None:
        read.append(corpus.negatives)
    return [stage.content() for stage in read]


def _files(folder: Location, prefix: str = "") -> list[str]:
    found = []
    for entry in folder.filesystem.get_file_info(pa.fs.FileSelector(folder.path)):
        if entry.type == pa.fs.FileType.Directory:
            found += _files(folder / entry.base_name, f"{prefix}{entry.base_name}/")
        else:
            found.append(prefix + entry.base_name)
    return sorted(found)


def _settings(context: Context, corpora: list[Grouped], lists: list[Lists]) -> Settings:
    train = context.config.train
    sizes = [len(part.query_ids) for part in lists]
    # of a share of the lists no smaller batches are made: they would be steps of another kind
    all_sizes = [round(size / train.share) for size in sizes]
    batch = batch_size(all_sizes, train.batch_queries)
    if batch < train.batch_queries:
        say(
            f"  warning: {sum(all_sizes)} training queries are fewer than {LEAST_STEPS} batches of "
            f"{train.batch_queries}; batches of {batch} are used"
        )
    for corpus, size in zip(corpora, sizes, strict=True):
        if size < batch:
            say(
                f"  warning: corpus '{corpus.name}' has {size} training queries, fewer than a batch of "
                f"{batch}: " + ("one short batch an epoch" if size else "nothing is learned from it")
            )
    tau = train.student_temperature or calibrated(corpora, lists, train.teacher_temperature)
    infonce = train.infonce_temperature or tau / 5
    say(
        f"  temperatures: student {tau:.3g}, teacher {train.teacher_temperature:.3g}, "
        f"InfoNCE {infonce:.3g}" + ("" if train.student_temperature else " (calibrated)")
    )
    return Settings(
        objective=Objective(vars(train.terms), tau, train.teacher_temperature, infonce),
        batch_queries=batch,
        max_epochs=train.max_epochs,
        patience=train.patience,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        min_warmup_steps=train.min_warmup_steps,
        lr_floor=train.lr_floor,
        passage_tokens=train.passage_tokens,
        chunk_tokens=train.chunk_tokens or default_chunk_tokens(context.profile.device, train.moe.experts),
        activation_bytes=None if train.activation_gib is None else int(train.activation_gib * 2**30),
        dropout=train.dropout,
        checkpoint_seconds=60 * train.checkpoint_minutes,
        seed=context.config.training_seed(),
        list_sample=train.list_sample,
        balance_weight=train.moe.balance_weight,
        jitter=train.moe.jitter,
        runs=context.config.sweep.trials_at_once,
    )


def candidate(trained: Stage) -> Model:
    """The best trained model, as a student for encoding."""
    hashes = trained.manifest()["parts"]
    sha = digest({name: value for name, value in hashes.items() if name.startswith("candidate/")})
    return Model(trained.folder / "candidate", sha)


def improved(trained: Stage) -> bool:
    """Whether a trained epoch beats the student that training began with, on dev measures."""
    return int(trained.manifest()["epoch"]) > 0
