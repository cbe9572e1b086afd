"""Trials of a sweep, run by Ray Tune: each a light driver of the stages, in the store that all share.

What trials have in common is in the store after the first of them, so no LLM and no teacher is asked twice.
A trial's result lies in ``trials/NAME.json``, written last; a sweep that goes on reads it there.
"""

import importlib.util
import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import tune

from retrieval_ray import sweeps
from retrieval_ray.artifacts import Location, digest
from retrieval_ray.config import Config
from retrieval_ray.errors import UserError
from retrieval_ray.progress import heard_by, say
from retrieval_ray.selection import gain, measure
from retrieval_ray.stages import cluster, tracking
from retrieval_ray.stages.claims import Claims, Owners
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.job import explain
from retrieval_ray.stages.trial import Plan, result_of, training_of
from retrieval_ray.sweeps import Choices, Point, Range, Space, Trial

_ROW = ("epoch", "step", "dev_ndcg@10", "teacher_ndcg@10", "dev_kl", "gain")  # of what a trial reports

_NEVER = 2**20  # epochs that no trial reaches
_WORST = -1.0  # nDCG can fall no further
_FAILURES = 2  # of a trial, that machines taken away and full memories may cause


def plans(config: Config, space: Space) -> list[Plan]:
    """Every training of a sweep whose points are known before; of Optuna's none is.

    Raises ``UserError`` where two points give the same config, or one a config that cannot be.
    """
    how = config.sweep
    if how.search == "optuna":
        return []
    found = sweeps.points(space, how.search, how.samples, config.seed)
    made = [Plan.of(config, space, point, config.seed + n) for point in found for n in range(how.seeds)]
    by_name: dict[str, Plan] = {}
    for plan in made:
        if (twin := by_name.setdefault(plan.name, plan)) is not plan:
            raise UserError(f"sweep.space: '{twin.label()}' and '{plan.label()}' give the same training")
    return made


def run(context: Context, space: Space) -> list[Trial]:
    """Run every trial that is not done yet; returns them all, also those that failed or were stopped."""
    config, folder = context.config, Location.of(context.config.output_dir) / "trials"
    all_plans = plans(config, space)
    known = _known(context, space, folder)
    left = [plan for plan in all_plans if plan.name not in known]
    count = len(left) if all_plans else max(0, config.sweep.samples - len(known))
    say(f"sweep: {count} trials to run" + (f", {len(known)} done already" if known else ""))
    cluster.join(
        config.compute,
        context.worker_resources()["num_gpus"],
        trials=config.sweep.trials_at_once,
        dashboard=True,  # frees what a trial held that ASHA stopped
    )
    failed: list[Trial] = []
    if count:
        failed = _tuned(context, space, folder, left, list(known.values()), count)
        known = _known(context, space, folder)
    order = {plan.name: n for n, plan in enumerate(all_plans)}
    if lost := order.keys() - known.keys() - {trial.name for trial in failed}:
        raise UserError(f"sweep: {len(lost)} trials came to no end; run the same command again")
    done = [trial for name, trial in known.items() if name in order or not all_plans]
    return sorted([*done, *failed], key=lambda trial: order.get(trial.name, 0))


def _known(context: Context, space: Space, folder: Location) -> dict[str, Trial]:
    """Results that lie in the folder, by name, but for those of another config or space.

    And of other data, weights or code: what the trial would train by now is what it trained.
    """
    found = {}
    for name in folder.names() if folder.exists() else []:
        if name.startswith("."):  # what a kill left half written
            continue
        trial = Trial(**(folder / name).read_json())
        if not sweeps.holds(space, trial.point):
            continue
        try:
            plan = Plan.of(context.config, space, trial.point, trial.seed)
        except UserError:
            continue
        if plan.name == trial.name and training_of(replace(context, config=plan.config)) == trial.trained:
            found[trial.name] = trial
    return found


