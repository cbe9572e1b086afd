"""The export job from a collection to files, as another library reads them."""

import json
from pathlib import Path

import pytest

from retrieval_ray import stages
from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.export import FORMATS
from retrieval_ray.stages import job

from .conftest import ROOT, foreseen_rows, job_module, run_job, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = str(ROOT / "configs" / "cpu.yaml")


def read(folder: Path, table: str) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for path in sorted((folder / table).glob("*.jsonl")) for line in path.open()]


def test_every_format_holds_the_lists_of_the_groups_stage(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    config = load(CONFIG, small_settings(collection, Path(student_folder), tmp_path / "run"))
    export = job_module("export")
    export.write(job.open_run(config, dry_run=True), None, "pylate", str(tmp_path / "pylate"))
    said = capsys.readouterr().out
    assert "run    every stage after it, until groups" in said and "\ngroups" in said
    assert "train" not in said.partition("forecast")[2] and not (tmp_path / "pylate").exists()
    context = job.open_run(config, dry_run=False)
    for form in FORMATS:
        export.write(context, None, form, str(tmp_path / form))
    assert set(foreseen_rows(tmp_path / "run")) == {
        "corpus", "queries", "encode-passage", "encode-query", "retrieve", "score-late", "score-bm25",
        "score-dense", "groups",
    }  # fmt: skip
    (groups,) = (tmp_path / "run" / "store").glob("groups-*/groups.parquet")
    rows = pq.read_table(groups).to_pylist()
    corpus = {r["_id"]: r for r in map(json.loads, (collection / "corpus.jsonl").open())}
    queries = {r["_id"]: r["text"] for r in map(json.loads, (collection / "queries.jsonl").open())}
    texts = {key: f"{row['title']} {row['text']}".strip() for key, row in corpus.items()}
    for split in ("train", "dev"):
        expected = [row for row in rows if row["split"] == split]
        assert expected
        got = {form: read(tmp_path / form, split) for form in FORMATS}
        for n, row in enumerate(expected):
            passages = [texts[p] for p in row["passage_ids"]]
            flag = got["flagembedding"][n]
            assert flag["query"] == queries[row["query_id"]]
            assert (flag["pos"] + flag["neg"], flag["pos_scores"] + flag["neg_scores"]) == (
                passages, row["teacher_scores"]
            )  # fmt: skip
            assert list(got["sentence-transformers"][n].values()) == [
                queries[row["query_id"]], *passages, row["teacher_scores"]
            ]  # fmt: skip
            teva = got["tevatron"][n]
            judged = teva["positive_passages"] + teva["negative_passages"]
            assert [p["docid"] for p in judged] == row["passage_ids"]
            assert [corpus[p["docid"]]["title"] for p in judged] == [p["title"] for p in judged]
            assert got["pylate"][n] == {
                "query_id": row["query_id"], "document_ids": row["passage_ids"],
                "scores": row["teacher_scores"],
            }  # fmt: skip
    documents = read(tmp_path / "pylate", "documents")
    assert {d["document_id"]: d["text"] for d in documents} == {
        p: texts[p] for row in rows for p in row["passage_ids"]
    }
    assert len(documents) == len({d["document_id"] for d in documents})
    assert {q["query_id"]: q["text"] for q in read(tmp_path / "pylate", "queries")} == {
        row["query_id"]: queries[row["query_id"]] for row in rows
    }
    facts = json.loads((tmp_path / "pylate" / "export.json").read_text())
    assert facts["train"]["lists"] + facts["dev"]["lists"] == len(rows)

    export.write(context, None, "tevatron", str(tmp_path / "dropped"), "drop")
    for split in ("train", "dev"):
        masked = [set(row["excluded_ids"]) for row in rows if row["split"] == split]
        for row, excluded in zip(read(tmp_path / "dropped", split), masked, strict=True):
            assert not {p["docid"] for p in row["negative_passages"]} & excluded
            assert len(row["positive_passages"]) == 1
    with pytest.raises(UserError, match="not empty"):
        export.write(context, None, "tevatron", str(tmp_path / "dropped"))


def test_an_export_that_was_killed_is_made_again(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*small_settings(collection, Path(student_folder), tmp_path / "run"), "dataset.max_queries=8"]
    context = job.open_run(load(CONFIG, settings), dry_run=False)
    export, out = job_module("export"), tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.export, "_write", killed)
        export.write(context, None, "pylate", str(out))
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    left = out / "queries" / "train-lists-0000007.jsonl"
    left.parent.mkdir()
    left.write_text("of another format")
    export.write(context, None, "tevatron", str(out))
    assert {path.name for path in out.iterdir()} == {"train", "dev", "export.json"}
    assert read(out, "train")


def test_what_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    for arguments, expected in (
        (["format=csv", "out=x"], "format: 'csv' is not one of sentence-transformers, tevatron"),
        (["format=pylate"], "out: name the folder"),
        (["format=pylate", "out=x", "false_negatives=no"], "false_negatives: 'no' is not one of keep, drop"),
    ):
        done = run_job("export", [CONFIG, *arguments, f"output_dir={tmp_path}/run"])
        assert done.returncode == 2 and expected in done.stderr, done.stderr
