"""The index stage: for very large corpora, an approximate index of a retriever's vectors in shards.

One training on a sample of passages, then one file per shard; all shards share the clusters.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from retrieval_ray import ivf
from retrieval_ray.artifacts import Stage, stage
from retrieval_ray.progress import say
from retrieval_ray.search import Block
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import Vectors
from retrieval_ray.stages.parts import run_parts

VERSION = 1
TRAINED = "trained.faiss"
_SHARD_PARTS, _MOST_SHARDS = 256, 64
_PIECE = 2**26  # bytes of a file that are copied at a time
_UNITS = 1024  # of search, that are enough to share out
_TOGETHER = (
    2**23
)  # passages that are searched as one at most: 13 GB of 768 dimensions, which memory can cache


def shards_of(passages: Stage) -> list[range]:
    """The parts of each shard of a corpus. It depends on the corpus alone, not on who searches it.

    About 131,072 passages each, and more where that would be over 64 shards.
    """
    buckets = int(passages.manifest()["buckets"])
    size = max(_SHARD_PARTS, -(-buckets // _MOST_SHARDS))
    return [range(start, min(start + size, buckets)) for start in range(0, buckets, size)]


def joined(shards: list[range], passages: int, blocks: int) -> list[range]:
    """Neighbouring shards as one, where there are so many blocks of queries that work is enough all the same.

    passages: in all shards together.
    Each shard has a ranking of every query written, read and merged: with millions of queries that costs
    more than the search itself. It depends on corpus and queries alone, as the shards do.
    """
    few = max(1, min(len(shards) * blocks // _UNITS, len(shards) * _TOGETHER // max(1, passages)))
    groups = [shards[at : at + few] for at in range(0, len(shards), few)]
    return [range(group[0].start, group[-1].stop) for group in groups]


def shard_name(shard: int) -> str:
    return f"shard-{shard:03d}.faiss"


def run(context: Context, collection: str, passages: Stage, label: str) -> tuple[Stage, ivf.Settings] | None:
    """Train and fill the index that the config asks for; None where search is exact."""
    config = context.config.retrieve
    if config.index == "exact":
        return None
    rows = int(passages.manifest()["rows"])
    dimension = next(vectors_PD.shape[1] for _, vectors_PD in Vectors(passages, [0]).blocks())
    how = ivf.settings(
        config.index, rows, dimension,
        nlist=config.nlist, nprobe=config.nprobe, pq_bytes=config.pq_bytes,
    )  # fmt: skip
    if how is None:
        say(
            f"  {rows:,} passages are too few to train an index (retrieve.index={config.index}): exact search"
        )
        return None
    identity = {
        "version": VERSION,
        "passages": passages.content(),
        **{key: value for key, value in asdict(how).items() if key != "nprobe"},
    }
    target = stage(context.store, "index", identity)
    if not context.start(target, f"{label}: index"):
        return target, how
    shards = shards_of(passages)
    arguments = {"passages": passages, "target": target, "how": how}
    if target.missing([TRAINED]):
        run_parts(context, f"{label}: training the index", _Indexer, arguments, [{"shard": -1}], gpus=False)
    names = [shard_name(n) for n in range(len(shards))]
    missing = set(target.missing(names))
    parts = [{"shard": n, "parts": list(shards[n])} for n, name in enumerate(names) if name in missing]
    facts = run_parts(context, f"{label}: filling the index", _Indexer, arguments, parts, gpus=False)
    context.finish(
        target,
        [TRAINED, *names],
        rows=rows,
        worked=sum(f["rows"] for f in facts),
        collection=collection,
        index=asdict(how),
    )
    return target, how


class _Indexer:
    def __init__(self, passages: Stage, target: Stage, how: ivf.Settings) -> None:
        self.passages, self.target, self.how = passages, target, how

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        if int(part["shard"]) < 0:
            (self.target.folder / TRAINED).write(ivf.train(self._sample(), self.how))
            return {"rows": 0}
        trained, blocks = (
            (self.target.folder / TRAINED).read(),
            Vectors(self.passages, part["parts"]).blocks(),
        )
        with self.target.scratch() as folder:
            rows = ivf.fill(trained, blocks, f"{folder}/index")
            with open(f"{folder}/index", "rb") as file:
                pieces = iter(lambda: file.read(_PIECE), b"")
                (self.target.folder / shard_name(int(part["shard"]))).write_pieces(pieces)
        return {"rows": rows}

    def _sample(self) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
        """The first parts that hold enough: a hash has dealt the passages to them, so they are random."""
        blocks: list[Block] = []
        rows = 0
        every: Iterable[Block] = Vectors.all(self.passages).blocks()
        for ids, vectors_PD in every:
            blocks.append((ids, vectors_PD))
            rows += len(ids)
            if rows >= self.how.sample:
                break
        return np.concatenate([vectors_PD for _, vectors_PD in blocks])
