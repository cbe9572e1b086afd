"""Encoding and search as stages: mapped vectors, shards, several retrievers, indexes."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from retrieval_ray import ivf
from retrieval_ray.artifacts import Location, Stage, part_name, stage
from retrieval_ray.config_file import load
from retrieval_ray.runs import fuse
from retrieval_ray.stages import index, job, searchers
from retrieval_ray.stages.encode import Vectors

from .conftest import ROOT, job_module, small_settings

Runs = dict[str, dict[str, list[tuple[str, float]]]]


def _stage(folder: Location) -> tuple[Stage, dict[str, np.ndarray]]:
    """Vectors of 40 passages in 3 parts."""
    rng = np.random.default_rng(0)
    vectors = {f"p{n}": rng.standard_normal(4).astype(np.float16) for n in range(40)}
    made = stage(folder, "encode", {})
    names = [part_name("vectors", number, "arrow") for number in range(3)]
    for number, name in enumerate(names):
        ids = list(vectors)[number::3]
        flat = np.concatenate([vectors[key] for key in ids])
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat), 4)
        made.write(name, pa.table({"id": ids, "vector": column}))
    made.finish(names, buckets=3)
    return made, vectors


@pytest.mark.parametrize("remote", [False, True])
def test_vectors_by_part_by_id_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    """On a remote store each part is fetched once, then mapped from a copy named by its content."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "near"))
    local = pafs.LocalFileSystem()
    (tmp_path / "store").mkdir()
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), local) if remote else local
    folder = Location(filesystem, "store" if remote else str(tmp_path / "store"))
    made, vectors = _stage(folder)
    every = Vectors.all(made)
    assert sorted(every.ids) == sorted(vectors) and every.matrix.dtype == np.float16
    for key, vector in zip(every.ids, every.matrix, strict=True):
        assert np.array_equal(vector, vectors[key])
    assert every.ids == [key for ids, _ in every.blocks() for key in ids]
    allocated = pa.total_allocated_bytes()
    held = list(every.blocks())
    assert pa.total_allocated_bytes() == allocated  # views of the file
    assert not any(block.flags.writeable for _, block in held)
    wanted = ["p7", "p30", "p7", "p0"]
    assert np.array_equal(Vectors.all(made).of(wanted), np.stack([vectors[key] for key in wanted]))
    assert Vectors(made, [1]).ids == list(vectors)[1::3]
    none = Vectors(made, [])
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "manifest", lambda self: pytest.fail("read again for a part"))
        assert none.ids == [] and none.part(1).ids == list(vectors)[1::3]
    with pytest.raises(KeyError, match="p99"):
        every.of(["p1", "p99"])
    copies = sorted(path.name for path in (tmp_path / "near").rglob("*.arrow"))
    hashes = [f"{content}.arrow" for content in made.manifest()["parts"].values()]
    assert copies == (sorted(hashes) if remote else [])
    if remote:
        for name in made.parts():
            (made.folder / name).remove()
        assert Vectors.all(made).ids == every.ids


def _runs(store: Path) -> Runs:
    (folder,) = store.glob("retrieve-*")
    found: Runs = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("run-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found[row["retriever"]][row["query_id"]].append((row["passage_id"], row["score"]))
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_three_retrievers_fused_and_the_same_through_an_index_of_two_shards(
    collection: Path,
    make_student,  # type: ignore[no-untyped-def]
    student_folder: str,
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every cluster is searched, so the index must find what exact search of one shard finds."""
    second = make_student(mode="cls")
    more = [f"retrieve.models={{second: {second}}}", "retrieve.retrievers=[dense,bm25,second]"]
    indexed = ["retrieve.index=ivf", "retrieve.nlist=4", "retrieve.nprobe=4"]
    runs = {}
    for name, extra in (("exact", []), ("ivf", indexed)):
        settings = small_settings(collection, Path(student_folder), tmp_path / name)
        if name == "ivf":
            monkeypatch.setattr(index, "_SHARD_PARTS", 1)
        config = load(str(ROOT / "configs" / "cpu.yaml"), [*settings, *more, *extra])
        job_module("adapt").adapt(job.open_run(config, dry_run=False), "groups")
        runs[name] = _runs(tmp_path / name / "store")
    assert runs["exact"] == runs["ivf"]
    exact = runs["exact"]
    assert set(exact) == {"dense", "bm25", "second", "fused"}
    assert exact["dense"] != exact["second"]
    for query, ranking in exact["fused"].items():
        assert ranking == fuse([exact[name].get(query, []) for name in ("dense", "bm25", "second")], 100)

    (manifest,) = (tmp_path / "ivf" / "store").glob("retrieve-*/manifest.json")
    facts = json.loads(manifest.read_text())
    assert facts["shards"] == 2 and set(facts["index"]) == {"dense", "second"}
    for built in facts["index"].values():
        assert built["recall"] == 1.0 and built["nlist"] == 4
    assert not list(manifest.parent.glob("partial-*"))
    assert len(list((tmp_path / "exact" / "store").glob("encode-*"))) == 4


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("ivf", []), ("ivfpq", ["retrieve.pq_bytes=2"])])
def test_an_index_that_finds_less_says_how_much_less(
    collection: Path,
    student_folder: str,
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    more: list[str],
) -> None:
    """Recall as counted here, query by query, of all that the sample holds; every score is the exact one."""
    monkeypatch.setattr(index, "_SHARD_PARTS", 1)
    indexed = [f"retrieve.index={kind}", "retrieve.nlist=1" if kind == "ivfpq" else "retrieve.nlist=8"]
    indexed += ["retrieve.nprobe=1", "retrieve.min_recall=1.0", *more]
    monkeypatch.setattr(searchers, "_WIDER", 1)
    monkeypatch.setattr(ivf, "POINTS_PER_CLUSTER", 2)  # 640 passages are enough then for 256 codes
    runs = {}
    for name, extra in (("exact", []), ("indexed", indexed)):
        settings = small_settings(collection, Path(student_folder), tmp_path / name)
        config = load(str(ROOT / "configs" / "cpu.yaml"), [*settings, *extra])
        job_module("adapt").adapt(job.open_run(config, dry_run=False), "retrieve")
        runs[name] = _runs(tmp_path / name / "store")["dense"]
    said = capsys.readouterr().err
    (manifest,) = (tmp_path / "indexed" / "store").glob("retrieve-*/manifest.json")
    recall = json.loads(manifest.read_text())["index"]["dense"]["recall"]
    exact, found = (
        {(query, passage): score for query, ranking in runs[name].items() for passage, score in ranking}
        for name in ("exact", "indexed")
    )
    assert all(exact[pair] == found[pair] for pair in exact.keys() & found.keys())
    # The stage counts one rank deeper
    assert recall < 1 and recall == pytest.approx(len(exact.keys() & found.keys()) / len(exact), abs=0.03)
    assert "warning: that is under retrieve.min_recall=1" in said
