"""Everything a user can get wrong ends with exit code 2 and one readable message."""

import errno
import json
import sys
from pathlib import Path

import pytest

from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.stages import job

from .conftest import ROOT, job_module, run_job, small_settings

pytestmark = [pytest.mark.ray]


@pytest.fixture()
def beir(tmp_path: Path) -> Path:
    """A folder with 12 passages and 2 judged queries, to be spoilt by a test."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"p{n}", "title": "", "text": f"passage number {n} on ba co di"} for n in range(12)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "ba co"}\n{"_id": "q2", "text": "di"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp2\t1\n")
    return folder


def fails(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the job's own command line in this process; returns its message."""
    module = job_module("adapt")
    monkeypatch.setattr(sys, "argv", ["adapt.py", str(ROOT / "configs" / "cpu.yaml"), *arguments])
    with pytest.raises(SystemExit) as stop:
        job.main(module.adapt, "")
    said = capsys.readouterr()
    assert stop.value.code == 2, said.err
    message = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "Traceback" not in said.err
    return message[0]


def test_unknown_key_names_the_nearest(monkeypatch, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    message = fails(["train.learning_rat=1"], monkeypatch, capsys)
    assert "train.learning_rat" in message and "train.learning_rate" in message


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        ("missing folder", "no folder"),
        ("bad json", "corpus.jsonl, line 3"),
        ("duplicate id", "stands already at"),
        ("empty id", "empty id"),
        ("empty corpus", "corpus is empty"),
        ("unknown qrels", "no query with a relevant passage"),
        ("no split", "has no split 'test'"),
        ("too small", "fewer than groups.list_size"),
    ],
)
def test_bad_data(spoil, expected, beir, tmp_path, student_folder, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    corpus = beir / "corpus.jsonl"
    lines = corpus.read_text().splitlines()
    if spoil == "bad json":
        lines[2] = lines[2][:-5]
    elif spoil == "duplicate id":
        lines.append(lines[0])
    elif spoil == "empty id":
        lines[4] = '{"_id": "", "text": "x"}'
    elif spoil == "empty corpus":
        lines = []
    elif spoil == "too small":
        lines = lines[:5]
    corpus.write_text("\n".join(lines) + "\n")
    if spoil == "unknown qrels":
        (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tnowhere\t1\nq9\tp1\t1\n")
    if spoil == "no split":
        (beir / "qrels" / "test.tsv").unlink()
    path = tmp_path / "nowhere" if spoil == "missing folder" else beir
    settings = [f"dataset.path={path}", f"student.model={student_folder}", f"output_dir={tmp_path / 'out'}"]
    message = fails([*settings, "compute.precision=float32"], monkeypatch, capsys)
    assert expected in message


def test_output_of_another_run(beir, tmp_path, student_folder, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    settings = [f"dataset.path={beir}", f"student.model={student_folder}", f"output_dir={tmp_path / 'out'}"]
    settings.append("compute.precision=float32")
    job.open_run(load(str(ROOT / "configs" / "cpu.yaml"), [*settings, "seed=1"]), dry_run=False)
    job.open_run(load(str(ROOT / "configs" / "cpu.yaml"), [*settings, "seed=3"]), dry_run=False)
    (tmp_path / "out" / "metrics.json").write_text("{}")  # from here on there is something to lose
    job.open_run(load(str(ROOT / "configs" / "cpu.yaml"), [*settings, "seed=3"]), dry_run=False)
    message = fails([*settings, "seed=2"], monkeypatch, capsys)
    assert "another run's results" in message and "(different: seed)" in message


@pytest.mark.parametrize("key", ["output_dir", "store"])
@pytest.mark.parametrize(
    ("place", "dry_run", "expected"),
    [
        ("{}/file", False, "is a file, not a folder"),
        ("{}/file", True, "is a file, not a folder"),
        ("{}/file/below", False, "Not a directory"),
        ("foo://bar", False, "Unrecognized filesystem"),
        ("foo://bar", True, "Unrecognized filesystem"),
    ],
)
def test_what_cannot_be_a_folder(  # type: ignore[no-untyped-def]
    key, place, dry_run, expected, beir, tmp_path, student_folder, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("something else")
    settings = [f"dataset.path={beir}", f"student.model={student_folder}", "compute.precision=float32"]
    settings += [f"output_dir={tmp_path / 'out'}", f"{key}={place.format(tmp_path)}"]
    message = fails([*settings, *(["--dry-run"] if dry_run else [])], monkeypatch, capsys)
    assert message.startswith(f"error: {key}: ") and place.format(tmp_path) in message
    assert expected in message


def test_a_model_folder_without_a_model(beir, tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    settings = [f"dataset.path={beir}", f"student.model={beir}", f"output_dir={tmp_path / 'out'}"]
    message = fails([*settings, "compute.precision=float32"], monkeypatch, capsys)
    assert f"no model in the folder '{beir}'" in message


def test_what_may_not_be_read_or_written_is_named() -> None:
    """Also where a whole filesystem is read-only, as mounts in containers often are."""
    denied = PermissionError(errno.EACCES, "Permission denied", "/data/corpus.jsonl")
    assert "not permitted: " in str(job.explain(denied)) and "corpus.jsonl" in str(job.explain(denied))
    read_only = OSError(errno.EROFS, "Read-only file system", "/mnt/run.json")
    assert "not permitted: " in str(job.explain(read_only)) and "run.json" in str(job.explain(read_only))


def test_too_few_resources(collection, tmp_path, student_folder, ray_local, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    settings = small_settings(collection, Path(student_folder), tmp_path / "out")
    message = fails([*settings, "compute.workers=40"], monkeypatch, capsys)
    assert "42 CPU" in message and "compute.workers" in message


@pytest.mark.slow
def test_what_a_worker_finds_wrong(  # type: ignore[no-untyped-def]
    collection, tmp_path, student_folder, make_cross_encoder, ray_local, monkeypatch, capsys
) -> None:
    """Raised in an actor, wrapped by Ray, still one message."""
    settings = small_settings(collection, Path(student_folder), tmp_path / "out")
    teacher = ["teacher.kind=cross_encoder", f"teacher.model={make_cross_encoder(2)}"]
    message = fails([*settings, *teacher], monkeypatch, capsys)
    assert "has 2 outputs; a teacher needs one" in message


def test_disk_full_is_told_apart_from_a_fault_of_ours() -> None:
    """Whether raised here or inside a Ray worker; anything unknown keeps its traceback."""
    assert "disk full" in str(job.explain(OSError(28, "No space left on device")))
    wrapped = RuntimeError("task failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert "disk full" in str(job.explain(wrapped))
    assert job.explain(UserError("what, where, what to do")) == "what, where, what to do"
    assert job.explain(ValueError("a bug")) is None


@pytest.mark.slow
def test_as_a_user_sees_it(tmp_path: Path) -> None:
    """The real command: exit code 2, one line, no traceback."""
    done = run_job(
        "adapt", ["configs/cpu.yaml", f"dataset.path={tmp_path / 'none'}", f"output_dir={tmp_path}"]
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: dataset.path: no folder")


def test_a_dry_run_writes_its_forecast_alone(
    collection, student_folder, tmp_path, monkeypatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    output = tmp_path / "out"
    settings = small_settings(collection, Path(student_folder), output)
    arguments = ["adapt.py", str(ROOT / "configs" / "cpu.yaml"), *settings, "--dry-run"]
    monkeypatch.setattr(sys, "argv", arguments)
    job.main(job_module("adapt").adapt, "")
    plan = capsys.readouterr().out
    assert "run    corpus" in plan and "640 passages" in plan and "at most 80 queries" in plan
    assert "1,600 pairs" in plan  # (48 + 16 + 16) queries x teacher.depth 20
    assert [path.name for path in output.rglob("*")] == ["forecast.json"]
