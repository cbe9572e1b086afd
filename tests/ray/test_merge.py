"""A student with experts through the jobs: trained on Ray, merged, evaluated before and after."""

import json
from pathlib import Path

import numpy as np
import pytest

import retrieval_ray
from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.experts import add_experts
from retrieval_ray.moe import Layout, moe_layers
from retrieval_ray.stages import job
from retrieval_ray.student import Student

from .conftest import ROOT, job_module, small_settings

CONFIG = str(ROOT / "configs" / "cpu.yaml")


def merge(settings: list[str], *, dry_run: bool = False) -> str | None:
    context = job.open_run(load(CONFIG, settings), dry_run=dry_run)
    where: str | None = job_module("merge").make_dense(context, None)
    return where


def given(collection: Path, student: Path, output: Path) -> list[str]:
    return [
        f"dataset.path={collection}",
        f"student.model={student}",
        f"output_dir={output}",
        "compute.precision=float32",
        "compute.threads=1",
    ]


@pytest.fixture(scope="module")
def moe_folder(student_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts far enough apart for a merge to cost something."""
    import torch

    student = Student(student_folder, precision="float32", device="cpu")
    add_experts(student.model, Layout(3))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in moe_layers(student.model).values():
            layer.weight_EOI += 0.5 * torch.randn_like(layer.weight_EOI)
    folder = tmp_path_factory.mktemp("moe") / "model"
    student.save(str(folder))
    return folder


def test_what_merging_costs_is_measured_and_written(
    collection: Path, moe_folder: Path, tmp_path: Path
) -> None:
    where = merge(given(collection, moe_folder, tmp_path))
    assert where is not None
    document = json.loads((tmp_path / "merge.json").read_text())
    assert document["experts"]["experts"] == 3 and document["weights"] == "load"
    assert len(document["load"]) == 2
    assert all(sum(shares) == pytest.approx(1) for shares in document["load"].values())
    (found,) = document["datasets"].values()
    assert found["queries_judged"] == 16
    loss = found["after"]["ndcg@10"] - found["before"]["ndcg@10"]
    assert found["delta"]["ndcg@10"]["mean"] == pytest.approx(loss)
    assert loss != 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{found['before']['ndcg@10']:.4f}" in card and f"{loss:+.4f}" in card
    model = retrieval_ray.load(str(tmp_path / "model"), device="cpu")
    assert not moe_layers(model) and type(model[0].auto_model).__name__ == "BertModel"


def test_the_measure_is_plain_sentence_transformers_own(
    collection: Path, moe_folder: Path, tmp_path: Path
) -> None:
    from retrieval_ray.metrics import mean, per_query

    merge([*given(collection, moe_folder, tmp_path), "merge.weights=uniform"])
    document = json.loads((tmp_path / "merge.json").read_text())
    assert document["load"] is None
    (found,) = document["datasets"].values()
    corpus = [json.loads(line) for line in (collection / "corpus.jsonl").open()]
    queries = {r["_id"]: r["text"] for r in map(json.loads, (collection / "queries.jsonl").open())}
    rows = [line.split("\t") for line in (collection / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    for folder, name in ((moe_folder, "before"), (tmp_path / "model", "after")):
        model = retrieval_ray.load(str(folder), device="cpu")
        passages = model.encode([f"{r['title']} {r['text']}" for r in corpus], normalize_embeddings=True)
        run = {}
        for query, _, _ in rows:
            scores = passages @ model.encode(queries[query], normalize_embeddings=True)
            run[query] = [corpus[n]["_id"] for n in np.argsort(-scores)]
        measured = mean(per_query({q: {p: int(r)} for q, p, r in rows}, run))
        assert found[name]["ndcg@10"] == pytest.approx(measured["ndcg@10"], abs=0.02)


def test_without_an_evaluation_the_card_says_so(collection: Path, moe_folder: Path, tmp_path: Path) -> None:
    merge([*given(collection, moe_folder, tmp_path), "merge.evaluate=false"])
    assert json.loads((tmp_path / "merge.json").read_text())["datasets"] == {}
    assert "was not measured" in (tmp_path / "model" / "README.md").read_text()


def test_a_dry_run_writes_nothing(
    collection: Path, moe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(given(collection, moe_folder, tmp_path / "out"), dry_run=True) is None
    assert "would merge" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dense_student_has_nothing_to_merge(collection: Path, student_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no experts to merge"):
        merge(given(collection, Path(student_folder), tmp_path))


@pytest.mark.ray
@pytest.mark.slow
def test_a_student_is_given_experts_and_trained(
    ray_local: None, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """Whether it wins or loses, the trained model has experts, loads, and differs in them alone."""
    output = tmp_path / "run"
    settings = [
        *small_settings(collection, Path(student_folder), output),
        "teacher.gate=false",
        "train.max_epochs=1",
        "train.moe.experts=2",
        "train.moe.layers=[1]",
        "train.moe.train=experts",
    ]
    context = job.open_run(load(CONFIG, settings), dry_run=False)
    job_module("adapt").adapt(context, None)
    won = json.loads((output / "metrics.json").read_text())["decision"] == "adapted"
    folder = output / ("model" if won else "candidate")
    trained, base = (retrieval_ray.load(str(f), device="cpu") for f in (folder, student_folder))
    (layer,) = moe_layers(trained).values()
    assert not np.allclose(layer.weight_EOI[0].detach(), layer.weight_EOI[1].detach())
    rest = dict(base.named_parameters())
    for name, parameter in trained.named_parameters():
        if name in rest:
            assert np.array_equal(parameter.detach(), rest[name].detach()), name
    if won:
        assert "trust_remote_code=True" in (folder / "README.md").read_text()
