"""A sweep on a small collection: shared stages, what it leaves, failed and stopped trials, a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from omegaconf import OmegaConf

from retrieval_ray.artifacts import Location
from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.stages import job
from retrieval_ray.stages.claims import Claims, Owners
from retrieval_ray.stages.sweep import _known as known_trials
from retrieval_ray.stages.sweep import plans as plans_of
from retrieval_ray.sweeps import space_of

from .conftest import ROOT, job_module, run_job, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LOSS = "loss: {kl: {train.terms.infonce: 0}, infonce: {train.terms.kl: 0}}"
KEYS = ("loss", "gain", "epoch", "test_ndcg@10", "status")


def arguments(
    collection: Path, student: str, output: Path, space: str, *more: str, store: Path | None = None
) -> list[str]:
    """A sweep's file and overrides: trials of one epoch."""
    output.mkdir(exist_ok=True, parents=True)
    file = output / "space.yaml"
    file.write_text(
        f"base: {ROOT / 'configs' / 'cpu.yaml'}\nsweep:\n  question: Which loss?\n  test: all\n  space:\n"
        + "".join(f"    {line}\n" for line in space.splitlines())
    )
    # Of judged dev queries a random student finds none; the teacher's order tells trials apart.
    own = [*small_settings(collection, Path(student), output), "train.max_epochs=1", "dataset.dev_split=null"]
    return [str(file), *own, *([f"store={store}"] if store else []), *more]


def sweep(given: list[str], *, dry_run: bool = False) -> str | None:
    """The job in this process."""
    context = job.open_run(load(given[0], given[1:]), dry_run=dry_run)
    where: str | None = job_module("sweep").sweep_all(context, None)
    return where


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / "leaderboard.parquet").to_pylist()
    return rows


def manifests(output: Path, name: str) -> list[dict[str, Any]]:
    files = sorted((output / "store").glob(f"{name}-*/manifest.json"))
    return [json.loads(path.read_text()) for path in files]


