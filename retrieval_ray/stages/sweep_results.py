"""What a sweep leaves in its output folder: leaderboard, page, the best config, and that config's own run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from retrieval_ray import report_sweep, sweeps
from retrieval_ray.artifacts import Location, under
from retrieval_ray.config_file import differences
from retrieval_ray.errors import UserError
from retrieval_ray.metrics import Difference, holm, paired_difference
from retrieval_ray.progress import say
from retrieval_ray.report_sweep import OnTest
from retrieval_ray.stages import drift, job, pipeline, train
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.evaluate import values_of
from retrieval_ray.stages.trial import Plan
from retrieval_ray.sweeps import Setting, Space, Trial

_METRIC = "ndcg@10"
PerQuery = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """nDCG@10 per test query of one trial's systems.

    returned: whether a run would return the trained model. A trial that trained nothing has the base model as
    its candidate.
    """

    systems: dict[str, PerQuery]
    returned: bool
    drift: dict[str, Any] | None  # what training did to vectors, see stages/drift.py; of the first corpus


def write(context: Context, space: Space, trials: list[Trial]) -> Location:
    """Write everything; returns where the leaderboard lies.

    The test split is measured of the winner alone, which is chosen on dev queries, or of every setting where
    ``sweep.test=all``. Raises ``UserError`` where no setting was trained to its end.
    """
    config, output = context.config, Location.of(context.config.output_dir)
    settings = sweeps.ranked(trials)
    best = settings[0]
    if not math.isfinite(best.gain):
        reasons = sorted({trial.error for trial in trials if trial.error}) or ["all were stopped"]
        raise UserError(f"sweep: no setting was trained to its end: {'; '.join(reasons[:3])}")
    chosen = settings if config.sweep.test == "all" else [best]
    chosen = [setting for setting in chosen if math.isfinite(setting.gain)]
    measured = {
        trial.name: _measured(context, space, trial) for setting in chosen for trial in setting.trials
    }
    tested = _tested(chosen, measured)
    base = _base(measured)
    values = {name: _mean(each.systems["candidate"]) for name, each in measured.items()}
    page = report_sweep.page(
        output.path.rpartition("/")[2],
        config.sweep.question,
        space,
        trials,
        config.sweep.reference,
        base=base,
        tested=tested,
        drifts=_drifts(chosen, measured),
        judged=best.trials[0].measure != "teacher_ndcg@10",
    )
    (output / "sweep.html").write(page.encode())
    against = sweeps.reference_point(space, config.sweep.reference)
    (output / "test.json").write_json(document(chosen, measured, tested, against))
    (output / "leaderboard.parquet").write_table(sweeps.leaderboard(space, trials, values))
    _show(settings, tested)
    for line in report_sweep.saved_lines(trials):
        say(line)
    _run_best(context, space, best, output)
    say(f"page: {(output / 'sweep.html').url}, best config: {(output / 'best.yaml').url}")
    return output / "leaderboard.parquet"


def _run_best(context: Context, space: Space, best: Setting, output: Location) -> None:
    """The best setting as a config that ``jobs/adapt.py`` takes, and that run's results in ``best/``.

    Of several seeds the first: a seed is not chosen.
    """
    trial = best.trials[0]
    config = replace(
        Plan.of(context.config, space, trial.point, trial.seed).config,
        sweep=type(context.config.sweep)(),
        output_dir=under(context.config.output_dir, "best"),
        store=context.store_url(),
    )
    text = f"# Found by a sweep: {best.name()}. Takes what it can from the sweep's store.\n"
    (output / "best").remove()  # of a sweep that went on another setting may have been the best
    (output / "best.yaml").write((text + OmegaConf.to_yaml(differences(config))).encode())
    pipeline.run(job.open_run(config, profile=context.profile, dry_run=False), None)


def _measured(context: Context, space: Space, trial: Trial) -> Measured:
    """Encode, search and measure with a trial's model; all before is in the store."""
    config = Plan.of(context.config, space, trial.point, trial.seed).config
    own = context.anew(config=config, quiet=True)
    grouped = pipeline.lists(own)
    assert grouped is not None
    rounds = pipeline.trained(own, grouped)
    outcomes = [pipeline.evaluated(own, each, rounds) for each in grouped]
    systems: dict[str, PerQuery] = {}
    for each, outcome in zip(grouped, outcomes, strict=True):
        for system, rows in values_of(outcome.evaluated).items():
            found = systems.setdefault(system, {})
            found |= {f"{each.name}/{query}": values[_METRIC] for query, values in rows.items()}
    systems.setdefault("candidate", systems["base"])
    drifted = outcomes[0].drifted
    return Measured(
        systems,
        returned=bool(rounds) and train.improved(rounds[-1]),
        drift=drift.facts_of(drifted) if drifted else None,
    )


