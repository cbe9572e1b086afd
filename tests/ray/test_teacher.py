"""The teacher job on the bundled demo: what it learns from, what it leaves out; the main job takes it."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.sources import open_source
from retrieval_ray.stages import ingest, job, reranker

from .conftest import ROOT, foreseen_rows, job_module, run_job, small_settings, write_collection

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = str(ROOT / "configs" / "teacher.yaml")


def settings(student: str, base: str, output: Path) -> list[str]:
    return [
        "dataset.path=demo", "reranker.split=dev", f"student.model={student}", f"reranker.base={base}",
        "reranker.dev_queries=10", "reranker.pool=20", "reranker.batch_lists=4", "reranker.max_tokens=48",
        "compute.precision=float32", "compute.token_budget=4096", f"output_dir={output}",
    ]  # fmt: skip


def test_a_teacher_trained_on_the_demo_scores_in_the_main_job(
    collection: Path,
    student_folder: str,
    bert_folder: str,
    tmp_path: Path,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("accelerate")
    import pyarrow.parquet as pq

    overrides = settings(student_folder, bert_folder, tmp_path / "out")
    teach = job_module("teacher").teach
    teach(job.open_run(load(CONFIG, overrides), dry_run=True), None)
    said = capsys.readouterr().out
    assert "run    corpus 'demo'" in said and "\ntrain teacher" in said
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["forecast.json"]
    where = teach(job.open_run(load(CONFIG, overrides), dry_run=False), None)
    assert where == str(tmp_path / "out" / "model")
    (stage,) = (tmp_path / "out" / "store").glob("reranker-*")
    foreseen = foreseen_rows(tmp_path / "out")
    assert set(foreseen) == {
        "corpus", "queries", "encode-passage", "encode-query", "retrieve", "reranker"
    }  # fmt: skip
    for name in ("corpus", "encode-passage"):
        ((before, after),) = foreseen[name]
        assert before == after
    assert all(after <= before for pairs in foreseen.values() for before, after in pairs)
    rows = pq.read_table(stage / "pairs.parquet").to_pylist()
    demo = open_source("demo")
    dev = {}
    for _, query, passage, grade in demo.qrels("dev"):
        dev.setdefault(query, {})[passage] = grade
    test = {query for _, query, _, _ in demo.qrels("test")}
    learned = [row for row in rows if row["split"] == "train"]
    held_out = {row["query_id"] for row in rows if row["split"] == "dev"}
    assert len(held_out) == 10 and not held_out & {row["query_id"] for row in learned}
    assert not {row["query_id"] for row in rows} & test
    for row in learned:
        judged = dev[row["query_id"]]
        assert (judged.get(row["passage_id"], 0) >= 1) == bool(row["relevance"])
        assert row["passage_id"] in judged or not row["relevance"]
    assert 0 < sum(row["relevance"] for row in learned) < len(learned) / 3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["pairs"] == len(learned) and metrics["dev"]["demo"]["queries"] == 10
    assert 0 <= metrics["dev"]["demo"]["reranked_ndcg@10"] <= 1
    assert not (stage / "checkpoints").exists()

    before = {path: path.stat().st_mtime_ns for path in stage.rglob("*.*")}
    teach(job.open_run(load(CONFIG, overrides), dry_run=False), None)  # a rerun trains nothing
    assert {path: path.stat().st_mtime_ns for path in stage.rglob("*.*")} == before

    main = small_settings(collection, Path(student_folder), tmp_path / "main")
    teacher = ["teacher.kind=cross_encoder", f"teacher.model={where}", "teacher.max_tokens=64"]
    config = load(str(ROOT / "configs" / "cpu.yaml"), [*main, *teacher])
    job_module("adapt").adapt(job.open_run(config, dry_run=False), "score")
    (scores,) = (tmp_path / "main" / "store").glob("score-*/manifest.json")
    assert json.loads(scores.read_text())["rows"] > 0


def test_reported_queries_are_never_learned_by_id_or_by_text(tmp_path: Path) -> None:
    passages = [(f"p{n}", "", f"passage number {n} about ba co di") for n in range(30)]
    queries = {f"q{n}": (f"question {n}", f"p{n}") for n in range(6)}
    queries["q5"] = ("Question  0", "p5")  # the text of q0, which is reported
    write_collection(tmp_path / "data", passages, queries, {"test": range(2), "train": range(1, 6)})
    config = load(CONFIG, [f"dataset.path={tmp_path}/data", f"output_dir={tmp_path}/out"])
    context = job.open_run(config, dry_run=False)
    source = open_source(config.dataset.path)
    corpus = ingest.run(context, config.dataset, source)
    found = reranker.judged_queries(context, config.dataset, source, corpus)
    kept = {r["query_id"] for r in found.queries.read_all("queries-").to_pylist()}
    assert kept == {"q2", "q3", "q4"}
    rejects = found.queries.read("rejects.parquet").to_pylist()
    assert {r["id"]: r["reason"] for r in rejects} == {"q1": "in_test", "q5": "in_test"}
    assert {r["query_id"] for r in found.queries.read("qrels-train.parquet").to_pylist()} == kept
    config.reranker.split = "test:0.5"
    with pytest.raises(UserError, match="could never be judged"):
        reranker.judged_queries(context, config.dataset, source, corpus)


def test_what_was_not_retrieved_counts_against_both_orders() -> None:
    """One of two relevant passages is in the pool, at the second place; the model puts it first."""

    class Model:
        def predict(self, pairs: list[tuple[str, str]], **_: object) -> npt.NDArray[np.float32]:
            return np.array([float(text == "right") for _, text in pairs], dtype=np.float32)

    rows = [
        {"split": split, "corpus": "c", "query_id": "q", "passage_id": passage, "query": "?",
         "passage": text, "relevance": relevance}
        for split, passage, text, relevance in (
            ("dev", "a", "wrong", 0), ("dev", "b", "right", 1), ("judged", "c", "right too", 1)
        )
    ]  # fmt: skip
    ideal = 1 + 1 / np.log2(3)
    assert reranker._measured(Model(), rows)["c"] == {
        "queries": 1.0,
        "retrieved_ndcg@10": pytest.approx(1 / np.log2(3) / ideal),
        "reranked_ndcg@10": pytest.approx(1 / ideal),
    }


def test_a_stage_to_stop_at_is_refused(tmp_path: Path) -> None:
    done = run_job("teacher", [CONFIG, "--until", "score", f"output_dir={tmp_path}/out"])
    assert done.returncode == 2 and "no stages to stop at" in done.stderr
