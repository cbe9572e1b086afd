"""How search is cut into shards changes no ranking. Starts no Ray."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, Stage, part_name, stage
from retrieval_ray.config import Config
from retrieval_ray.datasets import rejects_table
from retrieval_ray.stages import index, retrieve
from retrieval_ray.stages.collection import Encoded
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.encode import Vectors
from retrieval_ray.stages.profile import Profile
from retrieval_ray.stages.queries import query_row

PARTS, DIMENSION = 8, 6


@pytest.mark.parametrize(
    ("shards", "blocks", "each"),
    [
        (1, 1000, 1),  # nothing to join
        (64, 1, 1),  # few queries: every shard is work for somebody
        (64, 245, 15),  # 2,000,000 queries on a GPU: 5 x 245 units are enough
        (64, 100_000, 64),
    ],
)
def test_shards_are_joined_as_far_as_work_is_enough(shards: int, blocks: int, each: int) -> None:
    cut = [range(256 * n, 256 * (n + 1)) for n in range(shards)]
    found = index.joined(cut, 131_072 * shards, blocks)
    assert [n for part in found for n in part] == list(range(256 * shards))
    assert len(found[0]) == 256 * each and len(found) == -(-shards // each)


def test_no_shard_grows_beyond_what_memory_can_cache() -> None:
    cut = [range(1024 * n, 1024 * (n + 1)) for n in range(64)]
    assert index.joined(cut, 10**9, 245) == cut
    assert {len(part) for part in index.joined(cut, 2**27, 100_000)} == {4096}  # of 2,048 passages a part


def made(store: Location) -> Encoded:
    """40 passages in 8 parts, 24 queries in 4."""
    rng = np.random.default_rng(0)

    def finished(name: str, tables: dict[str, pa.Table], **facts: object) -> Stage:
        target = stage(store, name, {"name": name, "titles": False})
        for part, table in tables.items():
            target.write(part, table)
        target.finish(list(tables), **facts)
        return target

    def vectors(name: str, ids: list[list[str]]) -> Stage:
        tables = {}
        for number, part in enumerate(ids):
            flat = pa.array(rng.standard_normal(len(part) * DIMENSION).astype(np.float16))
            column = pa.FixedSizeListArray.from_arrays(flat, DIMENSION)
            tables[part_name("vectors", number, "arrow")] = pa.table({"id": part, "vector": column})
        return finished(name, tables, rows=sum(map(len, ids)), buckets=len(ids))

    passages = [[f"p{n}" for n in range(part, 40, PARTS)] for part in range(PARTS)]
    asked = [[f"q{n}" for n in range(part, 24, 4)] for part in range(4)]
    corpus = {
        part_name("corpus", number, "arrow"): schema.from_rows(
            "corpus", [{"passage_id": key, "title": "", "text": f"text {key}"} for key in part]
        )
        for number, part in enumerate(passages)
    }
    queries = {
        part_name("queries", number, "parquet"): schema.from_rows(
            "queries", [query_row(key, key, "log", "train", None, "log") for key in part]
        )
        for number, part in enumerate(asked)
    }
    return Encoded(
        "made", "test", 1,
        finished("corpus", {**corpus, "rejects.parquet": rejects_table("dedup", [])}, rows=40, buckets=PARTS),
        None, finished("queries", queries, rows=24, buckets=4),
        vectors("passages", passages), vectors("query-vectors", asked), {}, {},
    )  # fmt: skip


@pytest.mark.parametrize(("units", "shards"), [(1024, 8), (4, 2), (1, 1)])
def test_rankings_do_not_depend_on_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int, shards: int
) -> None:
    config = Config()
    config.retrieve.depth = 7
    context = Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    encoded = made(context.store)
    monkeypatch.setattr(index, "_SHARD_PARTS", 1)
    monkeypatch.setattr(index, "_UNITS", units)
    ranked = retrieve.run(context, encoded, ["dense"]).retrieved
    assert ranked.manifest()["shards"] == shards
    every = {
        key: vector for ids, block in Vectors.all(encoded.passages).blocks()
        for key, vector in zip(ids, block.astype(np.float64), strict=True)
    }  # fmt: skip
    found = retrieve.rankings_of(ranked, "dense")
    assert len(found) == 24
    for ids, block in Vectors.all(encoded.query_vectors).blocks():
        for query_id, query_D in zip(ids, block.astype(np.float64), strict=True):
            scores = {key: float(vector @ query_D) for key, vector in every.items()}
            assert [key for key, _ in found[query_id]] == sorted(scores, key=lambda k: (-scores[k], k))[:7]