def _drifts(settings: list[Setting], measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """By a setting's name: what training did to the vectors, with its first seed."""
    found = {setting.name(): measured[setting.trials[0].name].drift for setting in settings}
    return {name: facts for name, facts in found.items() if facts is not None}


def _mean(values: PerQuery) -> float:
    return float(np.mean(list(values.values())))


def _base(measured: Mapping[str, Measured]) -> float:
    return _mean(next(iter(measured.values())).systems["base"])


def _over_seeds(setting: Setting, measured: Mapping[str, Measured], system: str) -> PerQuery:
    """Each query's mean over the setting's seeds. system ``returned``: what a run would have returned."""
    rows = [measured[trial.name] for trial in setting.trials]
    values = [
        row.systems[("candidate" if row.returned else "base") if system == "returned" else system]
        for row in rows
    ]
    return {query: float(np.mean([each[query] for each in values])) for query in sorted(values[0])}


def _difference(setting: Setting, measured: Mapping[str, Measured], system: str) -> tuple[float, Difference]:
    base, other = (_over_seeds(setting, measured, name) for name in ("base", system))
    return _mean(other), paired_difference(list(base.values()), list(other.values()))


def _tested(settings: list[Setting], measured: Mapping[str, Measured]) -> dict[str, OnTest]:
    """By a setting's name: what its trained models are worth on the test split."""
    found = {setting.name(): _difference(setting, measured, "candidate") for setting in settings}
    adjusted = holm({name: difference.p for name, (_, difference) in found.items()})
    return {
        setting.name(): OnTest(
            ndcg,
            replace(difference, p=adjusted[setting.name()]),
            sum(measured[trial.name].returned for trial in setting.trials),
        )
        for setting in settings
        for ndcg, difference in [found[setting.name()]]
    }


def _against(
    settings: list[Setting], measured: Mapping[str, Measured], reference: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """By a setting's name: its trained models beside those of the reference, of which there may be none."""
    base = next((s for s in settings if {k: str(v) for k, v in s.point.items()} == reference), None)
    if base is None:
        return {}
    before = _over_seeds(base, measured, "candidate")
    found = {}
    for setting in settings:
        if setting is not base:
            after = _over_seeds(setting, measured, "candidate")
            found[setting.name()] = paired_difference(list(before.values()), list(after.values()))
    adjusted = holm({name: difference.p for name, difference in found.items()})
    return {
        name: {"delta": d.mean, "ci95": [d.low, d.high], "p": d.p, "p_holm": adjusted[name]}
        for name, d in found.items()
    }


def document(
    settings: list[Setting],
    measured: Mapping[str, Measured],
    tested: Mapping[str, OnTest],
    reference: Mapping[str, str],
) -> dict[str, Any]:
    """test.json: each setting's test figures, of its trained model and of what its runs return.

    p_holm: adjusted over the settings. reference: the point beside which each trained model is put too.
    """
    beside = _against(settings, measured, reference)
    any_one = next(iter(measured.values())).systems
    found: dict[str, Any] = {
        system: {_METRIC: _mean(any_one[system])} for system in ("base", "bm25") if system in any_one
    }
    found["queries"] = len(any_one["base"])
    found["settings"] = []
    for setting in settings:
        row: dict[str, Any] = {"name": setting.name(), "point": setting.point, "seeds": len(setting.trials)}
        for system in ("candidate", "returned", "teacher"):
            if system == "teacher" and any("teacher" not in measured[t.name].systems for t in setting.trials):
                continue
            ndcg, d = _difference(setting, measured, system)
            row[system] = {_METRIC: ndcg, "delta": d.mean, "ci95": [d.low, d.high], "p": d.p}
        row["candidate"]["p_holm"] = tested[setting.name()].difference.p
        row["against_reference"] = beside.get(setting.name())
        row["seeds_returned"] = tested[setting.name()].returned
        found["settings"].append(row)
    return found


def _show(settings: list[Setting], tested: Mapping[str, OnTest], shown: int = 20) -> None:
    """The leaderboard's head, on standard output."""
    table = Table(title=f"sweep: the first {min(shown, len(settings))} of {len(settings)} settings")
    for column in ("setting", "gain (dev)", "status", "test ndcg@10", "against base"):
        table.add_column(column, justify="left" if column in ("setting", "status") else "right")
    for setting in settings[:shown]:
        seen = tested.get(setting.name())
        table.add_row(
            setting.name(),
            f"{setting.gain:+.4f}" if math.isfinite(setting.gain) else "–",
            "/".join(sorted({trial.status for trial in setting.trials})),
            f"{seen.ndcg:.4f}" if seen else "",
            f"{seen.difference.mean:+.4f}, p {seen.difference.p:.2g}" if seen else "",
        )
    Console(highlight=False, width=120).print(table)
