"""Trains a cross-encoder on several collections: their judged queries, negatives mined from the rankings."""

import json
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from retrieval_ray import metrics, reranker
from retrieval_ray.artifacts import Location, Stage, digest, stage
from retrieval_ray.config import DatasetConfig, to_dict
from retrieval_ray.datasets import Judged, read_judged, rejects_table
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import Model
from retrieval_ray.progress import progress, say
from retrieval_ray.sources import Source
from retrieval_ray.stages.collection import Collection, Ranked
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.ingest import judged_passages, passage_text, some_passages
from retrieval_ray.stages.queries import qrels_of, queries_table, query_row, write_tables
from retrieval_ray.stages.retrieve import FUSED, rankings_of

VERSION = 3
_EXECUTION_KEYS = ("checkpoint_minutes",)
_PAIRS = pa.schema(
    [
        # train: lists to learn; dev: pools in the order of the fused run; judged: what these do not hold
        ("split", pa.string()),
        ("list", pa.int32()),  # rows of one list follow one another, the relevant passage first
        ("corpus", pa.string()),
        ("query_id", pa.string()),
        ("passage_id", pa.string()),
        ("query", pa.string()),
        ("passage", pa.string()),
        ("relevance", pa.int32()),  # 1 or 0 of train, else the judgement
    ]
)


def judged_queries(context: Context, dataset: DatasetConfig, source: Source, corpus: Stage) -> Collection:
    """The judged queries to learn from as a collection that can be encoded and searched.

    Queries of the reported split (``dataset.split``) are left out, by id and by text: nothing is ever
    trained on them. Raises ``UserError`` where that split is named as the one to learn from.
    """
    config = context.config.reranker
    if config.split.partition(":")[0] == dataset.split.partition(":")[0]:
        raise UserError(
            f"reranker.split: '{config.split}' is the split that '{source.name}' reports (dataset.split); a "
            "teacher trained on it could never be judged there"
        )
    judged = read_judged(
        source,
        config.split,
        judged_passages(corpus, source, config.split),
        max_queries=config.max_queries,
        relevance_threshold=dataset.relevance_threshold,
    )
    held_out = _held_out(dataset, source, corpus)
    texts = {
        key: text
        for key, text in judged.texts.items()
        if key not in held_out and _plain(text) not in held_out.values()
    }
    if not texts:
        raise UserError(
            f"dataset '{source.name}': every query of '{config.split}' is also in '{dataset.split}'"
        )
    rows = judged.qrels.filter(
        pa.compute.is_in(judged.qrels.column("query_id"), value_set=pa.array(sorted(texts)))
    )
    identity = {
        "version": VERSION,
        "for": "reranker",
        "corpus": corpus.content(),
        "judged": digest([texts, rows.to_pylist()]),
    }
    target = stage(context.store, "queries", identity)
    if context.start(target, f"judged queries of '{source.name}', split '{config.split}'"):
        dropped = [(key, "in_test", judged.texts[key]) for key in sorted(judged.texts.keys() - texts.keys())]
        table = [
            query_row(key, text, "judged", "train", None, "human") for key, text in sorted(texts.items())
        ]
        kept = {"train": Judged(texts, rows, judged.warnings, judged.rejects)}
        write_tables(context, target, table, kept, rejects_table("queries", dropped), len(table), source.name)
    return Collection(source.name, dataset.split, dataset.relevance_threshold, corpus, None, target)


def run(context: Context, corpora: list[Ranked], base: Model) -> Stage:
    """Mine the pairs and train on them; the model ends in ``model/``, what it is worth in ``dev.json``."""
    config = context.config
    settings = {k: v for k, v in to_dict(config.reranker).items() if k not in _EXECUTION_KEYS}
    identity = {
        "version": VERSION,
        "corpora": [[c.name, c.queries.content(), c.retrieved.content()] for c in corpora],
        "thresholds": [c.relevance_threshold for c in corpora],
        "base": base.sha,
        "reranker": settings,
        "seed": config.seed,
        "profile": context.profile.numeric(),
    }
    target = stage(context.store, "reranker", identity)
    names = ", ".join(c.name for c in corpora)
    if not context.start(target, f"training a cross-encoder on {names}"):
        return target
    if not target.folder.is_local:
        raise UserError("store: the checkpoints of a cross-encoder need a folder that is mounted, not a URL")
    if target.missing(["pairs.parquet"]):
        target.write("pairs.parquet", pa.concat_tables([_pairs(context, corpus) for corpus in corpora]))
    pairs = int((target.read("pairs.parquet", ["split"]).column("split").to_pylist()).count("train"))
    say(f"  {pairs:,} pairs")
    before, total = _step(_progress_of(target))
    _train(context, target, base)
    (target.folder / "checkpoints").remove()
    worked = pairs if not before else round(pairs * (1 - before / total))
    dev = (target.folder / "dev.json").read_json()
    files = [f"model/{name}" for name in _files(Path(target.folder.path) / "model")]
    context.finish(target, ["pairs.parquet", "dev.json", *files], rows=pairs, worked=worked, dev=dev)
    return target


def _progress_of(target: Stage) -> Path:
    return Path(target.folder.path) / "checkpoints" / "step.json"


