"""Curves as trackers keep them: whole after a kill in the middle, and nothing twice."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.artifacts import Location
from retrieval_ray.curves import Curves, Row, after
from retrieval_ray.trackers import Mlflow, TensorBoard, Tracker, Wandb

WHOLE: Curves = {
    "train": [
        Row(n, 1e9 + n, {"train/loss": 4.0 / (1 + n), "train/grad_norm": 0.5 * n}) for n in range(1, 13)
    ],
    "dev": [Row(n, 1e9 + n, {"dev/ndcg_at_10": n / 16}) for n in (0, 6, 12)],
}


def until(step: int, epochs: int) -> Curves:
    """The log as a checkpoint left it."""
    return {"train": [row for row in WHOLE["train"] if row.step <= step], "dev": WHOLE["dev"][:epochs]}


CHECKPOINTS = [(0, 1), (4, 1), (6, 1), (6, 2), (6, 2), (10, 2), (12, 3)]


def tell(tracker: Tracker, log: Curves) -> None:
    tracker.log(after(log, tracker.last()))


def points(curves: Curves) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in [*curves["train"], *curves["dev"]]:
        for name, value in row.values.items():
            found.setdefault(name, []).append((row.step, pytest.approx(value)))
    return found


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads out of a folder."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder), size_guidance={reading.SCALARS: 0})
    events.Reload()
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_log_however_often_it_was_told(tmp_path: Path) -> None:
    for step, epochs in CHECKPOINTS:
        tell(TensorBoard(Location.of(str(tmp_path))), until(step, epochs))  # each time another process
    assert shown(tmp_path) == points(WHOLE)
    assert len(list(tmp_path.iterdir())) == len(set(CHECKPOINTS))


def test_event_files_sort_as_they_were_written(tmp_path: Path) -> None:
    """TensorBoard goes on to the file with the next name."""
    seen: list[str] = []
    for step, epochs in CHECKPOINTS:
        tell(TensorBoard(Location.of(str(tmp_path))), until(step, epochs))
        seen += sorted(set(path.name for path in tmp_path.iterdir()) - set(seen))
    assert seen == sorted(seen)


def test_when_is_when_it_was_computed(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tell(TensorBoard(Location.of(str(tmp_path))), WHOLE)
    events = reading.EventAccumulator(str(tmp_path)).Reload()
    assert [point.wall_time for point in events.Scalars("train/loss")] == [1e9 + n for n in range(1, 13)]


FACTS: dict[str, Any] = {"run_id": "a1b2c3d4", "name": "mine", "group": "lambda", "parameters": {"seed": "1"}}


def test_mlflow_holds_the_log_once_and_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database in a folder; told at every checkpoint by another process, and all of it again at the end."""
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    monkeypatch.chdir(tmp_path)

    def mlflow() -> Mlflow:
        return Mlflow(str(tmp_path / "runs"), experiment="retrieval_ray scifact", **FACTS)

    for step, epochs in CHECKPOINTS:
        tell(mlflow(), until(step, epochs))
    for _ in range(2):  # a finished run may be started again
        tracker = mlflow()
        tell(tracker, WHOLE)
        tracker.finish({"test/adapted/ndcg_at_10": 0.5}, "finished")
    experiment = client.get_experiment_by_name("retrieval_ray scifact")
    (run,) = client.search_runs([experiment.experiment_id])
    for name, expected in points(WHOLE).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((each.step, each.value) for each in history) == expected
        assert {each.timestamp for each in history} <= {1000 * (10**9 + n) for n in range(13)}
    assert len(client.get_metric_history(run.info.run_id, "test/adapted/ndcg_at_10")) == 1
    assert run.info.status == "FINISHED" and run.info.run_name == "mine"
    assert run.data.params == {"seed": "1"} and run.data.tags["retrieval_ray.group"] == "lambda"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # nothing where the job was started


def test_rows_of_many_values_are_told_in_pieces(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    tracker = Mlflow(str(tmp_path), experiment="e", **FACTS)
    rows = [Row(n, 1e9, {f"train/{name}": float(n) for name in range(20)}) for n in range(1, 101)]
    tracker.log({"train": rows, "dev": []})
    assert tracker.last() == {"train": 100}
    assert len(tracker.client.get_metric_history(tracker.run_id, "train/7")) == 100


_OPEN = "import sys; from retrieval_ray.trackers import _database; print(_database(sys.argv[1]))"


@pytest.mark.slow
def test_several_may_open_a_new_folder_at_once_and_one_may_be_killed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "mlflow.db-1").write_bytes(b"half of one")  # what a kill left
    command = [sys.executable, "-c", _OPEN, str(tmp_path)]
    opened = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {each.communicate()[0] for each in opened} == {f"sqlite:///{tmp_path}/mlflow.db\n"}
    assert [each.returncode for each in opened] == [0, 0, 0]
    for name in ("one", "two"):
        tracker = Mlflow(str(tmp_path), experiment="e", **{**FACTS, "run_id": name})
        tracker.log(WHOLE)
        assert tracker.last() == {"train": 12, "dev": 12}


def test_a_server_that_is_not_there_is_given_up_on_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Exception, match=r"localhost|refused|Max retries"):
        Mlflow("http://localhost:9", experiment="e", **FACTS)


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Wandb("team/project", folder=str(tmp_path), **FACTS)
    run = tracker.run
    assert (run.entity, run.project, run.id, run.name, run.group) == (
        "team", "project", "a1b2c3d4", "mine", "lambda",
    )  # fmt: skip
    told = []
    monkeypatch.setattr(run, "log", lambda values, log=run.log: (told.append(values), log(values)))
    for step, epochs in CHECKPOINTS:
        tell(tracker, until(step, epochs))
    train = [{**row.values, "train/step": row.step} for row in WHOLE["train"]]
    assert [values for values in told if "train/step" in values] == train
    assert len(told) == len(WHOLE["train"]) + len(WHOLE["dev"])
    tracker.finish({"test/adapted/ndcg_at_10": 0.5}, "finished")
    wandb.teardown()  # what is left to write is written
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-a1b2c3d4")
    (written,) = folder.glob("*.wandb")
    content = written.read_bytes()
    assert all(name.encode() in content for name in [*points(WHOLE), "test/adapted/ndcg_at_10"])
