"""What a sweep tries, and what its trials say: points of a space, effects of its parameters, the winner.

A parameter is a list of values of one config key; or a mapping of names to settings of any keys; or a range
``{low, high}``, optionally ``log``. A point names a label or a number for each parameter.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_ray.artifacts import digest
from retrieval_ray.errors import UserError
from retrieval_ray.metrics import Difference, holm, paired_difference

Point = dict[str, Any]
Changes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, whole ones where both ends are; log: evenly over their logarithms."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def draw(self, rng: random.Random) -> float:
        """A number of the range, the ends included."""
        if self.whole and not self.log:
            return rng.randint(int(self.low), int(self.high))
        if not self.log:
            return rng.uniform(self.low, self.high)
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return round(value) if self.whole else value


@dataclass(frozen=True)
class Choices:
    """What each label sets: config keys with dots, and their values."""

    settings: dict[str, dict[str, Any]]


Space = dict[str, Range | Choices]


def space_of(given: Mapping[str, Any]) -> Space:
    """The space that ``sweep.space`` says. Raises ``UserError`` for what is none of the three forms."""
    if not given:
        raise UserError("sweep.space: name at least one parameter, like train.learning_rate: [1e-5, 1e-4]")
    return {name: _parameter(name, value) for name, value in given.items()}


def _parameter(name: str, given: Any) -> Range | Choices:
    if isinstance(given, list) and given:
        found = {label(value): {name: value} for value in given}
        if len(found) < len(given):
            raise UserError(f"sweep.space.{name}: a value stands there twice")
        return Choices(found)
    if isinstance(given, dict) and {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
        low, high, log = given["low"], given["high"], bool(given.get("log"))
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high))
        if not numbers or not low < high or (log and low <= 0):
            raise UserError(
                f"sweep.space.{name}: low must be a number less than high, and more than 0 with log: true"
            )
        return Range(low, high, log)
    if isinstance(given, dict) and given and all(isinstance(v, dict) for v in given.values()):
        return Choices({str(key): dict(settings) for key, settings in given.items()})
    raise UserError(
        f"sweep.space.{name}: give a list of values, or {{low: .., high: ..}}, or names with what each sets, "
        "like {kl: {train.terms.infonce: 0}}"
    )


def holds(space: Space, point: Point) -> bool:
    """Whether a point is one of this space."""
    return point.keys() == space.keys() and all(
        str(point[name]) in parameter.settings
        if isinstance(parameter, Choices)
        else parameter.low <= float(point[name]) <= parameter.high
        for name, parameter in space.items()
        if name in point
    )


def label(value: Any) -> str:
    """How a value is written in tables and pictures."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "+".join(map(label, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def points(space: Space, search: str, samples: int, seed: int) -> list[Point]:
    """Every point of a grid, or ``samples`` draws without those that repeat another.

    Raises ``UserError`` for a grid over a range.
    """
    if search == "grid":
        for name, parameter in space.items():
            if isinstance(parameter, Range):
                raise UserError(
                    f"sweep.space.{name}: a grid needs a list of values; a range is for "
                    "sweep.search=random or optuna"
                )
        labels = [list(p.settings) for p in space.values() if isinstance(p, Choices)]
        return [dict(zip(space, each, strict=True)) for each in itertools.product(*labels)]
    rng = random.Random(seed)
    found: dict[str, Point] = {}
    for _ in range(samples):
        point: Point = {
            name: p.draw(rng) if isinstance(p, Range) else rng.choice(list(p.settings))
            for name, p in space.items()
        }
        found.setdefault(digest(point), point)
    return list(found.values())


def settings(space: Space, point: Point) -> dict[str, Any]:
    """The config keys that a point sets, with their values; a later parameter's setting counts."""
    found: dict[str, Any] = {}
    for name, chosen in point.items():
        parameter = space[name]
        found |= {name: chosen} if isinstance(parameter, Range) else parameter.settings[chosen]
    return found


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    gain: of its best trained epoch over the untouched student, by the dev measure that chooses, of all rounds
    together; at most 0 where a run would return the base model. changes: the same by dev query. queries: a
    key of which these are, and of what they are measured against.
    """

    name: str
    point: Point
    seed: int
    status: str  # done | stopped, by ASHA | failed | untrained, for the teacher's gate
    gain: float = math.nan
    epoch: int = 0
    measure: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    queries: str = ""
    seconds: float = 0.0
    error: str = ""
    trained: str = ""  # the fingerprint of its (first) training; none where the gate did not pass
    # of its stages that call a model, by fingerprint: [stage, rows, rows that this trial made]
    calls: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A point with the trials of all its seeds."""

    point: Point
    trials: list[Trial]

    @property
    def gain(self) -> float:
        """The mean over seeds; minus infinity where one of them has none, or was stopped."""
        ended = all(trial.status in ("done", "untrained") for trial in self.trials)
        return float(np.mean([trial.gain for trial in self.trials])) if ended else -math.inf

    def name(self) -> str:
        """``train.terms.clp=0.1, train.moe.experts=2``."""
        return ", ".join(f"{key}={label(value)}" for key, value in self.point.items())


