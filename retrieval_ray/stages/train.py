"""The train stage: ``fit`` on the workers of a Ray ``TorchTrainer``."""

import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, Stage, digest, stage
from retrieval_ray.batching import epoch_batches
from retrieval_ray.checkpoints import load_weights
from retrieval_ray.config import MoeConfig, to_dict
from retrieval_ray.errors import UserError
from retrieval_ray.experts import prepare
from retrieval_ray.fit import CorpusData, Settings, fit
from retrieval_ray.lora import add_lora
from retrieval_ray.losses import calibrate_temperature
from retrieval_ray.model_files import Model
from retrieval_ray.moe import Layout
from retrieval_ray.objective import Objective
from retrieval_ray.progress import progress, say
from retrieval_ray.schedule import LEAST_STEPS, batch_size
from retrieval_ray.selection import chosen
from retrieval_ray.sharding import shard
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import Vectors, student_arguments, student_identity
from retrieval_ray.stages.ingest import texts_by_id
from retrieval_ray.stages.queries import qrels_of, queries_table
from retrieval_ray.stages.retrieve import FUSED, rankings_of
from retrieval_ray.step import Lists
from retrieval_ray.student import Student, default_chunk_tokens

VERSION = 7
_FAILURES, _ELASTIC_FAILURES = 2, 20  # of workers; machines that announce their going are not counted
_EXECUTION_KEYS = ("checkpoint_minutes", "activation_gib")


def run(context: Context, corpora: list[Grouped]) -> Stage:
    """Train on the lists of these corpora; the best trained model ends in ``candidate/``."""
    config = context.config
    if not config.train.terms.clp:  # the queries of negatives are not read
        corpora = [replace(corpus, negatives=None) for corpus in corpora]
    identity = {
        "version": VERSION,
        "corpora": [[c.name, c.corpus.fingerprint, *_read_by_training(c)] for c in corpora],
        "depth": config.teacher.depth,
        "student": student_identity(context),
        "lora": _lora(context),
        "train": {k: v for k, v in to_dict(config.train).items() if k not in _EXECUTION_KEYS},
        "seed": config.seed,
        "profile": {**context.profile.numeric(), "workers": _world(context)},
    }
    target = stage(context.store, "train", identity)
    if not context.start(target, f"training on {', '.join(c.name for c in corpora)}"):
        return target
    lists = [_lists(corpus.groups, "train", corpus.negatives) for corpus in corpora]
    if not any(len(part.query_ids) for part in lists):
        raise UserError("no training list is left on any corpus; see the groups stage's rejects")
    settings = _settings(context, corpora, lists)
    sizes = [len(part.query_ids) for part in lists]
    per_epoch = len(epoch_batches(sizes, settings.batch_queries, seed=settings.seed, epoch=1))
    with _step_bar(per_epoch * settings.max_epochs) as actor:
        _trainer(context, corpora, settings, target, actor).fit()
    facts = (target.folder / "fit.json").read_json()
    if facts["skipped"]:
        say(f"  warning: {len(facts['skipped'])} steps were skipped: their loss or gradient was not finite")
    model_files = [f"candidate/{name}" for name in _files(target.folder / "candidate")]
    context.finish(
        target,
        [*model_files, "fit.json"],
        rows=len(facts["steps"]),
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
    )
    for name in target.folder.names():
        if name.startswith(("checkpoint-", "best.", "ray")):
            (target.folder / name).remove()
    return target


def _world(context: Context) -> int | str:
    """The number of workers decides the last bits of sums; an elastic run gives up that promise."""
    return context.profile.workers if context.config.compute.min_workers is None else "elastic"


def _lora(context: Context) -> dict[str, Any] | None:
    """What ``add_lora`` takes beside the student."""
    lora = context.config.student.lora
    return None if lora.r is None else {**vars(lora), "seed": context.config.seed}


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
    batch = batch_size(sizes, train.batch_queries)
    if batch < train.batch_queries:
        say(
            f"  warning: {sum(sizes)} training queries are fewer than {LEAST_STEPS} batches of "
            f"{train.batch_queries}; batches of {batch} are used"
        )
    for corpus, size in zip(corpora, sizes, strict=True):
        if size < batch:
            say(
                f"  warning: corpus '{corpus.name}' has {size} training queries, fewer than a batch of "
                f"{batch}: " + ("one short batch an epoch" if size else "nothing is learned from it")
            )
    tau = train.student_temperature or _calibrated(context, corpora, lists)
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
        chunk_tokens=train.chunk_tokens or default_chunk_tokens(context.profile.device),
        activation_bytes=None if train.activation_gib is None else int(train.activation_gib * 2**30),
        dropout=train.dropout,
        checkpoint_seconds=60 * train.checkpoint_minutes,
        seed=context.config.seed,
        balance_weight=train.moe.balance_weight,
        jitter=train.moe.jitter,
    )