@pytest.fixture(scope="module")
def settings(collection: Path, student_folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three trials: two losses, and one of them with another threshold that makes other lists."""
    space = LOSS.replace("}}", "}, strict: {groups.false_negative_ratio: 0.3}}")
    return arguments(collection, student_folder, tmp_path_factory.mktemp("sweep") / "out", space)


@pytest.fixture(scope="module")
def swept(ray_local: None, settings: list[str]) -> Path:
    where = sweep(settings)
    assert where
    return Path(where).parent


def test_every_point_is_trained_on_what_all_share(swept: Path) -> None:
    rows = rows_of(swept)
    assert {r["loss"] for r in rows} == {"kl", "infonce", "strict"}
    assert [r["status"] for r in rows] == ["done"] * 3 and [r["rank"] for r in rows] == [1, 2, 3]
    assert [r["gain"] for r in rows] == sorted((r["gain"] for r in rows), reverse=True)
    assert (len(manifests(swept, "groups")), len(manifests(swept, "train"))) == (2, 3)
    assert len(manifests(swept, "retrieve")) == 1 + 3  # before training, and of each trained model
    trials = [json.loads(path.read_text()) for path in (swept / "trials").iterdir()]
    calls = [row for trial in trials for row in trial["calls"].values() if row[0] == "score"]
    pairs = sum(m["rows"] for m in manifests(swept, "score-late"))  # the others ask no model
    assert sum(row[1] for row in calls) == 3 * pairs and sum(row[2] for row in calls) == pairs


def test_gains_are_those_of_the_training_that_was_run(swept: Path) -> None:
    fits = [json.loads(path.read_text()) for path in (swept / "store").glob("train-*/fit.json")]
    measure = "teacher_ndcg@10"
    gains = [fit["history"][1][measure] - fit["history"][0][measure] for fit in fits]
    assert [r["gain"] for r in rows_of(swept)] == pytest.approx(sorted(gains, reverse=True))
    assert len(set(gains)) == 3 and {r["measure"] for r in rows_of(swept)} == {measure}


def test_tensorboard_shows_every_trial_by_its_name(swept: Path) -> None:
    folders = {path.name.rpartition("-")[0]: path.name for path in (swept / "tensorboard").iterdir()}
    assert folders.keys() == {f"loss={name}-round-1" for name in ("kl", "infonce", "strict")}
    trained = [path.name.removeprefix("train-")[:8] for path in (swept / "store").glob("train-*")]
    assert sorted(name.rpartition("-")[2] for name in folders.values()) == sorted(trained)
    assert [path.name[:5] for path in (swept / "best" / "tensorboard").iterdir()] == ["round"]


def test_the_page_and_the_test_figures_agree(swept: Path) -> None:
    page, tested = (swept / "sweep.html").read_text(), json.loads((swept / "test.json").read_text())
    assert page.count("<svg") == 4 and "Which loss?" in page  # effect, settings, curves, drift
    rows = {r["loss"]: r for r in rows_of(swept)}
    assert len(tested["settings"]) == 3 and tested["queries"] == 16
    for setting in tested["settings"]:
        row = rows[setting["point"]["loss"]]
        assert setting["candidate"]["ndcg@10"] == pytest.approx(row["test_ndcg@10"])
        assert f"{row['test_ndcg@10']:.4f}" in page
        gain = setting["candidate"]["ndcg@10"] - tested["base"]["ndcg@10"]
        assert setting["candidate"]["delta"] == pytest.approx(gain)
        assert setting["returned"]["ndcg@10"] in (setting["candidate"]["ndcg@10"], tested["base"]["ndcg@10"])
    (kl,) = (s for s in tested["settings"] if s["point"]["loss"] == "kl")  # the first: the reference
    others = [s for s in tested["settings"] if s is not kl]
    assert kl["against_reference"] is None
    for setting in others:
        beside, change = (
            setting["against_reference"],
            setting["candidate"]["ndcg@10"] - kl["candidate"]["ndcg@10"],
        )
        assert beside["delta"] == pytest.approx(change) and beside["p"] <= beside["p_holm"] <= 1


def test_the_best_config_gives_adapt_the_same_run_again(swept: Path) -> None:
    """Everything of it is in the store; its report and model lie in best/."""
    best = OmegaConf.to_container(OmegaConf.load(swept / "best.yaml"))
    assert isinstance(best, dict) and "sweep" not in best
    metrics = json.loads((swept / "best" / "metrics.json").read_text())
    returned, base = (metrics["systems"][system]["ndcg@10"] for system in ("adapted", "base"))
    assert returned in (pytest.approx(rows_of(swept)[0]["test_ndcg@10"]), base)
    again = run_job("adapt", [str(swept / "best.yaml"), "--dry-run"])
    assert again.returncode == 0 and "everything is done already" in again.stdout, again.stderr


def test_a_finished_sweep_runs_no_trial_again(swept: Path, settings: list[str], capfd: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in (swept / "store").glob("*/manifest.json")}
    sweep(settings)
    assert "sweep: 0 trials to run, 3 done already" in capfd.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (swept / "store").glob("*/manifest.json")}


def test_a_dry_run_goes_on_to_the_first_trial_that_is_not_done(
    swept: Path, collection: Path, student_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry_run(space: str, name: str) -> str:
        sweep(
            arguments(collection, student_folder, tmp_path / name, space, store=swept / "store"), dry_run=True
        )
        return capsys.readouterr().out

    assert "everything is done already" in dry_run(LOSS, "done")
    out = dry_run(LOSS.replace("}}", "}, both: {}}"), "open")
    assert "everything is done already" not in out and out.count("run    training on") == 1
    assert out.count("reuse  training on") == 2 and out.count("reuse  retrieval on") == 1


def test_a_trial_of_other_data_is_run_anew(swept: Path, settings: list[str]) -> None:
    """What it would train on by now is not what it was trained on."""
    config = load(settings[0], settings[1:])
    context = job.open_run(config, dry_run=True)
    space, folder = space_of(config.sweep.space), Location.of(str(swept / "trials"))
    assert len(known_trials(context, space, folder)) == 3
    groups = next(path for path in (swept / "store").glob("groups-*/manifest.json"))
    written = groups.read_text()
    try:
        groups.write_text(json.dumps(json.loads(written) | {"content": "other"}))
        left = known_trials(context, space, folder)
    finally:
        groups.write_text(written)
    assert 0 < len(left) < 3
    assert len(known_trials(context, space, folder)) == 3


def test_each_collection_is_swept_alone_and_one_that_fails_stops_no_other(
    swept: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """The one that is there was trained on before, with this very setting: nothing is made again."""
    collections = f"{{gone: {{dataset.path: {tmp_path / 'nowhere'}}}, trade: {{dataset.split: test}}}}"
    space = "loss: {kl: {train.terms.infonce: 0}}"
    more = [f"sweep.collections={collections}"]
    before = sorted(path.name for path in (swept / "store").iterdir())
    with pytest.raises(UserError, match="1 of 2 collections failed: gone"):
        sweep(arguments(collection, student_folder, tmp_path, space, *more, store=swept / "store"))
    (row,) = rows_of(tmp_path / "trade")
    (known,) = (row for row in rows_of(swept) if row["loss"] == "kl")
    assert [row[key] for key in KEYS] == [known[key] for key in KEYS]
    assert sorted(path.name for path in (swept / "store").iterdir()) == before


def test_a_failed_trial_stops_no_other(
    swept: Path, collection: Path, student_folder: str, tmp_path: Path, capfd: Any
) -> None:
    """Of a kind that no query is of no list is left, however often it is tried."""
    space = "kinds: {logged: {}, none: {groups.kinds: [claim]}}"
    more = ["sweep.test=winner"]
    sweep(arguments(collection, student_folder, tmp_path, space, *more, store=swept / "store"))
    done, failed = rows_of(tmp_path)
    assert (done["kinds"], done["status"], failed["kinds"], failed["status"]) == (
        "logged", "done", "none", "failed",
    )  # fmt: skip
    assert "no training list is left" in failed["error"]
    assert "is tried again" not in capfd.readouterr().err
    assert "no training list is left" in (tmp_path / "sweep.html").read_text()


def test_asha_stops_a_trial_and_it_stays_stopped(
    swept: Path, collection: Path, student_folder: str, tmp_path: Path, capfd: Any
) -> None:
    space = "train.learning_rate: [1.0e-3, 1.0e-7]"
    more = ["sweep.test=winner", "train.max_epochs=3", "train.patience=3"]
    more += ["sweep.asha_epochs=1", "sweep.asha_factor=2"]
    given = arguments(collection, student_folder, tmp_path, space, *more, store=swept / "store")
    sweep(given)
    rows = rows_of(tmp_path)
    assert [r["status"] for r in rows] == ["done", "stopped"]
    out, err = capfd.readouterr()
    assert "Number of trials" not in out + err  # Tune's own tables name a folder that is gone
    assert "train.learning_rate=0.001: training on" in err  # what a trial far away works on
    sweep(given)
    assert rows_of(tmp_path) == rows


def test_optuna_searches_and_goes_on(
    swept: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    space = "train.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}"
    more = ["sweep.test=winner", "sweep.search=optuna"]
    given = arguments(collection, student_folder, tmp_path, space, *more, store=swept / "store")
    sweep([*given, "sweep.samples=1"])
    (first,) = rows_of(tmp_path)
    sweep([*given, "sweep.samples=2"])
    rows = rows_of(tmp_path)
    assert len(rows) == 2 and first["trial"] in {r["trial"] for r in rows}
    assert all(1e-5 <= float(r["train.learning_rate"]) <= 1e-3 for r in rows)


def test_a_stage_is_one_runs_at_a_time(ray_local: None) -> None:
    owners = Owners.remote()  # type: ignore[attr-defined]
    one, other = Claims(owners, "one"), Claims(owners, "other")
    one.take("f")
    one.take("f")  # one's own
    other.take("g")
    waiting = owners.take.remote("f", "other")
    assert ray.wait([waiting], timeout=1)[0] == []
    one.give_back("f")
    ray.get(waiting, timeout=10)
    waiting = owners.take.remote("g", "one")
    other.give_back()
    ray.get(waiting, timeout=10)
    one.take("h")
    waiting = owners.take.remote("h", "dead")  # it dies while it waits
    Claims(owners, "dead").give_back()
    ray.get(waiting, timeout=10)
    one.give_back("h")
    one.take("h")  # is nobody's


def test_seeds_are_of_training_alone_and_no_two_points_are_one(settings: list[str]) -> None:
    config = load(settings[0], [*settings[1:], "sweep.seeds=2"])
    plans = plans_of(config, space_of(config.sweep.space))
    assert [plan.config.training_seed() for plan in plans] == [0, 1] * 3
    assert {plan.config.seed for plan in plans} == {0} and len({plan.name for plan in plans}) == 6
    twins = {"k": {"a": {"train.dropout": False}, "b": {}}}
    with pytest.raises(UserError, match="'k=a' and 'k=b' give the same training"):
        plans_of(load(settings[0], settings[1:]), space_of(twins))


def one_of_its_trials(job: int) -> int:
    """The pid of a trial's process of this job."""
    below = psutil.Process(job).children(recursive=True)
    return next(p.pid for p in below if "ImplicitFunc" in "".join(p.cmdline()))


@pytest.mark.chaos
def test_a_killed_sweep_goes_on_to_the_same_leaderboard(
    swept: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """Two at once. First a trial's process dies: it is tried again. Then, with one trial done, all die: that
    one is not run again, and what both share is made once."""
    given = arguments(collection, student_folder, tmp_path, LOSS, "sweep.trials_at_once=2")
    command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), *given]
    log, preempted = tmp_path / "log", 0
    with log.open("w") as said, subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said) as running:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            if not preempted and list((tmp_path / "store").glob("groups-*/manifest.json")):
                preempted = one_of_its_trials(running.pid)
                os.kill(preempted, signal.SIGKILL)
            if list((tmp_path / "trials").glob("*.json")) and "is tried again" in log.read_text():
                break
            assert running.poll() is None, f"it ended before it could be killed: {log.read_text()}"
            time.sleep(0.2)
        running.send_signal(signal.SIGKILL)
    assert preempted and "is tried again" in log.read_text()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").glob("*.json")}
    sweep(given)
    assert written == {path: path.stat().st_mtime_ns for path in written}
    for stage in manifests(tmp_path, "score"):
        assert stage["rows_this_run"] == stage["rows"]
    assert len(manifests(tmp_path, "groups")) == 1
    alone = {tuple(row[key] for key in KEYS) for row in rows_of(swept) if row["loss"] != "strict"}
    assert {tuple(row[key] for key in KEYS) for row in rows_of(tmp_path)} == alone
