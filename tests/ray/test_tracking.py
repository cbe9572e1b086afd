"""What trackers are told of a run, and that no run depends on it."""

import importlib.util
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retrieval_ray.artifacts import Location, Stage, stage
from retrieval_ray.config import Config, TrackingConfig
from retrieval_ray.config_file import load, with_values
from retrieval_ray.curves import Curves
from retrieval_ray.errors import UserError
from retrieval_ray.stages import job, pipeline, tracking
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile

from .conftest import ROOT, small_settings

STEPS = [{"step": n, "lr": 0.5, "loss": 4.0 / n, "seconds": 1.0, "time": 1e9 + n} for n in range(1, 7)]
EPOCHS = [{"epoch": n, "step": 3 * n, "dev_kl": 1.0 / (1 + n)} for n in range(3)]


class Told:
    """A tracker that remembers, for all runs, by their id."""

    made: list[dict[str, Any]]
    rows: dict[str, Curves]
    ended: list[tuple[str, Mapping[str, float], str]]

    def __init__(self, place: str, **facts: Any) -> None:
        self.made.append({"place": place, **facts})
        self.mine = self.rows.setdefault(facts["run_id"], {"train": [], "dev": []})
        self.run_id = facts["run_id"]

    def last(self) -> dict[str, int]:
        return {name: rows[-1].step for name, rows in self.mine.items() if rows}

    def log(self, rows: Curves) -> None:
        for name, new in rows.items():
            self.mine[name] += new

    def finish(self, values: Mapping[str, float], status: str) -> None:
        self.ended.append((self.run_id, values, status))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    class Fresh(Told):
        made, rows, ended = [], {}, []

    monkeypatch.setattr(tracking, "Mlflow", Fresh)
    return Fresh


def context_of(folder: Path, **values: Any) -> Context:
    config = replace(
        Config(),
        output_dir=str(folder / "mine"),
        store=str(folder / "store"),
        tracking=TrackingConfig(mlflow="http://host:5000"),
    )
    profile = Profile("float32", "cpu", 1, 1024, 1)
    return Context(replace(config, **values), Location.of(str(folder / "store")), profile)


def training(context: Context, number: int = 1) -> Stage:
    trained = stage(context.store, "train", {"round": number})
    context.touched[trained.fingerprint] = trained
    return trained


def log(trained: Stage, steps: int, epochs: int) -> None:
    """The log as a checkpoint leaves it."""
    for name, rows in (("steps", STEPS[:steps]), ("epochs", EPOCHS[:epochs])):
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (trained.folder / f"{name}.jsonl").write(text.encode())


def test_a_killed_run_goes_on_where_it_was_told(tmp_path: Path, told: type[Told]) -> None:
    for steps, epochs in [(0, 1), (2, 1), (3, 1), (3, 2), (6, 3)]:
        context = context_of(tmp_path)  # another process
        log(training(context), steps, epochs)
        tracking.tell(context)
        tracking.tell(context)
    tracking.finish(context, {"test/adapted/ndcg_at_10": 0.5})
    ((run_id, rows),) = told.rows.items()
    assert [row.step for row in rows["train"]] == [1, 2, 3, 4, 5, 6]
    assert [row.values["train/loss"] for row in rows["train"]] == [row["loss"] for row in STEPS]
    assert [row.values["train/learning_rate"] for row in rows["train"]] == [0.5 * 2e-4] * 6
    assert [(row.step, row.values) for row in rows["dev"]] == [
        (0, {"dev/kl": 1.0}), (3, {"dev/kl": 0.5}), (6, {"dev/kl": 1 / 3}),
    ]  # fmt: skip
    assert told.ended == [(run_id, {"test/adapted/ndcg_at_10": 0.5}, "finished")]


def test_rounds_follow_each_other(tmp_path: Path, told: type[Told]) -> None:
    context = context_of(tmp_path)
    for number in (1, 2):
        log(training(context, number), 6, 3)
    tracking.finish(context, {})
    (rows,) = told.rows.values()
    assert [row.step for row in rows["train"]] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    assert [row.step for row in rows["dev"]] == [0, 3, 6, 7, 10, 13]  # 7: what round 2 begins with
    names = [path.name.rpartition("-")[0] for path in (tmp_path / "mine/tensorboard").iterdir()]
    assert sorted(names) == ["round-1", "round-2"]


def test_what_a_run_is_called(tmp_path: Path, told: type[Told]) -> None:
    values = {"dataset.path": "ir_datasets:beir/scifact", "train.max_epochs": 3}
    own = with_values(replace(context_of(tmp_path).config, tracking=TrackingConfig()), values)
    plain = context_of(tmp_path, dataset=own.dataset, train=own.train)
    trial = replace(plain, trial="λ=0.1, seed=3", telling={}, touched={}, config=replace(
        plain.config, train=replace(plain.config.train, seed=3), sweep=replace(own.sweep, seeds=2)
    ))  # fmt: skip
    for context in (plain, trial):
        log(training(context), 3, 2)
        tracking.finish(context, {})
    one, other = told.made
    assert one["run_id"] != other["run_id"] and len(told.rows) == 2
    assert (one["place"], one["experiment"]) == ("http://host:5000", "retrieval_ray scifact")
    assert (one["name"], one["group"]) == ("mine", None)
    assert (other["name"], other["group"]) == ("λ=0.1, seed=3", "mine")
    assert one["parameters"] == {"dataset.path": "ir_datasets:beir/scifact", "train.max_epochs": "3"}
    assert other["parameters"] == {**one["parameters"], "train.seed": "3"}
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "mine/tensorboard").iterdir()}
    assert names == {"round-1", "λ=0.1,_seed=3-round-1"}