def ranked(trials: Iterable[Trial]) -> list[Setting]:
    """Settings, the best first; equal ones in the order of their trials."""
    found: dict[str, Setting] = {}
    for trial in trials:
        found.setdefault(digest(trial.point), Setting(trial.point, [])).trials.append(trial)
    return sorted(found.values(), key=lambda each: -each.gain)


def gain_of(trials: Sequence[Trial]) -> Difference | None:
    """The gain of some trials together, with its interval over dev queries; None where none has any.

    The changes of a query are averaged over trials; where trials have other dev queries, as where the lists
    that are held out differ, all their queries count as one sample.
    """
    known = [trial for trial in trials if trial.changes]
    if not known:
        return None
    together = _together(known)
    return paired_difference(np.zeros(len(together)).tolist(), together.tolist())


@dataclass(frozen=True)
class Level:
    """One label of a parameter. against: the difference to the parameter's reference; None for itself, or
    where the dev queries are not the same. p is Holm-adjusted over the parameter's levels."""

    label: str
    trials: int
    gain: Difference
    against: Difference | None


def comparable(trials: Iterable[Trial]) -> bool:
    """Whether all that were measured were measured on the same dev queries."""
    return len({trial.queries for trial in trials if trial.changes}) <= 1


def reference_point(space: Space, told: Mapping[str, str]) -> dict[str, str]:
    """The label of each parameter with labels that others are compared with: as told, else its first."""
    labelled = {name: parameter for name, parameter in space.items() if isinstance(parameter, Choices)}
    return {name: told.get(name, next(iter(each.settings))) for name, each in labelled.items()}


def effects(space: Space, trials: Sequence[Trial], reference: Mapping[str, str]) -> dict[str, list[Level]]:
    """The main effect of every parameter with labels: what the trials of each level gained on average.

    reference: the label of each parameter that others are compared with; else its first.
    """
    found = {}
    against = reference_point(space, reference)
    for name, parameter in space.items():
        if isinstance(parameter, Choices):
            levels = _levels(name, list(parameter.settings), trials, against[name])
            if levels:
                found[name] = levels
    return found


def _levels(name: str, labels: Sequence[str], trials: Sequence[Trial], reference: str) -> list[Level]:
    of = {each: [t for t in trials if t.changes and str(t.point[name]) == each] for each in labels}
    of = {each: own for each, own in of.items() if own}
    together = {each: _together(own) for each, own in of.items()}
    base = together.get(reference)
    against: dict[str, Difference] = {}
    for each, change in together.items():
        if each != reference and base is not None and comparable([*of[reference], *of[each]]):
            against[each] = paired_difference(base.tolist(), change.tolist())
    adjusted = holm({each: difference.p for each, difference in against.items()})
    zeros = {each: np.zeros(len(change)).tolist() for each, change in together.items()}
    return [
        Level(
            each,
            len(of[each]),
            paired_difference(zeros[each], change.tolist()),
            Difference(d.mean, d.low, d.high, adjusted[each]) if (d := against.get(each)) else None,
        )
        for each, change in together.items()
    ]


def _together(trials: Sequence[Trial]) -> Changes:
    changes = [np.asarray(trial.changes, dtype=np.float64) for trial in trials]
    if comparable(trials):
        return np.asarray(np.mean(np.stack(changes), axis=0), dtype=np.float64)
    return np.concatenate(changes)


def saved(trials: Iterable[Trial], stage: str) -> tuple[int, int]:
    """Calls of a model that the trials would have made each for itself, and those that were made."""
    rows = [row for trial in trials for row in trial.calls.values() if row[0] == stage]
    return sum(row[1] for row in rows), sum(row[2] for row in rows)


def leaderboard(space: Space, trials: Sequence[Trial], tested: Mapping[str, float]) -> pa.Table:
    """One row a trial, those of the best setting first. tested: nDCG@10 on the test split by trial's name."""
    rows = []
    for rank, setting in enumerate(ranked(trials), start=1):
        for trial in setting.trials:
            interval = gain_of([trial])
            row: dict[str, Any] = {
                "rank": rank,
                "trial": trial.name,
                **{name: label(trial.point[name]) for name in space},
                "seed": trial.seed,
                "status": trial.status,
                "gain": None if math.isnan(trial.gain) else trial.gain,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "measure": trial.measure,
                "epoch": trial.epoch,
                "test_ndcg@10": tested.get(trial.name),
                "seconds": trial.seconds,
                "error": trial.error,
            }
            rows.append(row)
    texts = {*space, "trial", "status", "measure", "error"}
    whole = {"rank", "seed", "epoch"}
    columns = list(rows[0]) if rows else []
    schema = pa.schema(
        [(c, pa.string() if c in texts else pa.int64() if c in whole else pa.float64()) for c in columns]
    )
    return pa.Table.from_pylist(rows, schema=schema)
