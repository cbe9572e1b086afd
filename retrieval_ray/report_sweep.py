"""A sweep's page: what was asked, what the trials answer, and how sure that is."""

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrieval_ray import plots_sweep, report_drift, sweeps
from retrieval_ray.markup import cells, document
from retrieval_ray.metrics import Difference
from retrieval_ray.sweeps import Choices, Level, Setting, Space, Trial

_SHOWN = 50  # settings in the table; the leaderboard's file has them all
_CLEAR = 0.05


@dataclass(frozen=True)
class OnTest:
    """What a setting is worth on the test split. nDCG@10 is the mean over its seeds; p is Holm-adjusted."""

    ndcg: float
    difference: Difference  # to the base model, over queries
    returned: int  # of how many seeds the trained model was returned, not the base


def page(
    name: str,
    question: str | None,
    space: Space,
    trials: Sequence[Trial],
    reference: Mapping[str, str],
    *,
    base: float,
    tested: Mapping[str, OnTest],
    drifts: Mapping[str, Mapping[str, Any]],
    judged: bool,
) -> str:
    """The page as one HTML document; pictures are inline SVG, nothing is loaded.

    base: nDCG@10 of the base model on the test split. tested, drifts: by a setting's name. judged: whether
    there are judged dev queries.
    """
    settings = sweeps.ranked(trials)
    effects = sweeps.effects(space, trials, reference)
    answers = "".join(f"<p>{html.escape(line)}</p>" for line in answer(settings, effects))
    parts = [
        f"<h1>{html.escape(question or 'Which setting is best?')}</h1>",
        f"<p class='note'>{html.escape(name)}: {_count(trials)}. Gain is the rise of "
        f"{_measure(judged)} from the untouched student to the best trained epoch. Intervals are 95 %, over "
        "dev queries: how sure a gain is on other queries, not with other seeds. The first of many is partly "
        "lucky: of its gain expect less.</p>",
        f"<div class='verdict'>{answers}</div>",
        *(plots_sweep.effect(each, levels) for each, levels in effects.items()),
        *(
            plots_sweep.against(each, parameter, trials)
            for each, parameter in space.items()
            if not isinstance(parameter, Choices)
        ),
        "<h2>All settings</h2>",
        _table(settings, tested, base),
        plots_sweep.parallel(space, settings) if _finite(settings) else "",
        plots_sweep.curves(settings),
        _drifted(drifts),
        _saved(trials),
        _failed(trials),
    ]
    return document(question or name, "".join(parts))


def answer(settings: Sequence[Setting], effects: Mapping[str, Sequence[Level]]) -> list[str]:
    """What the trials say, in words: the best setting, then each parameter's levels against its reference."""
    best = settings[0]
    if not math.isfinite(best.gain):
        return ["No setting was trained to its end."]
    found = sweeps.gain_of(best.trials)
    lines = []
    if not sweeps.comparable([trial for setting in settings for trial in setting.trials]):
        lines.append(
            "These settings were not measured on the same dev queries, so the order below says little: give "
            "judged ones (dataset.dev_split)."
        )
    lines += [f"Best on dev queries: {best.name()}, gain {best.gain:+.4f}" + _interval(found) + "."]
    untrained = sum(trial.status == "untrained" for setting in settings for trial in setting.trials)
    if untrained:
        lines.append(
            f"{untrained} trials trained nothing, because the teacher is not better than the student on "
            "judged dev queries (the gate); teacher.gate=false trains all the same."
        )
    if best.gain <= 0 and not all(trial.status == "untrained" for trial in best.trials):
        lines.append("No setting beats the untouched student on the dev queries: the base model is kept.")
    for name, levels in effects.items():
        lines += _differences(name, levels)
    return lines


