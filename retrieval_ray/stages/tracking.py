"""Tells trackers of a run: its training's curves while it trains, its results at the end.

All of it is read from the logs that training leaves at its checkpoints, which no kill takes back: so what is
told is true and told once. Nothing of it decides a result, and no run fails of it: what a tracker cannot be
told is said once.
"""

import json
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from retrieval_ray.artifacts import Location, Stage, digest
from retrieval_ray.config import to_dict
from retrieval_ray.config_file import differences
from retrieval_ray.curves import after, curves, parameters
from retrieval_ray.progress import say
from retrieval_ray.stages.context import EXECUTION_KEYS, Context
from retrieval_ray.trackers import Mlflow, TensorBoard, Tracker, Wandb

_SECONDS = 20.0  # between two looks at a training's log
_NOT_TOLD = (*EXECUTION_KEYS, "sweep")


class Telling:
    """The trackers of one run, opened when there is something to tell."""

    def __init__(self, context: Context) -> None:
        self.output, self.trial = Location.of(context.config.output_dir), context.trial
        self.learning_rate = context.config.train.learning_rate
        self.makers, self.open, self.silenced = _makers(context), dict[str, Tracker](), context.silenced
        self.read: dict[str, tuple[list[Any], int]] = {}  # by training: as its log was, and where it ended

    def training(self, trained: Stage, number: int, start: int) -> int:
        """Tell what is new in the log of a training from step ``start`` on; returns where the next begins."""
        logs = [trained.folder / f"{name}.jsonl" for name in ("steps", "epochs")]
        state = [log.filesystem.get_file_info(log.path) for log in logs]
        known, end = self.read.get(trained.fingerprint, (None, start))
        if state == known:
            return end
        steps, epochs = map(rows_of, logs)
        found = curves(steps, epochs, learning_rate=self.learning_rate, start=start)
        round_name = f"{_plain(self.trial)}-round-{number}" if self.trial else f"round-{number}"
        events = self.output / "tensorboard" / f"{round_name}-{trained.fingerprint[:8]}"
        makers = {f"TensorBoard ({events.url})": lambda: TensorBoard(events), **self.makers}
        self._each(makers, lambda tracker: tracker.log(after(found, tracker.last())))
        # One further: the student that the next round begins with has a place of its own.
        end = max((row.step + 1 for rows in found.values() for row in rows), default=start)
        self.read[trained.fingerprint] = state, end
        return end

    def finish(self, values: Mapping[str, float], status: str) -> None:
        """Tell the results, and close what is open."""
        self._each(self.makers, lambda tracker: tracker.finish(values, status))

    def _each(self, makers: Mapping[str, Callable[[], Tracker]], tell: Callable[[Tracker], None]) -> None:
        for name, make in makers.items():
            if name in self.silenced:
                continue
            try:
                if name not in self.open:
                    self.open[name] = make()
                tell(self.open[name])
            except Exception as error:  # whatever it is: the run goes on
                self.silence(name, error)

    def silence(self, name: str, error: Exception) -> None:
        """Say once that something cannot be told."""
        if name not in self.silenced:
            self.silenced.add(name)
            reason = str(error).strip().partition("\n")[0]
            say(f"  warning: {name} is told no more: {type(error).__name__}: {reason}")


def tell(context: Context) -> None:
    """Tell what is new in the trainings of this run, round by round."""
    telling, start = _telling(context), 0
    trainings = [stage for stage in list(context.touched.values()) if stage.name == "train"]
    for number, trained in enumerate(trainings, start=1):
        try:
            start = telling.training(trained, number, start)
        except Exception as error:  # its log cannot be read: no reason to end a run
            telling.silence(f"what {trained.folder.url} says", error)


@contextmanager
def following(context: Context) -> Iterator[None]:
    """Tell of the training meanwhile, and once more when it has ended, however it did."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_SECONDS):
            tell(context)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        tell(context)


def finish(context: Context, values: Mapping[str, float], status: str = "finished") -> None:
    """Tell the rest of the curves, and the results. status: finished | stopped | failed."""
    tell(context)
    _telling(context).finish(values, status)
    del context.telling[_identity(context)]


def failed(context: Context) -> None:
    """Tell whoever was told of this run that it came to no good end."""
    for telling in context.telling.values():
        telling.finish({}, "failed")


def _telling(context: Context) -> Telling:
    identity = _identity(context)
    if identity not in context.telling:
        context.telling[identity] = Telling(context)
    found: Telling = context.telling[identity]
    return found


def _identity(context: Context) -> str:
    """What this run is: the same when it goes on."""
    return digest({key: value for key, value in to_dict(context.config).items() if key not in _NOT_TOLD})[:12]


def _makers(context: Context) -> dict[str, Callable[[], Tracker]]:
    """How each tracker that the config asks for is made."""
    tracking, identity = context.config.tracking, _identity(context)
    output = Location.of(context.config.output_dir)
    folder = output.path.rpartition("/")[2]
    told = {key: value for key, value in differences(context.config).items() if key not in _NOT_TOLD}

    def facts() -> dict[str, Any]:
        return {
            "run_id": _run_id(output / "tracking" / f"{identity}.json"),
            "name": context.trial or folder,
            "group": folder if context.trial else None,
            "parameters": parameters(told),
        }

    makers: dict[str, Callable[[], Tracker]] = {}
    if (uri := tracking.mlflow) is not None:
        makers["MLflow"] = lambda: Mlflow(uri, experiment=_experiment(context), **facts())
    if (project := tracking.wandb) is not None:
        place = output.path if output.is_local else None
        makers["Weights & Biases"] = lambda: Wandb(project, folder=place, **facts())
    return makers


def _experiment(context: Context) -> str:
    names = [dataset.path.rstrip("/").rpartition("/")[2] for dataset in context.config.corpora()]
    return f"retrieval_ray {' '.join(names)}"


def _run_id(record: Location) -> str:
    """By which trackers know the run again; drawn once, so that no two output folders share one."""
    if not record.exists():
        record.write_json({"id": uuid.uuid4().hex})
    return str(record.read_json()["id"])


def rows_of(log: Location) -> list[dict[str, float]]:
    """The rows of a log of training; none where it is not there."""
    return [json.loads(line) for line in log.read().splitlines()] if log.exists() else []


def _plain(label: str) -> str:
    """A trial's label as the name of a folder."""
    return "".join(letter if letter.isalnum() or letter in "=.,-_+" else "_" for letter in label)[:100]
