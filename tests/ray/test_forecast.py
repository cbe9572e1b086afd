"""What a dry run of the main job foresees, against what the run's own manifests then say."""

import json
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.config_file import load
from retrieval_ray.stages import job

from .conftest import ROOT, job_module, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = str(ROOT / "configs" / "cpu.yaml")


def adapt(settings: list[str], *, dry_run: bool, until: str | None = None) -> None:
    job_module("adapt").adapt(job.open_run(load(CONFIG, settings), dry_run=dry_run), until)


def manifests(output: Path) -> dict[str, list[dict[str, Any]]]:
    """By stage, of encoding with the role."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (output / "store").glob("*/manifest.json"):
        facts = json.loads(path.read_text())
        role = facts["identity"].get("role")
        found.setdefault(f"{facts['stage']}-{role}" if role else facts["stage"], []).append(facts)
    return found


def test_what_was_foreseen_is_what_happened(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    settings = [
        *small_settings(collection, Path(student_folder), output),
        "teacher.gate=false",
        "prices={worker_hour: 1, gib_month: 1}",
    ]
    adapt(settings, dry_run=True)
    said = capsys.readouterr().out
    assert "forecast (rates: a sample of" in said and "money" in said and "at most 1,600 pairs" in said
    assert [path.name for path in output.rglob("*")] == ["forecast.json"]
    works = json.loads((output / "forecast.json").read_text())["works"]
    assert all(work["seconds"] is not None for work in works)

    adapt(settings, dry_run=False)
    happened = manifests(output)
    foreseen: dict[str, list[dict[str, Any]]] = {}
    for work in works:
        foreseen.setdefault(work["stage"], []).append(work)
    inner = {"pool", "query-tokens", "layers"}
    assert foreseen.keys() - {"kept", "results"} == happened.keys() - inner
    for stage, own in happened.items():
        if stage in inner:
            assert all("forecast" not in facts for facts in own)
            continue
        assert len(own) == len(foreseen[stage])
        for facts in own:
            if stage.startswith(("encode", "score")):
                assert 0 < facts["busy_seconds"] <= facts["seconds"]  # of one worker
            rows = facts["forecast"]["rows"]
            assert rows["happened"] == facts["rows"] and facts["forecast"]["seconds"]["happened"] > 0
            if stage in ("groups", "train"):  # how many lists the teacher agrees with is not known before
                assert rows["happened"] <= rows["foreseen"]
            else:
                assert rows["happened"] == rows["foreseen"], stage
            if stage.startswith(("corpus", "encode", "retrieve", "evaluate")):
                assert facts["forecast"]["bytes"]["ratio"] == pytest.approx(1, abs=0.6), stage
            assert facts["bytes"] == sum(
                (output / "store" / f"{facts['stage']}-{facts['fingerprint']}" / part).stat().st_size
                for part in facts["parts"]
            )

    more = [*settings, "train.max_epochs=1", f"output_dir={tmp_path / 'more'}", f"store={output / 'store'}"]
    adapt(more, dry_run=True)
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for stage in ("corpus", "queries", "encode passages", "retrieve", "score late", "groups"):
        assert lines[stage].split()[-1] == "done"
    assert "done" not in lines["train"] and "done" not in lines["encode passages, adapted"]


def test_a_job_without_a_dry_run_foresees_nothing(
    collection: Path, student_folder: str, tmp_path: Path, ray_local: None
) -> None:
    output = tmp_path / "out"
    settings = small_settings(collection, Path(student_folder), output)
    adapt([*settings, "dataset.max_queries=7"], dry_run=True, until="corpus")
    adapt(settings, dry_run=False, until="corpus")  # another config than was foreseen
    (facts,) = manifests(output)["corpus"]
    assert "forecast" not in facts
    assert "prices" not in json.loads((output / "run.json").read_text())["config"]


def test_writing_queries_needs_no_student_and_no_teacher(
    collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may be large, and far away."""
    settings = [
        *small_settings(collection, tmp_path / "no student", tmp_path / "out"),
        "teacher.kind=cross_encoder", "teacher.model=/no/teacher", "queries.sources=[llm]",
        "llm.model=writer", "llm.engine=endpoint", "llm.url=http://localhost:1/v1",
    ]  # fmt: skip
    job_module("generate").write(job.open_run(load(CONFIG, settings), dry_run=True), None, None)
    out = capsys.readouterr().out
    assert "forecast (rates: " in out and "generate" in out and "encode" not in out