def _tuned(
    context: Context, space: Space, folder: Location, left: list[Plan], known: list[Trial], count: int
) -> list[Trial]:
    """Let Tune run these plans, or Optuna find so many; returns those that failed."""
    config, how = context.config, context.config.sweep
    os.environ.update(
        RAY_AIR_NEW_OUTPUT="0",  # whose tables name a folder that is gone at the end
        RAY_CHDIR_TO_TRIAL_DIR="0",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",  # it would go on with what is there as if that were all
    )
    owners = Owners.options(scheduling_strategy=cluster.beside_me()).remote()  # type: ignore[attr-defined]
    watch = _Watch(context, space, folder, owners, count)
    scheduler = None
    if how.asha_epochs is not None:
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="epoch",
            grace_period=how.asha_epochs,
            max_t=_NEVER,  # a trial that ASHA leaves alone goes on to its own last epoch
            reduction_factor=how.asha_factor,
        )
    storage = Location.of(config.output_dir) / ".tune"
    storage.remove()  # what is done is known from the trials' own files
    grid = [{"point": plan.point, "seed": plan.seed} for plan in left]
    found = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, context=context, space=space, folder=folder, owners=owners),
            _light(),
        ),
        param_space={"trial": tune.grid_search(grid)} if grid else {},
        tune_config=tune.TuneConfig(
            metric="gain",
            mode="max",
            search_alg=None if grid else _optuna(space, known, config.seed),
            num_samples=1 if grid else count,
            scheduler=scheduler,
            max_concurrent_trials=how.trials_at_once,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=_FAILURES),  # what it finished is in the store
            verbose=0,
        ),
    ).fit()
    storage.remove()
    lost = [(r.config, explain(r.error) or _last_line(r.error)) for r in found if r.error is not None]
    failed = []
    for given, why in [*watch.refused, *lost]:
        point, seed = _asked(config, given)
        plan = None
        try:
            plan = Plan.of(config, space, point, seed)
        except UserError:  # Optuna's point is no config
            pass
        name = plan.name if plan else digest([point, seed])[:12]
        if not (folder / f"{name}.json").exists():
            failed.append(Trial(name, point, seed, "failed", error=why))
            if plan:
                tracking.finish(_own(context, plan), {}, "failed")
    return failed


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


def _light() -> dict[str, float]:
    """A trial's own share: it only drives. On clusters of our making a resource of the head node."""
    return {"driver_node" if "driver_node" in ray.cluster_resources() else "CPU": 0.01}


def _optuna(space: Space, known: list[Trial], seed: int) -> Any:
    """Optuna, told of what is done already. Raises ``UserError`` where it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "sweep.search=optuna: needs the package optuna: pip install -c constraints.txt -e '.[sweep]'"
        )
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from ray.tune.search.optuna import OptunaSearch

    def distribution(parameter: Range | Choices) -> BaseDistribution:
        if isinstance(parameter, Choices):
            return CategoricalDistribution(list(parameter.settings))
        if parameter.whole:
            return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log)

    done = [trial for trial in known if trial.status in ("done", "untrained")]
    return OptunaSearch(
        space={name: distribution(parameter) for name, parameter in space.items()},
        metric="gain",
        mode="max",
        seed=seed + len(known),  # going on draws anew
        points_to_evaluate=[trial.point for trial in done] or None,
        evaluated_rewards=[trial.gain for trial in done] or None,
    )


def _asked(config: Config, given: Mapping[str, Any]) -> tuple[Point, int]:
    """What Tune gave a trial: a plan's point and seed, or a point that Optuna found."""
    trial = given.get("trial", {"point": dict(given), "seed": config.seed})
    return trial["point"], trial["seed"]


def _plan_of(config: Config, space: Space, given: Mapping[str, Any]) -> Plan:
    return Plan.of(config, space, *_asked(config, given))


def _trial(given: dict[str, Any], *, context: Context, space: Space, folder: Location, owners: Any) -> None:
    """One training, in a process of Tune's. What the user must mend is no failure to be tried again."""
    claims = Claims(owners, tune.get_context().get_trial_id())
    try:
        _train(given, context, space, folder, claims)
    except Exception as error:
        why = explain(error)
        if why is None:
            raise
        ray.get(owners.refuse.remote(claims.owner, why))
        tune.report({"gain": _WORST, "epoch": 0})