def _calibrated(context: Context, corpora: list[Grouped], lists: list[Lists]) -> float:
    """The temperature that brings the untouched student nearest to the teacher, on training lists.

    Its cosines are at hand: the encode stages hold every vector.
    """
    student, teacher = [], []
    for corpus, part in zip(corpora, lists, strict=True):
        if not len(part.query_ids):
            continue
        ids = sorted({passage for row in part.passage_ids for passage in row})
        passages_ND = Vectors.all(corpus.passages).of(ids)
        queries_QD = Vectors.all(corpus.query_vectors).of(part.query_ids)
        at = {key: n for n, key in enumerate(ids)}
        for query_D, row in zip(queries_QD, part.passage_ids, strict=True):
            student.append(passages_ND[[at[p] for p in row]].astype(np.float64) @ query_D.astype(np.float64))
        teacher.append(part.teacher_BK)
    return calibrate_temperature(
        torch.from_numpy(np.stack(student)),
        torch.from_numpy(np.concatenate(teacher)),
        teacher_temperature=context.config.train.teacher_temperature,
    )


def _lists(groups: Stage, split: str, negatives: Stage | None = None) -> Lists:
    """negatives: gives the queries that the lists' negatives answer."""
    table = schema.check(groups.read("groups.parquet"), "groups", groups.folder.path)
    table = table.filter(pa.compute.equal(table.column("split"), split))
    passages = table.column("passage_ids").to_pylist()
    shortest = min(map(len, passages), default=0)  # dev lists may be whole pools of unequal length
    own = None
    if negatives is not None:
        queries = _written(negatives)
        of = dict(
            zip(*(queries.column(name).to_pylist() for name in ("passage_id", "query_id")), strict=True)
        )
        own = [[of.get(passage) for passage in row[1:shortest]] for row in passages]
    return Lists(
        query_ids=table.column("query_id").to_pylist(),
        passage_ids=[row[:shortest] for row in passages],
        teacher_BK=np.array(
            [row[:shortest] for row in table.column("teacher_scores").to_pylist()], dtype=np.float64
        ),
        excluded_ids=table.column("excluded_ids").to_pylist(),
        negative_query_ids=own,
    )


def _written(negatives: Stage) -> pa.Table:
    return schema.check(negatives.read("queries.parquet"), "queries", negatives.folder.path)


def _data(corpus: Grouped, depth: int) -> CorpusData:
    """Read on every worker: only ids travel, texts are looked up."""
    queries = queries_table(corpus.queries)
    if corpus.negatives is not None:  # some stand in both, with the same text
        queries = pa.concat_tables([queries, _written(corpus.negatives)])
    qrels = qrels_of(corpus.queries, "dev")
    fused = rankings_of(corpus.retrieved, FUSED) if qrels else {}
    return CorpusData(
        name=corpus.name,
        train=_lists(corpus.groups, "train", corpus.negatives),
        dev=_lists(corpus.groups, "dev"),
        passages=texts_by_id(corpus.corpus),
        queries=dict(
            zip(
                queries.column("query_id").to_pylist(),
                queries.column("text").to_pylist(),
                strict=True,
            )
        ),
        dev_qrels=qrels,
        dev_pools={q: [p for p, _ in fused.get(q, [])[:depth]] for q in qrels},
    )


