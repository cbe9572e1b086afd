"""The main job end to end on a small collection: what it writes, what it reuses, what changes nothing."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.artifacts import Location
from retrieval_ray.config_file import load
from retrieval_ray.stages import job

from .conftest import ROOT, job_module, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = str(ROOT / "configs" / "cpu.yaml")


def adapt(settings: list[str], until: str | None = None) -> str | None:
    """The job in this process, on the session's cluster."""
    context = job.open_run(load(CONFIG, settings), dry_run=False)
    where: str | None = job_module("adapt").adapt(context, until)
    return where


def tables(store: Path) -> dict[str, str]:
    """The content hash of every finished stage."""
    found = {}
    for manifest in sorted(store.glob("*/manifest.json")):
        facts = json.loads(manifest.read_text())
        found[manifest.parent.name] = facts["content"]
    return found


@pytest.fixture(scope="module")
def finished(ray_local: None, collection: Path, student_folder: str, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    output = tmp_path_factory.mktemp("run") / "out"
    adapt(small_settings(collection, Path(student_folder), output))
    return output


def test_metrics_json_keeps_its_contract(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["dataset"].startswith("trade") and metrics["split"] == "test"
    assert {"base", "adapted", "bm25", "teacher"} <= metrics["systems"].keys()
    for values in metrics["systems"].values():
        assert {"ndcg@10", "recall@100", "mrr@10", "map@100"} <= values.keys()
    delta = metrics["delta"]["ndcg@10"]
    assert delta["ci95"][0] <= delta["mean"] <= delta["ci95"][1] and 0 < delta["p"] <= 1
    gain = metrics["systems"]["adapted"]["ndcg@10"] - metrics["systems"]["base"]["ndcg@10"]
    assert delta["mean"] == pytest.approx(gain)
    assert metrics["decision"] in ("base", "adapted")
    assert metrics["queries"]["kept"] + sum(metrics["queries"]["rejected"].values()) == 48
    assert {"corpus", "queries", "encode", "retrieve", "groups", "train", "drift"} <= metrics[
        "seconds"
    ].keys()


def test_the_returned_model_is_the_one_that_was_measured(finished: Path, collection: Path) -> None:
    """Plain sentence-transformers, its own encode and its own cosine: the same nDCG@10."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from retrieval_ray.metrics import mean, per_query

    metrics = json.loads((finished / "metrics.json").read_text())
    model = SentenceTransformer(str(finished / "model"), device="cpu")
    corpus = [json.loads(line) for line in (collection / "corpus.jsonl").open()]
    queries = {r["_id"]: r["text"] for r in map(json.loads, (collection / "queries.jsonl").open())}
    rows = [line.split("\t") for line in (collection / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    qrels = {q: {p: int(r)} for q, p, r in rows}
    passages = model.encode([f"{r['title']} {r['text']}" for r in corpus], normalize_embeddings=True)
    run = {}
    for q in qrels:
        scores = passages @ model.encode(queries[q], normalize_embeddings=True)
        run[q] = [corpus[n]["_id"] for n in np.argsort(-scores)]
    measured = mean(per_query(qrels, run))["ndcg@10"]
    assert measured == pytest.approx(metrics["systems"]["adapted"]["ndcg@10"], abs=0.02)


def test_the_losing_or_winning_candidate_is_reported(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    if metrics["decision"] == "base":
        assert metrics["systems"]["adapted"] == metrics["systems"]["base"]
        assert metrics["delta"]["ndcg@10"] == {"mean": 0, "ci95": [0, 0], "p": 1, "p_holm": 1}
        if metrics["training"]:
            assert "candidate" in metrics["systems"] and (finished / "candidate").is_dir()
    else:
        assert not (finished / "candidate").exists()


def test_a_trained_student_is_asked_what_is_reported_and_no_more(finished: Path) -> None:
    import pyarrow.parquet as pq

    ranked = {}
    for path in (finished / "store").glob("retrieve-*/manifest.json"):
        facts = json.loads(path.read_text())
        parts = [pq.read_table(path.parent / part) for part in facts["parts"]]
        ranked[facts["rows"]] = {row["query_id"] for part in parts for row in part.to_pylist()}
    reported = {f"q{n}" for n in range(64, 80)}
    assert sorted(ranked) == [16, 80 - len(_rejected(finished))]
    assert ranked[16] == reported < ranked[max(ranked)]


def _rejected(output: Path) -> list[str]:
    import pyarrow.parquet as pq

    (rejects,) = (output / "store").glob("queries-*/rejects.parquet")
    return [str(key) for key in pq.read_table(rejects).column("id").to_pylist()]


def test_run_files_and_report(finished: Path) -> None:
    for system in ("base", "adapted", "bm25", "teacher"):
        first = (finished / "runs" / f"{system}.trec").read_text().splitlines()[0].split()
        assert len(first) == 6 and first[1] == "Q0" and first[3] == "1"
    page = (finished / "report.html").read_text()
    assert page.count("<svg") >= 5 and "tokens a second" in page
    assert not re.search(r"""<(script|link|img|iframe)|(src|href)=["']?https?:""", page)  # self-contained
    assert (finished / "model" / "README.md").read_text().startswith("---\nlibrary_name")


def test_what_training_did_to_the_vectors_is_measured_and_shown(finished: Path) -> None:
    """Of the trained model, whether or not it is returned; with the change of each judged query."""
    (folder,) = (finished / "store").glob("drift-*")
    found = json.loads((folder / "drift.json").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    trained = "adapted" if metrics["decision"] == "adapted" else "candidate"
    gain = metrics["systems"][trained]["ndcg@10"] - metrics["systems"]["base"]["ndcg@10"]
    assert sum(found["change"]) / 16 == pytest.approx(gain, abs=1e-5)
    assert max(found["moved"]) > 0 and found["layers"][-1]["cka"]["passages"] < 1
    page = (finished / "report.html").read_text()
    assert "What training did to the vectors" in page and "600 passages" in page
    assert f"{found['spearman']['value']:+.3f}" in page and "overfits" in page


def test_what_the_teacher_does_to_single_queries_is_written_down_and_shown(finished: Path) -> None:
    """The table by query, its summary in the manifest, the figures on the page."""
    import numpy as np
    import pyarrow.parquet as pq

    (groups,) = (finished / "store").glob("groups-*")
    manifest = json.loads((groups / "manifest.json").read_text())
    rows = pq.read_table(groups / "trust.parquet").to_pylist()
    judged = {(r["system"], r["query_id"]): r["value"] for r in rows if r["metric"] == "ndcg@10"}
    dev = sorted({query for _, query in judged})
    gate, trust = manifest["gate"], manifest["trust"]
    assert len(dev) == gate["queries"] == trust["dev"]["queries"] == 16 and "by_query" not in gate
    for system in ("student", "teacher"):
        assert np.mean([judged[system, q] for q in dev]) == pytest.approx(gate[system])
    worse = sum(judged["teacher", q] < judged["student", q] for q in dev)
    assert trust["dev"]["worse"] == worse and len(trust["losses"]) == min(worse, 8)
    tau = [r["value"] for r in rows if r["metric"] == "tau" and r["system"] == "bm25"]
    assert len(tau) == 48  # every query of the log
    assert trust["agreement"]["bm25"]["tau"][2] == pytest.approx(np.median(tau))
    assert trust["kinds"]["log"]["queries"] == 48 and trust["kinds"]["log"]["not_first"] is None
    assert set(manifest["samples"]) == set(manifest["rejected"])
    page = (finished / "report.html").read_text()
    assert page.count("<svg") >= 8
    assert f"<td>log</td><td>48</td><td>0</td><td>–</td><td>{trust['kinds']['log']['inverted']:.1%}" in page
    for loss in trust["losses"]:
        assert f"<td>{loss['student']:.3f}</td><td>{loss['teacher']:.3f}</td>" in page


def test_margins_leave_no_similar_negative_in_any_list(
    finished: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """NV-Retriever's rule on the dense similarities, checked on the stored rankings."""
    import pyarrow.parquet as pq

    store = Location.of(str(finished / "store"))
    settings = small_settings(collection, Path(student_folder), tmp_path / "out")
    more = ["groups.relative_margin=0.02", "groups.negatives=stratified", f"store={store.path}"]
    adapt([*settings, *more], until="groups")
    (groups,) = (
        folder
        for folder in (finished / "store").glob("groups-*")
        if json.loads((folder / "manifest.json").read_text())["identity"]["groups"]["relative_margin"]
    )
    manifest = json.loads((groups / "manifest.json").read_text())
    similar: dict[tuple[str, str], float] = {}
    (run,) = (
        folder
        for folder in (finished / "store").glob("retrieve-*")
        if json.loads((folder / "manifest.json").read_text())["content"] == manifest["identity"]["retrieved"]
    )
    for part in run.glob("run-*"):
        for row in pq.read_table(part).to_pylist():
            if row["retriever"] == "dense":
                similar[row["query_id"], row["passage_id"]] = row["score"]
    rows = pq.read_table(groups / "groups.parquet").to_pylist()
    assert len(rows) == manifest["kept"]
    for row in rows:
        lowest = min(score for (query, _), score in similar.items() if query == row["query_id"])
        positive = similar.get((row["query_id"], row["positive_id"]), lowest)
        for passage in row["passage_ids"][1:]:
            assert similar.get((row["query_id"], passage), -1.0) <= positive - 0.02 * abs(positive)
    assert manifest["left_out"]["too_close"] > 0 or manifest["rejected"].get("few_negatives")


def test_a_rerun_does_nothing_and_says_so(
    finished: Path, collection: Path, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "store").rglob("*.*")}
    adapt(small_settings(collection, Path(student_folder), finished))
    said = capsys.readouterr().err
    assert said.count("done already") >= 12
    assert {path: path.stat().st_mtime_ns for path in (finished / "store").rglob("*.*")} == before


def test_a_dry_run_of_a_finished_run_changes_nothing(
    finished: Path, collection: Path, student_folder: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*")}
    settings = small_settings(collection, Path(student_folder), finished)
    context = job.open_run(load(CONFIG, settings), dry_run=True)
    assert job_module("adapt").adapt(context, None) is None
    assert all(line.startswith("reuse") for line in context.planned) and len(context.planned) >= 12
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.*")} == before


def test_order_of_rows_and_number_of_workers_change_nothing(
    finished: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """Shuffled input, three workers instead of one: the same ids, ranks, scores and lists."""
    shuffled = tmp_path / collection.name
    shutil.copytree(collection, shuffled)
    for name in ("corpus.jsonl", "queries.jsonl"):
        lines = (shuffled / name).read_text().splitlines()
        random.Random(1).shuffle(lines)
        (shuffled / name).write_text("\n".join(lines) + "\n")
    settings = small_settings(shuffled, Path(student_folder), tmp_path / "out")
    adapt([*settings, "compute.workers=3", "compute.threads=2"], until="groups")
    before, after = tables(finished / "store"), tables(tmp_path / "out" / "store")
    assert len(after) >= 8
    for name, content in after.items():
        assert before[name] == content, name


@pytest.mark.parametrize(
    "how", [[], ["compute.min_workers=1", "train.shard=true"]], ids=["fixed", "elastic and sharded"]
)
def test_two_training_workers_reach_the_same_model(
    finished: Path, collection: Path, student_folder: str, tmp_path: Path, how: list[str]
) -> None:
    """The world size is part of the numeric profile, and changes nothing but the last digits."""
    import safetensors.numpy

    def workers(folder: Path) -> int:
        return int(json.loads((folder / "manifest.json").read_text())["config"]["compute"]["workers"])

    def read(folder: Path) -> tuple[Any, dict[str, Any]]:
        weights = safetensors.numpy.load_file(folder / "candidate" / "model.safetensors")
        return json.loads((folder / "fit.json").read_text())["history"], weights

    store = finished / "store"
    there = set(store.glob("train-*"))
    (before,) = [folder for folder in there if workers(folder) == 1]
    settings = small_settings(collection, Path(student_folder), tmp_path / "out")
    adapt([*settings, "compute.workers=2", "compute.threads=2", f"store={store}", *how], until="train")
    (after,) = set(store.glob("train-*")) - there
    (one_history, one), (two_history, two) = read(before), read(after)
    assert [r["dev_kl"] for r in one_history] == pytest.approx([r["dev_kl"] for r in two_history], rel=1e-3)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert abs(weight - two[name]).max() < 2e-3, name
    assert not list(after.glob("checkpoint-*")) and (after / "steps.jsonl").exists()


def test_several_corpora_one_model(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None
) -> None:
    """``datasets=[...]``: each step one corpus, one model for all, results per corpus."""
    twin = tmp_path / "twin"
    shutil.copytree(collection, twin)
    settings = [
        setting
        for setting in small_settings(collection, Path(student_folder), tmp_path / "out")
        if not setting.startswith("dataset.")
    ]
    entries = ",".join(
        f"{{path: {folder}, log_split: train, dev_split: dev}}" for folder in (collection, twin)
    )
    where = adapt([*settings, f"datasets=[{entries}]", "train.max_epochs=1"])
    metrics = json.loads(Path(str(where)).read_text())
    assert set(metrics["datasets"]) == {collection.name, "twin"}
    assert metrics["training"]["queries"][0] > 0 and metrics["training"]["queries"][1] > 0
    assert (tmp_path / "out" / "runs" / "twin" / "base.trec").exists()


def test_extractive_queries_follow_the_consistency_rule(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None
) -> None:
    """Without a log: every kept list begins with the passage its query was cut from."""
    import pyarrow.parquet as pq

    settings = [
        setting
        for setting in small_settings(collection, Path(student_folder), tmp_path / "out")
        if not setting.startswith(("queries.", "dataset.dev_split"))
    ]
    adapt([*settings, "queries.sources=[extractive]"], until="groups")
    store = tmp_path / "out" / "store"
    (groups,) = store.glob("groups-*")
    sources = {}
    for part in store.glob("queries-*/queries-*.parquet"):
        sources |= {row["query_id"]: row["passage_id"] for row in pq.read_table(part).to_pylist()}
    rows = pq.read_table(groups / "groups.parquet").to_pylist()
    assert rows
    for row in rows:
        assert row["positive_id"] == row["passage_ids"][0] == sources[row["query_id"]]
        assert row["positive_id"] not in row["passage_ids"][1:] + row["excluded_ids"]
        # nothing is judged, so the lists held out are whole pools
        assert len(row["passage_ids"]) == (6 if row["split"] == "train" else 20)
    manifest = json.loads((groups / "manifest.json").read_text())
    assert manifest["gate"]["passed"] is None  # nothing was judged: unproven
    rejects = pq.read_table(groups / "rejects.parquet").to_pylist()
    assert len(rejects) == sum(manifest["rejected"].values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["train.moe.experts=2", "train.moe.layers=[0,7]"], "train.moe: layers: no layer 7; there are 2"),
        (["train.moe.train=experts"], "train.moe.train: 'experts', and the student has none"),
        (["student.lora.r=2", "student.lora.targets=[query_projection]"], "student.lora.targets: .*query"),
    ],
)
def test_what_the_student_cannot_have_is_said_before_anything_is_computed(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None, wrong: list[str], said: str
) -> None:
    if "lora" in wrong[0]:
        pytest.importorskip("peft")
    settings = small_settings(collection, Path(student_folder), tmp_path / "out")
    with pytest.raises(Exception) as caught:
        adapt([*settings, *wrong])
    assert re.search(said, str(job.explain(caught.value)))
    assert {path.name.partition("-")[0] for path in (tmp_path / "out" / "store").iterdir()} == {"corpus"}


def test_cross_encoder_teacher_scores_are_its_own_predictions_and_cached(
    collection: Path, student_folder: str, make_cross_encoder, tmp_path: Path, ray_local: None
) -> None:  # type: ignore[no-untyped-def]
    import pyarrow.parquet as pq
    import torch
    from sentence_transformers import CrossEncoder

    folder = make_cross_encoder(1)
    settings = small_settings(collection, Path(student_folder), tmp_path / "out")
    teacher = ["teacher.kind=cross_encoder", f"teacher.model={folder}", "teacher.max_tokens=64"]
    adapt([*settings, *teacher], until="score")
    store = tmp_path / "out" / "store"
    scores = [row for part in store.glob("score-*/scores-*") for row in pq.read_table(part).to_pylist()]
    assert scores
    corpus = {r["_id"]: r for r in map(json.loads, (collection / "corpus.jsonl").open())}
    queries = {r["_id"]: r["text"] for r in map(json.loads, (collection / "queries.jsonl").open())}
    some = scores[:: max(1, len(scores) // 50)]
    pairs = [
        (
            queries[s["query_id"]],
            f"{corpus[s['passage_id']]['title']} {corpus[s['passage_id']]['text']}".strip(),
        )
        for s in some
    ]
    model = CrossEncoder(str(folder), device="cpu", max_length=64)
    expected = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert [s["score"] for s in some] == pytest.approx(expected.tolist(), abs=1e-5)

    for stage in store.glob("score-*"):
        shutil.rmtree(stage)
    adapt([*settings, *teacher], until="score")
    (manifest,) = store.glob("score-*/manifest.json")
    facts = json.loads(manifest.read_text())
    assert facts["rows_this_run"] == 0 and facts["from_cache"] == len(scores)