def _differences(name: str, levels: Sequence[Level]) -> list[str]:
    known = [level for level in levels if level.against is not None]
    if not known:
        return []
    reference = next((level.label for level in levels if level.against is None), "")
    clear = [level for level in known if level.against and level.against.p < _CLEAR]
    if not clear:
        return [f"{name}: no level differs clearly from {reference} on these dev queries."]
    told = "; ".join(
        f"{level.label} {level.against.mean:+.4f}{_interval(level.against)}, p = {level.against.p:.2g}"
        for level in clear
        if level.against
    )
    others = " The others do not differ clearly." if len(clear) < len(known) else ""
    return [f"{name}, against {reference}: {told}.{others}"]


def _interval(found: Difference | None) -> str:
    return f" (95 % interval {found.low:+.4f} to {found.high:+.4f})" if found else ""


def _measure(judged: bool) -> str:
    if judged:
        return "nDCG@10 on the judged dev queries"
    return (
        "nDCG@10 against the teacher's own order on the lists held out (there are no judged dev queries, so "
        "settings that change the teacher, or which lists there are, cannot be compared by it)"
    )


def _count(trials: Sequence[Trial]) -> str:
    states = Counter(trial.status for trial in trials)
    return f"{len(trials)} trials, " + ", ".join(f"{count} {state}" for state, count in states.items())


def _finite(settings: Sequence[Setting]) -> bool:
    return any(math.isfinite(setting.gain) for setting in settings)


def _table(settings: Sequence[Setting], tested: Mapping[str, OnTest], base: float) -> str:
    """The settings, best first. Test figures only where they were measured."""
    rows: list[list[str]] = []
    for setting in settings[:_SHOWN]:
        interval, seen = sweeps.gain_of(setting.trials), tested.get(setting.name())
        rows.append(
            [
                setting.name(),
                f"{setting.gain:+.4f}" if math.isfinite(setting.gain) else "–",
                f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else "–",
                ", ".join(str(trial.epoch) for trial in setting.trials),
                "/".join(sorted({trial.status for trial in setting.trials})),
                *(_tested(seen, len(setting.trials)) if tested else []),
            ]
        )
    head = ["setting", "gain (dev)", "95 % interval", "epoch", "status"]
    note = ""
    if tested:
        head += ["nDCG@10 (test)", "against base", "p (Holm)", "returned"]
        note = (
            f"<p class='note'>The base model has nDCG@10 {base:.4f} on the test split, which had no part in "
            "the choice. The trained model is measured also where the run would return the base.</p>"
        )
    return f"<div class=wide>{cells(head, rows, marked=settings[0].name())}</div>{note}"


def _tested(seen: OnTest | None, seeds: int) -> list[str]:
    if seen is None:
        return ["–", "–", "–", "–"]
    d = seen.difference
    return [
        f"{seen.ndcg:.4f}",
        f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})",
        f"{d.p:.2g}",
        f"{seen.returned} of {seeds}",
    ]


def saved_lines(trials: Sequence[Trial]) -> list[str]:
    """How many calls of models the shared store saved."""
    lines = []
    for stage, what in (("generate", "LLM calls"), ("score", "pairs for the teacher")):
        needed, made = sweeps.saved(trials, stage)
        if needed:
            lines.append(f"{what}: {needed:,} needed by the trials, {made:,} made, {needed - made:,} saved")
    return lines


def _drifted(drifts: Mapping[str, Mapping[str, Any]]) -> str:
    if not drifts:
        return ""
    return "<h2>What training did to the vectors</h2>" + report_drift.comparison(drifts)


def _saved(trials: Sequence[Trial]) -> str:
    return "".join(f"<p class='note'>{line}</p>" for line in saved_lines(trials))


def _failed(trials: Sequence[Trial]) -> str:
    rows: list[Any] = [
        [sweeps.Setting(trial.point, []).name(), trial.error] for trial in trials if trial.status == "failed"
    ]
    return "<h2>Failed</h2>" + cells(["setting", "why"], rows, marked="") if rows else ""