def _trainer(
    context: Context, corpora: list[Grouped], settings: Settings, target: Stage, actor: Any
) -> TorchTrainer:
    compute = context.config.compute
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker}
    gpus = context.worker_resources()["num_gpus"]
    if gpus:
        resources["GPU"] = gpus
    return TorchTrainer(
        _train_worker,
        train_loop_config={
            "corpora": corpora,
            "settings": settings,
            "student": student_arguments(context),
            "lora": _lora(context),
            "shard": context.config.train.shard,
            "layout": _layout(context.config.train.moe),
            "only_experts": context.config.train.moe.train == "experts",
            "threads": context.profile.threads,
            "folder": target.folder,
            "depth": context.config.teacher.depth,
            "steps": actor,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers
            if compute.min_workers is None
            else (compute.min_workers, compute.workers),
            use_gpu=bool(gpus),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=target.folder.path,
            storage_filesystem=target.folder.filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=_FAILURES if compute.min_workers is None else _ELASTIC_FAILURES
            ),
        ),
    )


def _layout(moe: MoeConfig) -> Layout | None:
    """The experts to add; None: none."""
    if not moe.experts:
        return None
    layers = None if moe.layers is None else tuple(moe.layers)
    return Layout(moe.experts, moe.top_k, moe.router, moe.where, layers)


def _train_worker(config: dict[str, Any]) -> None:
    """Runs on each worker of the TorchTrainer."""
    torch.set_num_threads(config["threads"])
    rank = ray.train.get_context().get_world_rank()
    student, merge = _student(config)
    if config["shard"]:
        shard(student, ray.train.torch.get_device())
    folder: Location = config["folder"]

    def on_step(step: int, total: int, terms: Mapping[str, float]) -> None:
        if rank == 0:
            config["steps"].put.remote(step, f"loss {terms['loss']:.4f}")

    def on_epoch(row: Mapping[str, float]) -> None:
        if rank == 0:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in ("epoch", "step"))
            config["steps"].put.remote(int(row["step"]), "", f"  epoch {row['epoch']:.0f}: {shown}")
        ray.train.report(dict(row))

    done = fit(
        student,
        [_data(corpus, config["depth"]) for corpus in config["corpora"]],
        config["settings"],
        folder,
        on_step=on_step,
        on_epoch=on_epoch,
        should_checkpoint=_preemption_notice(),
    )
    if rank == 0:
        if config["shard"]:
            student, merge = _student(config)
            if done.best_epoch is not None:
                load_weights(student, folder / "best.safetensors")
        merge()
        with tempfile.TemporaryDirectory() as local:
            student.save(local)
            Location.of(local).copy_to(folder / "candidate")
        (folder / "fit.json").write_json(
            {
                "history": done.history,
                "steps": done.steps,
                "skipped": done.skipped,
                "best_epoch": done.best_epoch,
                "load": done.load,
            }
        )


def _student(config: Mapping[str, Any]) -> tuple[Student, Callable[[], None]]:
    """The student to train, whole and with its experts, and the function that merges its LoRA, if any."""
    student = Student(**config["student"] | ({"device": "cpu"} if config["shard"] else {}))
    prepare(
        student.model,
        config["layout"],
        only_experts=config["only_experts"],
        seed=config["settings"].seed,  # every rank draws the same routers
    )
    if config["lora"] is None:
        return student, lambda: None
    return student, add_lora(student, **config["lora"])


def _preemption_notice() -> Callable[[], bool]:
    """True once, on all workers alike, when Ray tells of a node that is about to be taken away.

    Asking is a barrier of a few milliseconds; an older Ray has nothing to ask.
    """
    ask = getattr(ray.train, "get_preemption_info", None)
    told = False

    def answer() -> bool:
        nonlocal told
        if ask is None or told:
            return False
        told = ask() is not None
        return told

    return answer


@ray.remote(num_cpus=0)
class _Steps:
    """Carries progress from the workers to the driver."""

    def __init__(self) -> None:
        self.state: tuple[int, str] = (0, "")
        self.lines: list[str] = []

    def put(self, step: int, note: str, line: str = "") -> None:
        self.state = (step, note)
        if line:
            self.lines.append(line)

    def get(self) -> tuple[int, str, list[str]]:
        lines, self.lines = self.lines, []
        return (*self.state, lines)


@contextmanager
def _step_bar(total: int) -> Iterator[Any]:
    """A progress bar fed by rank 0 while ``fit`` blocks the driver."""
    actor = _Steps.remote()  # type: ignore[attr-defined]
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


def candidate(trained: Stage) -> Model:
    """The best trained model, as a student for encoding."""
    hashes = trained.manifest()["parts"]
    sha = digest({name: value for name, value in hashes.items() if name.startswith("candidate/")})
    return Model(trained.folder / "candidate", sha)
