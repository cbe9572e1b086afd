"""What scale.py measures itself: bytes a row and CPU microseconds a row of the stages that hold no model.

The package's own code writes and reads each table, in this process, without Ray; CPU seconds, so that a busy
machine changes little.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from made import context, log_queries

from retrieval_ray.artifacts import Stage, part_name, stage
from retrieval_ray.config import DatasetConfig
from retrieval_ray.contentcache import REPLY, SCORE, ContentCache
from retrieval_ray.prompts import KINDS, Wanted, read_pool
from retrieval_ray.sources import Source
from retrieval_ray.stages import group, ingest, pool, retrieve
from retrieval_ray.stages.collection import Collection, Encoded, Judged, extend
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import Vectors
from retrieval_ray.stages.scores import scores_table

_DIMENSION = 64  # so small that the product of search is nothing beside its rows
_SYLLABLES = "ba co di fe gu ha jo ki lu me no pi ra se tu vo".split()


def measured(folder: str, *, passages: int, queries: int, text_bytes: int, depth: int) -> dict[str, float]:
    """Figures by name: ``*_us`` CPU microseconds, ``*_bytes`` on disk, each for one row or passage."""
    run = context(folder, "all-MiniLM-L6-v2", workers=1, threads=1, precision="float32", budget=4096)
    run.config.retrieve.depth = depth
    found: dict[str, float] = {}

    def each(name: str, rows: int, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        done = work()
        found[name] = 1e6 * (time.process_time() - start) / rows
        return done

    texts = list(_texts(passages, text_bytes))
    source = Source(
        "made", lambda: ((str(n), f"p{n:09}", "", text) for n, text in enumerate(texts)), _none, _none
    )
    dataset = DatasetConfig(path="made", titles=False)
    corpus = each("ingest_us", passages, lambda: ingest.run(run, dataset, source))
    found["corpus_bytes"] = _size(corpus, "corpus-") / passages

    asked = log_queries(run, "made", [text[:60] for text in _texts(queries, 60, seed=1)])
    sides = (("passage", corpus, "corpus"), ("query", asked, "queries"))
    vectors = [_random_vectors(run, *side) for side in sides]
    collected = Collection("made", "test", 1, corpus, None, asked)
    encoded = extend(
        collected, Encoded, passages=vectors[0], query_vectors=vectors[1],
        more_passages={}, more_query_vectors={},
    )  # fmt: skip
    # Rows of partial rankings: of this one shard, as deep as a shard is searched
    ranked = each("row_us", queries * (depth + 1), lambda: retrieve.run(run, encoded, ["dense"]))
    found["run_bytes"] = _size(ranked.retrieved, "run-") / (2 * queries * depth)  # dense and fused

    run.config.teacher.depth = 20
    pairs = each("pool_us", queries * 20, lambda: pool.run(run, pool.Heads(ranked, 20, 20, None)))
    found["pair_bytes"] = _size(pairs, "pairs-") / (queries * 20)
    start = time.process_time()
    pool._write_index(corpus, stage(run.store, "index-alone", {}), int(corpus.manifest()["buckets"]))
    found["index_us"] = 1e6 * (time.process_time() - start) / passages
    found["index_bytes"] = _size(pairs, "index") / passages

    scores = _random_scores(run, ranked, pairs)
    found["score_bytes"] = _size(scores, "scores-") / (queries * 20)
    judged = extend(ranked, Judged, scores={"made": scores})
    run.config.groups.require_first = False
    grouped = each("group_us", queries, lambda: group.run(run, judged))
    found["list_bytes"] = _size(grouped.groups, "groups") / int(grouped.groups.manifest()["rows"])

    wanted = [f"p{n:09}" for n in range(0, passages, 7)]
    each("vector_us", passages, lambda: Vectors.all(encoded.passages).of(wanted))
    each("text_us", passages, lambda: ingest.texts_of(corpus, wanted))
    found |= _cache_bytes(run, 1024)
    found["prompt_characters"] = _prompt_characters(texts[:50])
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def _none(_: str) -> Iterator[Any]:
    return iter(())


def _texts(count: int, size: int, seed: int = 0) -> Iterator[str]:
    """Texts of that many characters, all different, of words of two to four syllables."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        syllables = rng.integers(0, len(_SYLLABLES), size)
        lengths = 2 + rng.integers(0, 3, size)
        words, at, length = [], 0, 0
        for many in lengths:
            words.append("".join(_SYLLABLES[s] for s in syllables[at : at + many]))
            at, length = at + many, length + 2 * many + 1
            if length > size:
                break
        yield " ".join(words)[:size].strip()


def _random_vectors(run: Context, role: str, texts: Stage, prefix: str) -> Stage:
    target, rng = stage(run.store, "encode", {"role": role}), np.random.default_rng(2)
    names = []
    for number in range(int(texts.manifest()["buckets"])):
        suffix, key = ("arrow", "passage_id") if role == "passage" else ("parquet", "query_id")
        ids = texts.read(part_name(prefix, number, suffix), [key]).column(key).to_pylist()
        flat = pa.array(rng.standard_normal(len(ids) * _DIMENSION).astype(np.float16))
        column = pa.FixedSizeListArray.from_arrays(flat, _DIMENSION)
        names.append(part_name("vectors", number, "arrow"))
        target.write(names[-1], pa.table({"id": pa.array(ids, pa.string()), "vector": column}))
    target.finish(names, rows=int(texts.manifest()["rows"]), buckets=len(names))
    return target


def _random_scores(run: Context, ranked: Any, pairs: Stage) -> Stage:
    target, rng = stage(run.store, "score-made", {}), np.random.default_rng(3)
    names = []
    for number in range(int(pairs.manifest()["buckets"])):
        own = pool.read(pairs, ranked.corpus, number)
        values = rng.standard_normal(len(own.query_ids)).tolist()
        rows = list(zip(own.query_ids, own.passage_ids, values, strict=True))
        names.append(part_name("scores", number, "parquet"))
        target.write(names[-1], scores_table("made", rows))
    target.finish(names)
    return target


def _cache_bytes(run: Context, rows: int) -> dict[str, float]:
    """Of one kept score, and of one kept reply of 60 characters."""
    texts = list(_texts(rows, 60, seed=4))
    replies = [{"text": text, "tokens_in": 800, "tokens_out": len(text) // 4, "cut": False} for text in texts]
    scores = np.random.default_rng(5).standard_normal(rows).tolist()
    found = {}
    for name, values, kind in (("score", scores, SCORE), ("reply", replies, REPLY)):
        cache = ContentCache(run.store / f"kept-{name}", "made", kind)
        cache.write(0, 1, [cache.key(text, "") for text in texts], values)
        folder = Path(run.store.path, f"kept-{name}")
        found[f"kept_{name}_bytes"] = sum(f.stat().st_size for f in folder.rglob("*.parquet")) / rows
    return found


def _prompt_characters(texts: list[str]) -> float:
    """Of one request, the six kinds and their examples alike."""
    wanted = Wanted(dict.fromkeys(KINDS, 1), read_pool(None), None, 32, 0)
    asked = wanted.requests((f"p{n}", text) for n, text in enumerate(texts))
    return sum(len(turn["content"]) for request in asked for turn in request.messages) / len(asked)


def _size(of: Stage, prefix: str) -> float:
    """Bytes of the parts whose names begin so."""
    return float(sum(f.stat().st_size for f in Path(of.folder.path).iterdir() if f.name.startswith(prefix)))