def _held_out(dataset: DatasetConfig, source: Source, corpus: Stage) -> dict[str, str]:
    """Ids and plain texts of the queries that are reported; none where the collection has no such split."""
    try:
        known = judged_passages(corpus, source, dataset.split)
        texts = read_judged(source, dataset.split, known).texts
    except UserError as error:
        say(f"  no queries of '{source.name}' are held out as '{dataset.split}': {error}")
        return {}
    return {key: _plain(text) for key, text in texts.items()}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _pairs(context: Context, corpus: Ranked) -> pa.Table:
    """The rows of one corpus: pairs to learn, and the pools of its held-out queries."""
    config = context.config.reranker
    qrels = qrels_of(corpus.queries, "train")
    rankings = {
        q: [p for p, _ in ranking[: config.pool]]
        for q, ranking in rankings_of(corpus.retrieved, FUSED, qrels).items()
    }
    by_hash = sorted(qrels, key=lambda key: digest([context.config.seed, key]))
    dev = set(by_hash[: min(config.dev_queries, len(qrels) // 10)])
    mined = reranker.lessons(
        {q: row for q, row in qrels.items() if q not in dev},
        rankings,
        relevance_threshold=corpus.relevance_threshold,
        negatives=config.negatives,
        skip=config.skip,
        seed=context.config.seed,
    )
    rows: list[tuple[str, int, str, str, int]] = []
    for n, lesson in enumerate(mined):
        ids = (lesson.relevant_id, *lesson.negative_ids)
        rows += [("train", n, lesson.query_id, p, int(p == lesson.relevant_id)) for p in ids]
    for n, q in enumerate(sorted(dev), len(mined)):
        pool = rankings.get(q, [])
        rows += [("dev", n, q, p, qrels[q].get(p, 0)) for p in pool]
        rows += [("judged", n, q, p, relevance) for p, relevance in qrels[q].items() if p not in pool]
    passages = some_passages(corpus.corpus, {p for _, _, _, p, _ in rows})
    table = queries_table(corpus.queries)
    texts = dict(zip(table.column("query_id").to_pylist(), table.column("text").to_pylist(), strict=True))
    split, lists, query_ids, passage_ids, relevance = (list(column) for column in zip(*rows, strict=True))
    return pa.table(
        [
            split,
            pa.array(lists, pa.int32()),
            [corpus.name] * len(rows),
            query_ids,
            passage_ids,
            [texts[q] for q in query_ids],
            [passage_text(*passages[p], titles=True) for p in passage_ids],
            pa.array(relevance, pa.int32()),
        ],
        schema=_PAIRS,
    )


def _train(context: Context, target: Stage, base: Model) -> None:
    """Run the training on one worker, and show how far it is."""
    config, profile = context.config.reranker, context.profile
    settings = reranker.Settings(
        base=base.source,
        epochs=config.epochs,
        batch_lists=config.batch_lists,
        learning_rate=config.learning_rate,
        warmup_share=config.warmup_share,
        max_tokens=config.max_tokens,
        checkpoint_seconds=60 * config.checkpoint_minutes,
        seed=context.config.seed,
        bfloat16=profile.precision == "bfloat16",
        device=profile.device,
        trust_remote_code=context.config.teacher.trust_remote_code,
    )
    task = ray.remote(**context.worker_resources(), max_retries=2)(_worker)
    running = task.remote(target, settings, profile.threads)
    step, total = _progress_of(target), 0
    while not ray.wait([running], timeout=1.0)[0] and not total:
        total = _step(step)[1]
    with progress("training", total) as advance:
        while not ray.wait([running], timeout=1.0)[0]:
            advance(_step(step)[0], "steps")
    ray.get(running)


def _step(path: Path) -> tuple[int, int]:
    try:
        done, total = json.loads(path.read_text())
    except (OSError, ValueError):  # not there yet, or just being written
        return 0, 0
    return int(done), int(total)


def _worker(target: Stage, settings: reranker.Settings, threads: int) -> None:
    """Train, save, measure on the held-out queries."""
    import torch

    torch.set_num_threads(threads)
    table = target.read("pairs.parquet")
    train = table.filter(pa.compute.equal(table.column("split"), "train")).to_pylist()
    lists = [
        (rows[0]["query"], [row["passage"] for row in rows])
        for rows in (list(own) for _, own in groupby(train, key=lambda row: (row["corpus"], row["list"])))
    ]
    checkpoints = Path(target.folder.path) / "checkpoints"

    def on_step(step: int, total: int) -> None:
        (checkpoints / "step.json").write_text(json.dumps([step, total]))

    model = reranker.train(lists, settings, checkpoints, on_step=on_step)
    with tempfile.TemporaryDirectory() as local:
        model.save_pretrained(local)
        Location.of(local).copy_to(target.folder / "model")
    dev = table.filter(pa.compute.not_equal(table.column("split"), "train")).to_pylist()
    (target.folder / "dev.json").write_json(_measured(model, dev))


def _measured(model: Any, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By corpus: nDCG@10 of the fused run's pool, and of the same pool in the model's order."""
    judged: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        judged.setdefault(row["corpus"], {}).setdefault(row["query_id"], []).append(row)
    found = {}
    for corpus, queries in judged.items():
        qrels = {q: {r["passage_id"]: r["relevance"] for r in own} for q, own in queries.items()}
        pools = {q: [r for r in own if r["split"] == "dev"] for q, own in queries.items()}
        before = {q: [r["passage_id"] for r in pool] for q, pool in pools.items()}
        after = {
            q: reranker.rerank(model, pool[0]["query"], before[q], [r["passage"] for r in pool])
            for q, pool in pools.items()
            if pool
        }
        found[corpus] = {
            "queries": float(len(queries)),
            "retrieved_ndcg@10": metrics.mean(metrics.per_query(qrels, before))["ndcg@10"],
            "reranked_ndcg@10": metrics.mean(metrics.per_query(qrels, after))["ndcg@10"],
        }
    return found


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
