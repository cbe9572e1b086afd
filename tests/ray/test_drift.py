"""How far a trained model's vectors moved: which sample is looked at, what is written, what is done once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, stage
from retrieval_ray.config_file import load
from retrieval_ray.drift import alignment, cosines
from retrieval_ray.metrics import spearman
from retrieval_ray.model_files import Model
from retrieval_ray.sources import open_source
from retrieval_ray.stages import drift, ingest, job, layers, queries
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.student import Student

from .conftest import ROOT, small_settings

pytestmark = pytest.mark.ray


def _collected(
    data: Path, student: str, output: Path, more: tuple[str, ...] = ()
) -> tuple[Context, Collection]:
    """The corpus and queries stages alone; starts no cluster."""
    settings = [*small_settings(data, Path(student), output), "compute.threads=1", *more]
    context = job.open_run(load(str(ROOT / "configs" / "cpu.yaml"), settings), dry_run=False)
    (dataset,) = context.config.corpora()
    source = open_source(dataset.path)
    corpus = ingest.run(context, dataset, source)
    asked = queries.asked(context, dataset, source, corpus)
    return context, queries.run(context, dataset, source, corpus, asked, None)


def _trained(folder: str, place: Path) -> Model:
    """The same model with its last layer moved."""
    student = Student(folder, precision="float32", device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "layer.1." in name:
                parameter += 0.1 * torch.randn_like(parameter)
    student.save(str(place))
    return Model.of(str(place), "test")


def _evaluated(context: Context, collection: Collection) -> tuple[Stage, dict[str, float]]:
    """An evaluation that says what it likes; returns the change of each query."""
    rng = np.random.default_rng(0)
    ids = sorted(queries.qrels_of(collection.queries, "test"))
    values = {system: dict(zip(ids, rng.random(len(ids)), strict=True)) for system in ("base", "candidate")}
    made = stage(context.store, "evaluate", {})
    rows: list[dict[str, Any]] = [
        {"system": system, "query_id": q, "metric": "ndcg@10", "value": value}
        for system, by_query in values.items()
        for q, value in by_query.items()
    ]
    made.write("evaluation.parquet", schema.from_rows("evaluation", rows))
    made.finish(["evaluation.parquet"])
    return made, {q: values["candidate"][q] - values["base"][q] for q in ids}


def _texts(data: Path, name: str) -> dict[str, str]:
    rows = [json.loads(line) for line in (data / f"{name}.jsonl").open()]
    return {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in rows}


def test_what_is_found_is_what_the_two_models_vectors_say(
    collection: Path, student_folder: str, tmp_path: Path
) -> None:
    context, collected = _collected(collection, student_folder, tmp_path / "out")
    trained = _trained(student_folder, tmp_path / "trained")
    evaluated, change = _evaluated(context, collected)
    found = drift.facts_of(drift.run(context, collected, trained, evaluated))
    qrels = queries.qrels_of(collected.queries, "test")
    assert found["queries"] == 16 and sorted(found["query_ids"]) == sorted(qrels)
    assert found["passages"] == layers.PASSAGES < 640

    texts = {role: _texts(collection, name) for role, name in (("query", "queries"), ("passage", "corpus"))}
    positives = [next(iter(qrels[q])) for q in found["query_ids"]]
    vectors = {}
    for name, folder in (("base", student_folder), ("trained", str(tmp_path / "trained"))):
        student = Student(folder, precision="float32", device="cpu")
        vectors[name] = {
            role: student.encode([texts[role][key] for key in keys], role, token_budget=1024)  # type: ignore[arg-type]
            for role, keys in (("query", found["query_ids"]), ("passage", positives))
        }
    moved = 1 - cosines(vectors["base"]["query"], vectors["trained"]["query"])
    assert found["moved"] == pytest.approx(moved, abs=1e-3) and moved.min() > 0.01
    assert found["change"] == pytest.approx([change[q] for q in found["query_ids"]], abs=1e-6)
    assert found["spearman"]["value"] == pytest.approx(
        spearman(np.array(found["moved"]), np.array(found["change"])), abs=1e-6
    )
    assert 0 < found["spearman"]["p"] <= 1
    assert [row["layer"] for row in found["layers"]] == ["embeddings", "1", "final"]
    for row in found["layers"][:2]:  # where nothing was changed nothing moved
        assert row["cosine"] == pytest.approx({"passages": 1, "queries": 1}, abs=1e-4)
        assert row["cka"] == pytest.approx({"passages": 1, "queries": 1}, abs=1e-3)
        assert row["base"] == row["trained"]
    last = found["layers"][2]
    assert last["cosine"]["queries"] == pytest.approx(1 - moved.mean(), abs=1e-3)
    assert last["cka"]["passages"] < 0.99
    for name in ("base", "trained"):
        assert last[name]["alignment"] == pytest.approx(
            alignment(vectors[name]["query"], vectors[name]["passage"]), abs=2e-3
        )


def test_the_base_is_looked_at_once_and_a_rerun_does_nothing(
    collection: Path, student_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context, collected = _collected(collection, student_folder, tmp_path / "out")
    trained = _trained(student_folder, tmp_path / "trained")
    first = drift.run(context, collected, trained)
    assert drift.facts_of(first)["change"] is drift.facts_of(first)["spearman"] is None
    capsys.readouterr()
    rerun = replace(context, touched={})
    assert drift.run(rerun, collected, trained) == first
    said = capsys.readouterr().err
    assert said.count("done already") == 1 and "layers" not in said
    other = drift.run(rerun, collected, context.student)  # nothing moved
    said = capsys.readouterr().err
    assert said.count("done already") == 1 and "layers" in said  # it is both the base and the trained
    assert other.fingerprint != first.fingerprint
    assert drift.facts_of(other)["moved"] == [0.0] * 16
    assert len(list((tmp_path / "out" / "store").glob("layers-*"))) == 2


def test_the_sample_is_cut_by_hash_with_every_querys_relevant_passage(
    collection: Path, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a stage that was killed goes on with the parts that are missing, to the same bytes."""
    for name, value in (("QUERIES", 10), ("PASSAGES", 100), ("_AT_ONCE", 40)):
        monkeypatch.setattr(layers, name, value)
    context, collected = _collected(collection, student_folder, tmp_path / "out")
    made = layers.run(context, collected)
    sample = made.read("sample.parquet")
    ids = {
        role: sample.filter(pc.equal(sample.column("role"), role)).column("id").to_pylist()
        for role in ("query", "passage")
    }
    assert [len(set(ids[role])) for role in ids] == [10, 100] and len(made.parts()) == 1 + 1 + 3
    names, places = layers.pairs_of(made)
    qrels = queries.qrels_of(collected.queries, "test")
    assert names == ids["query"] and all(
        ids["passage"][p] in qrels[q] for q, p in zip(names, places, strict=True)
    )
    assert layers.vectors_of(made, "1").passages_PD.shape == (100, 32)

    before, content = made.folder / "passage-0000001.arrow", made.content()
    kept = Path((made.folder / "query-0000000.arrow").path).stat().st_mtime_ns
    before.remove()
    (made.folder / "manifest.json").remove()
    assert layers.run(context, collected).content() == content
    assert Path((made.folder / "query-0000000.arrow").path).stat().st_mtime_ns == kept


def test_a_models_weights_prompts_and_precision_name_its_layers(
    collection: Path, student_folder: str, tmp_path: Path
) -> None:
    context, collected = _collected(collection, student_folder, tmp_path / "out")
    prompted = replace(context.config, student=replace(context.config.student, query_prompt="query: "))
    crowded = replace(context.config, compute=replace(context.config.compute, workers=4))
    own = layers.target_of(context, collected)
    others = [
        context.with_student(replace(context.student, sha="b" * 64)),
        replace(context, config=prompted),
        replace(context, profile=replace(context.profile, precision="bfloat16")),
    ]
    assert len({layers.target_of(each, collected).fingerprint for each in [context, *others]}) == 4
    assert layers.target_of(replace(context, config=crowded), collected) == own


def test_two_workers_find_the_same(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None
) -> None:
    trained = _trained(student_folder, tmp_path / "trained")
    found = []
    for workers in (1, 2):
        more = (f"compute.workers={workers}",)
        context, collected = _collected(collection, student_folder, tmp_path / str(workers), more)
        found.append(drift.run(context, collected, trained))
    assert found[0].fingerprint == found[1].fingerprint and found[0].content() == found[1].content()
