"""One training of a sweep: what it is called, and what comes of running its stages."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrieval_ray import sweeps
from retrieval_ray.artifacts import Stage, digest
from retrieval_ray.config import Config, to_dict
from retrieval_ray.config_file import with_values
from retrieval_ray.progress import heard_by
from retrieval_ray.selection import chosen, gain, measure
from retrieval_ray.stages import pipeline
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.context import EXECUTION_KEYS, Context, WouldRun
from retrieval_ray.stages.lists import lists_of
from retrieval_ray.stages.queries import qrels_of
from retrieval_ray.sweeps import Point, Space, Trial

_CALLING = ("generate", "score")  # stages that ask an LLM or a teacher
_NO_MODEL = ("bm25", "dense")  # teachers that only look up what retrieval found
_TRAINING = "train"
_EXECUTION = (*EXECUTION_KEYS, "sweep")


@dataclass(frozen=True)
class Plan:
    """One training to make: a point, its seed, and the config that they give."""

    point: Point
    seed: int
    config: Config

    @classmethod
    def of(cls, config: Config, space: Space, point: Point, seed: int) -> "Plan":
        """Raises ``UserError`` for a point whose config cannot be."""
        return cls(point, seed, with_values(config, {"train.seed": seed, **sweeps.settings(space, point)}))

    @property
    def name(self) -> str:
        """The same for the same config, so that a sweep that goes on knows what is done."""
        return digest({k: v for k, v in to_dict(self.config).items() if k not in _EXECUTION})[:12]

    def label(self) -> str:
        """For a line on the screen."""
        point = sweeps.Setting(self.point, []).name()
        return f"{point}, seed={self.seed}" if self.config.sweep.seeds > 1 else point


def result_of(context: Context, plan: Plan) -> tuple[Trial, bool]:
    """Run the stages up to training; what came of it, and whether its training was run just now.

    The epochs of several rounds are the last one's.
    """
    grouped = pipeline.lists(context)
    assert grouped is not None
    rounds = pipeline.trained(context, grouped)
    trial = Trial(plan.name, plan.point, plan.seed, "untrained", gain=0.0, calls=_calls(context))
    trial = replace(trial, trained=_training(context) or "")
    if not rounds:
        return trial, False
    fits = [(each.folder / "fit.json").read_json() for each in rounds]
    last = fits[-1]
    trial = replace(
        trial,
        status="done",
        gain=sum(_gain(fit) for fit in fits),
        epoch=last["best_epoch"],
        measure=measure(last["history"][0]),
        history=last["history"],
        changes=_changes(fits).tolist(),
        queries=_measured_on(grouped),
    )
    return trial, rounds[-1].fingerprint in context.started


def training_of(context: Context) -> str | None:
    """Which (first) training the context's config leads to with what the store holds; nothing is run.

    Empty where the teacher's gate lets none begin; None where that cannot be told yet.
    """
    walk = context.anew(dry_run=True, quiet=True)
    with heard_by(lambda line: None):
        try:
            grouped = pipeline.lists(walk)
            assert grouped is not None
            pipeline.trained(walk, grouped)
        except WouldRun:
            return _training(walk)
    return _training(walk) or ""


def _training(context: Context) -> str | None:
    """The fingerprint of the first training that was asked for."""
    asked = (key for key, stage in context.touched.items() if stage.name == _TRAINING)
    return next(asked, None)


def _gain(fit: dict[str, Any]) -> float:
    """Of the best trained epoch; none is better than the base model where that would be returned."""
    found = gain(fit["history"], fit["best_epoch"])
    return found if chosen(fit["history"]) else min(0.0, found)


def _changes(fits: list[dict[str, Any]]) -> Any:
    """Of every dev query, to the best trained epochs of all rounds; the last alone where they differ."""
    found = [np.subtract(fit["by_query"][fit["best_epoch"]], fit["by_query"][0]) for fit in fits]
    same = len({len(each) for each in found}) == 1
    return np.sum(found, axis=0) if same else found[-1]


def _measured_on(grouped: list[Grouped]) -> str:
    """The judged dev queries, or, where there are none, the lists held out with the teacher's scores."""
    judged = [sorted(qrels_of(each.queries, "dev")) for each in grouped]
    if any(judged):
        return digest(judged)
    held_out = []
    for each in grouped:
        lists = lists_of(each.groups, "dev")
        held_out.append(
            [list(lists.query_ids), list(lists.passage_ids), np.asarray(lists.teacher_BK).tolist()]
        )
    return digest(held_out)


def _calls(context: Context) -> dict[str, list[Any]]:
    """Of every stage that asks a model: how many answers it holds, and how many this run asked for."""
    found = {}
    for fingerprint, stage in context.touched.items():
        kind, _, teacher = stage.name.partition("-")  # score-late: of the teacher late
        if kind in _CALLING and teacher not in _NO_MODEL:
            found[fingerprint] = [kind, *_asked(stage, fingerprint in context.started)]
    return found


def _asked(stage: Stage, here: bool) -> tuple[int, int]:
    manifest = stage.manifest()
    return int(manifest["rows"]), int(manifest["rows_this_run"]) if here else 0
