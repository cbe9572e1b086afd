"""Approximate indexes: reproducible bytes, sensible sizes, and exact scores of what they propose."""

import numpy as np
import pytest

from retrieval_ray import ivf
from retrieval_ray.search import search

DIMENSION = 16


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((40, DIMENSION))[rng.integers(0, 40, 2000)]
    drawn += 0.3 * rng.standard_normal(drawn.shape)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


def _ids(count):
    return [f"p{count - n:05}" for n in range(count)]


def _index(tmp_path, vectors, how, cut=700):
    path = tmp_path / "shard.faiss"
    blocks = [([], vectors[:cut]), ([], vectors[cut:])]
    assert ivf.fill(ivf.train(vectors, how), blocks, str(path)) == len(vectors)
    return ivf.Index(str(path), how.nprobe, threads=1), path.read_bytes()


@pytest.mark.parametrize("kind", ivf.KINDS)
def test_the_same_passages_give_the_same_bytes_however_they_are_cut(tmp_path, vectors, kind):
    how = ivf.Settings(kind, DIMENSION, nlist=8, nprobe=2, pq_bytes=4)
    assert ivf.train(vectors, how) == ivf.train(vectors.astype(np.float32), how)
    assert _index(tmp_path, vectors, how)[1] == _index(tmp_path, vectors, how, cut=1)[1]


@pytest.mark.parametrize("kind", ivf.KINDS)
def test_with_every_cluster_searched_the_ranking_is_the_exact_one(tmp_path, vectors, kind):
    how = ivf.Settings(kind, DIMENSION, nlist=8, nprobe=8, pq_bytes=4)
    index, _ = _index(tmp_path, vectors, how)
    queries, ids = vectors[:20], _ids(len(vectors))
    proposed = index.propose(queries, len(vectors))
    blocks = [(ids[:900], vectors[:900]), (ids[900:], vectors[900:])]
    assert ivf.ranked(proposed, blocks, queries, 10) == search(blocks, queries, 10)


def test_fewer_clusters_find_less_but_never_score_it_differently(tmp_path, vectors):
    how = ivf.Settings("ivf", DIMENSION, nlist=32, nprobe=1, pq_bytes=4)
    index, _ = _index(tmp_path, vectors, how)
    queries, ids = vectors[:50], _ids(len(vectors))
    proposed = index.propose(queries, 400)
    assert (proposed == -1).any()  # a cluster holds fewer
    found = ivf.ranked(proposed, [(ids, vectors)], queries, 100)
    exact = [dict(row) for row in search([(ids, vectors)], queries, len(ids))]
    shared = 0
    for ranking, scores in zip(found, exact, strict=True):
        assert ranking == sorted(ranking, key=lambda row: (-row[1], row[0]))
        assert all(scores[passage] == score for passage, score in ranking)
        shared += len({p for p, _ in ranking} & set(list(scores)[:100]))
    assert 0.2 < shared / 5000 < 0.99


def test_sizes_of_indexes_that_nobody_chose():
    million = ivf.settings("ivfpq", 1_000_000, 384)
    assert million == ivf.Settings("ivfpq", 384, nlist=4096, nprobe=256, pq_bytes=96)
    assert million.sample == 39 * 4096
    small = ivf.settings("ivf", 1000, 384)
    assert small.nlist == 1000 // 39 and small.nprobe == 8 and small.sample <= 1000
    assert ivf.settings("ivfpq", 9983, 384) is None  # codes of a byte need 39 x 256
    assert ivf.settings("ivfpq", 9984, 384) is not None
    assert ivf.settings("ivf", 1000, 384, nlist=26) is None
    assert ivf.settings("ivf", 10_000, 384, nlist=26, nprobe=99).nprobe == 26
    assert ivf.settings("ivfpq", 100_000, 30).pq_bytes == 6  # 7 would not divide it