def test_no_run_fails_of_a_tracker(
    tmp_path: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(self: Told, rows: Curves) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(told, "log", unreachable)
    context = context_of(tmp_path)
    trained = training(context)
    for steps, epochs in [(2, 1), (3, 2)]:
        log(trained, steps, epochs)
        tracking.tell(context)
    tracking.finish(context, {"gain": 0.1})
    assert capsys.readouterr().err == (
        "  warning: MLflow is told no more: ConnectionError: no route to host\n"
    )  # once
    assert list((tmp_path / "mine/tensorboard").glob("*/events*"))  # the others go on


def test_a_log_that_cannot_be_read_fails_no_run(
    tmp_path: Path, told: type[Told], capsys: pytest.CaptureFixture[str]
) -> None:
    context = context_of(tmp_path)
    (training(context).folder / "steps.jsonl").write(b"{half a row")
    with tracking.following(context):
        pass
    tracking.finish(context, {"gain": 0.1})
    assert capsys.readouterr().err.count("warning") == 1 and told.ended[0][1] == {"gain": 0.1}


def test_tracking_is_no_part_of_what_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    profile = Profile("float32", "cpu", 1, 1024, 1)
    files = []
    for more in ({}, {"tracking.mlflow": "http://host:5000", "tracking.wandb": "mine"}):
        config = with_values(Config(), {"output_dir": str(tmp_path / "out"), **more})
        job.open_run(config, profile=profile, dry_run=False)
        files.append((tmp_path / "out/run.json").read_bytes())
        (tmp_path / "out/metrics.json").write_text("{}")  # a finished run, which may be told of later
    assert files[0] == files[1]


@pytest.mark.parametrize("key", ["mlflow", "wandb"])
def test_a_missing_package_is_said_before_any_work(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == key else found(name))
    with pytest.raises(
        UserError, match=rf"tracking.{key}: needs the package {key}: pip install .*\[tracking\]"
    ):
        with_values(Config(), {f"tracking.{key}": "somewhere"})


def test_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config stands in manifests."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="tracking.mlflow: no password or token here") as caught:
        with_values(Config(), {"tracking.mlflow": "http://me:hunter2@host:5000"})
    assert "hunter2" not in str(caught.value)


def test_whoever_was_told_of_a_job_is_told_that_it_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[object, str]] = []
    telling = SimpleNamespace(finish=lambda values, status: seen.append((values, status)))

    def work(context: Context, until: str | None) -> None:
        context.telling["a run"] = telling
        raise UserError("no such thing")

    profile = Profile("float32", "cpu", 1, 1024, 1)
    monkeypatch.setattr(sys, "argv", ["job", str(ROOT / "configs" / "cpu.yaml"), f"output_dir={tmp_path}"])
    with pytest.raises(SystemExit):
        job.main(work, "A job.", enter=lambda config, dry_run: Context(config, Location.of("."), profile))
    assert seen == [({}, "failed")] and "error: no such thing" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_the_curves_of_a_run_are_those_of_its_log(
    ray_local: None, collection: Path, student_folder: str, tmp_path: Path, told: type[Told],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Told while it trains, at its end, and when it is started again, and the same each time."""
    monkeypatch.setattr(tracking, "_SECONDS", 0.05)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name)
    settings = small_settings(collection, Path(student_folder), tmp_path / "run")
    config = load(str(ROOT / "configs" / "cpu.yaml"), [*settings, "tracking.mlflow=http://host:5000"])
    monkeypatch.undo()
    monkeypatch.setattr(tracking, "_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "Mlflow", told)
    for _ in range(2):
        pipeline.run(job.open_run(config, dry_run=False), None)
    (trained,) = (tmp_path / "run/store").glob("train-*")
    facts = json.loads((trained / "fit.json").read_text())
    (rows,) = told.rows.values()
    assert [row.step for row in rows["train"]] == [row["step"] for row in facts["steps"]]
    assert [row.values["train/loss"] for row in rows["train"]] == [row["loss"] for row in facts["steps"]]
    assert [row.values["dev/kl"] for row in rows["dev"]] == [row["dev_kl"] for row in facts["history"]]
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= rows["train"][
        0
    ].values.keys()
    document = json.loads((tmp_path / "run/metrics.json").read_text())
    assert Counter(status for *_, status in told.ended) == {"finished": 2}
    _, values, _ = told.ended[-1]
    assert values["test/base/ndcg_at_10"] == document["systems"]["base"]["ndcg@10"]
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = reading.EventAccumulator(str(events), size_guidance={reading.SCALARS: 0}).Reload()
    losses = [(point.step, pytest.approx(point.value)) for point in shown.Scalars("train/loss")]
    assert losses == [(row["step"], row["loss"]) for row in facts["steps"]]
    assert [point.step for point in shown.Scalars("dev/kl")] == [row["step"] for row in facts["history"]]
    shutil.rmtree(tmp_path / "run/tensorboard")  # a folder of results may be thrown away
    pipeline.run(job.open_run(config, dry_run=False), None)
    assert len(list(events.iterdir())) == 1