def _train(given: dict[str, Any], context: Context, space: Space, folder: Location, claims: Claims) -> None:
    """One training, from whatever the store lacks of its stages."""
    plan = _plan_of(context.config, space, given)
    own = replace(_own(context, plan), claims=claims, quiet=True)
    started = time.monotonic()
    with heard_by(lambda line: claims.owners.tell.remote(f"  {plan.label()}: {line}")):
        trial, reported = result_of(own, plan)
    for row in [] if reported else trial.history:
        tune.report({**row, "gain": gain(trial.history, int(row["epoch"]))})  # its training was there already
    trial = replace(trial, seconds=round(time.monotonic() - started, 3))
    (folder / f"{plan.name}.json").write_json(asdict(trial))
    tracking.finish(own, {"gain": trial.gain, "epoch": float(trial.epoch)})
    tune.report({"gain": trial.gain, "epoch": trial.epoch})


def _own(context: Context, plan: Plan) -> Context:
    """The context of one trial."""
    return context.anew(config=plan.config, trial=plan.label())


def _with_start(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """A history out of reports; those of a training that went on lack the untouched student."""
    history = [{key: value for key, value in row.items() if key != "gain"} for row in rows]
    if not rows or rows[0]["epoch"] == 0:
        return history
    name = measure(rows[0])
    return [{"epoch": 0.0, "step": 0.0, name: rows[0][name] - rows[0]["gain"]}, *history]


class _Watch(tune.Callback):  # type: ignore[misc]
    """Says how trials go, gives back what an ended one held, and writes down those that ASHA stopped."""

    def __init__(self, context: Context, space: Space, folder: Location, owners: Any, count: int) -> None:
        self.context, self.config, self.space = context, context.config, space
        self.folder, self.owners, self.count = folder, owners, count
        self.rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        self.refused: list[tuple[dict[str, Any], str]] = []  # what Tune gave a trial, and why it cannot be
        self.ended = 0
        self.asked_at = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self.asked_at < 1:  # Tune comes by many times a second
            return
        self.asked_at = time.monotonic()
        for line in ray.get(self.owners.told.remote()):
            say(line)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "step" not in result:  # the last word of a trial, not an epoch
            return
        self.rows[trial.trial_id].append({key: result[key] for key in _ROW if key in result})
        label = _plan_of(self.config, self.space, trial.config).label()
        say(f"  {label}: epoch {result['epoch']:.0f}, gain {result['gain']:+.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if why := ray.get(self.owners.refusal.remote(trial.trial_id)):
            self.refused.append((trial.config, why))
            self.on_trial_error(iteration, trials, trial)
            return
        plan = _plan_of(self.config, self.space, trial.config)
        record = self.folder / f"{plan.name}.json"
        if not record.exists():
            rows = self.rows[trial.trial_id]
            trained = [row for row in rows if row["epoch"] > 0]
            best = max(trained or rows, key=lambda row: row["gain"], default={"gain": math.nan, "epoch": 0})
            history = _with_start(rows)
            stopped = Trial(plan.name, plan.point, plan.seed, "stopped", best["gain"], int(best["epoch"]))
            name = measure(history[0]) if history else ""
            begun = training_of(replace(self.context, config=plan.config)) or ""
            record.write_json(asdict(replace(stopped, history=history, measure=name, trained=begun)))
            tracking.finish(_own(self.context, plan), {"gain": best["gain"]}, "stopped")
        self._end(trial, f"{plan.label()}: {record.read_json()['status']}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        label = _plan_of(self.config, self.space, trial.config).label()
        say(f"  {label}: failed, and is tried again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, f"{sweeps.Setting(_asked(self.config, trial.config)[0], []).name()}: failed")

    def _end(self, trial: Any, line: str) -> None:
        ray.get(self.owners.give_back.remote(trial.trial_id, None))
        self.ended += 1
        say(f"trial {self.ended} of {self.count}: {line}")
