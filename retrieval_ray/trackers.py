"""Who is told of a run: TensorBoard's event files, MLflow, Weights & Biases.

Each knows the last step that it was told of every curve, so that telling it the whole log again adds what
is new and doubles nothing. Raises whatever its library raises; that no run fails of it is up to the caller.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from retrieval_ray.artifacts import Location
from retrieval_ray.curves import Curves

_EVENTS = "events.out.tfevents."
_AT_ONCE = 500  # metrics of a request to MLflow, which takes 1,000


class Tracker(Protocol):
    """One run, as a tracker sees it."""

    def last(self) -> dict[str, int]:
        """The last step that is known of each curve; a curve that is not known is left out."""
        ...

    def log(self, rows: Curves) -> None: ...

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """The run's results. status: finished | stopped | failed."""
        ...


class TensorBoard:
    """Event files, in a folder on any filesystem: each holds what was new, and is never touched again.

    A file's name tells the last steps that it and those before it hold, so names sort as they were written.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def last(self) -> dict[str, int]:
        names = [name for name in self.folder.names() if name.startswith(_EVENTS)]
        if not names:
            return {}
        train, dev = names[-1].removeprefix(_EVENTS).split(".")
        return {"train": int(train) - 1, "dev": int(dev) - 1}

    def log(self, rows: Curves) -> None:
        if not any(rows.values()):
            return
        from tensorboardX import SummaryWriter

        last = self.last()
        ends = [found[-1].step if (found := rows[name]) else last.get(name, -1) for name in ("train", "dev")]
        with tempfile.TemporaryDirectory() as local:
            with SummaryWriter(local) as writer:
                for row in [*rows["train"], *rows["dev"]]:
                    for name, value in row.values.items():
                        writer.add_scalar(name, value, row.step, walltime=row.time)
            (written,) = Path(local).iterdir()
            # one more than the step, since nothing told is -1
            name = _EVENTS + ".".join(f"{end + 1:010d}" for end in ends)
            (self.folder / name).write(written.read_bytes())

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """TensorBoard shows curves alone."""


class Mlflow:
    """A run of an MLflow tracking server or database.

    uri: of the server (http://...), of a database, or a folder, which gets a ``mlflow.db``. run_id: finds
    the run again. group: others of the same sweep.
    """

    def __init__(
        self,
        uri: str,
        *,
        run_id: str,
        experiment: str,
        name: str,
        group: str | None,
        parameters: Mapping[str, str],
    ) -> None:
        # A server that cannot be reached is given up on soon; the library's own patience is minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        if "://" not in uri:
            uri = _database(os.path.abspath(uri))
        self.client = MlflowClient(tracking_uri=uri)
        known = self.client.get_experiment_by_name(experiment)
        where = known.experiment_id if known else self.client.create_experiment(experiment)
        runs = self.client.search_runs([where], filter_string=f"tags.`retrieval_ray.id` = '{run_id}'")
        tags = {"retrieval_ray.id": run_id} | ({"retrieval_ray.group": group} if group else {})
        run = runs[0] if runs else self.client.create_run(where, run_name=name, tags=tags)
        self.run_id = run.info.run_id
        params = [Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(params), 100):  # what a request takes
            self.client.log_batch(self.run_id, params=params[start : start + 100])

    def last(self) -> dict[str, int]:
        values = self.client.get_run(self.run_id).data.metrics
        return {name: int(values[f"{name}/step"]) for name in ("train", "dev") if f"{name}/step" in values}

    def log(self, rows: Curves) -> None:
        from mlflow.entities import Metric

        waiting: list[Metric] = []
        for name, found in rows.items():
            for row in found:
                if len(waiting) + len(row.values) >= _AT_ONCE:  # a row's values are told together
                    self.client.log_batch(self.run_id, metrics=waiting)
                    waiting = []
                values = {**row.values, f"{name}/step": row.step}
                waiting += [Metric(key, v, int(1000 * row.time), row.step) for key, v in values.items()]
        if waiting:
            self.client.log_batch(self.run_id, metrics=waiting)

    def finish(self, values: Mapping[str, float], status: str) -> None:
        known = self.client.get_run(self.run_id).data.metrics
        for key, value in values.items():
            if known.get(key) != value:  # of a run that ended before and was started again
                self.client.log_metric(self.run_id, key, value)
        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.run_id, states[status])


def _database(folder: str) -> str:
    """The URI of a folder's database, made where there is none, and made whole: a kill may come at any time.

    One process makes it; MLflow itself would have several lay out the same tables.
    """
    from mlflow import MlflowClient

    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "mlflow.db")
    with FileLock(f"{path}.lock"):
        if not os.path.exists(path):
            begun = f"{path}-{os.getpid()}"
            MlflowClient(tracking_uri=f"sqlite:///{begun}").search_experiments()
            os.replace(begun, path)
    return f"sqlite:///{path}"


class Wandb:
    """A run of a Weights & Biases project (``project`` or ``entity/project``); the rest as of ``Mlflow``.

    Where ``WANDB_MODE=offline`` keeps runs on disk, one that goes on is written whole once more under its id.
    folder: for its files, None: the library's own choice.
    """

    def __init__(
        self,
        project: str,
        *,
        run_id: str,
        name: str,
        group: str | None,
        parameters: Mapping[str, str],
        folder: str | None,
    ) -> None:
        import wandb

        entity, _, project = project.rpartition("/")
        self.run: Any = wandb.init(
            project=project,
            entity=entity or None,
            id=run_id,
            name=name,
            group=group,
            config=dict(parameters),
            resume="allow",
            reinit="create_new",  # other runs of this process stay as they are
            dir=folder,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, login_timeout=20),
        )
        for curve in ("train", "dev"):
            self.run.define_metric(f"{curve}/*", step_metric=f"{curve}/step")

    def last(self) -> dict[str, int]:
        values = dict(self.run.summary)
        return {name: int(values[f"{name}/step"]) for name in ("train", "dev") if f"{name}/step" in values}

    def log(self, rows: Curves) -> None:
        for name, found in rows.items():
            for row in found:
                self.run.log({**row.values, f"{name}/step": row.step})

    def finish(self, values: Mapping[str, float], status: str) -> None:
        self.run.summary.update({**values, "status": status})
        self.run.finish(exit_code=1 if status == "failed" else 0)
