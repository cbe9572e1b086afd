"""Sweep over anything in a config, with Ray Tune; everything before training is shared and made once.

    python jobs/sweep.py configs/sweeps/lambda.yaml dataset.path=my_corpus [key=value ...]

Leaves ``leaderboard.parquet``, ``sweep.html``, ``test.json``, ``best.yaml`` and the best setting's own run
in ``best/``. Where ``sweep.collections`` names several, each is swept in a folder of its own. Killed, the
same command goes on.
"""

from dataclasses import replace
from functools import partial

from retrieval_ray import sweeps
from retrieval_ray.artifacts import under
from retrieval_ray.config_file import with_values
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.stages import foresee, job, pipeline, plan, sweep, sweep_results
from retrieval_ray.stages.context import Context


def sweep_all(context: Context, until: str | None) -> str | None:
    """Sweep one collection, or each of several; returns the path of the (last) leaderboard."""
    if until is not None:
        raise UserError("--until: a sweep has no stages to stop at; its trials go on to the last")
    collections = context.config.sweep.collections
    if not collections:
        return sweep_one(context)
    last, failed = None, []
    for name, values in collections.items():
        own = {"output_dir": under(context.config.output_dir, name), "store": context.store_url()}
        config = with_values(context.config, {**values, **own, "sweep.collections": {}})
        say(f"collection '{name}'")
        try:
            last = sweep_one(context.anew(config=config)) or last
        except UserError as error:  # the others can do without it
            say(f"collection '{name}': error: {error}")
            failed.append(name)
    if failed:
        raise UserError(f"sweep: {len(failed)} of {len(collections)} collections failed: {', '.join(failed)}")
    return last


def sweep_one(context: Context) -> str | None:
    """Every trial on one collection, then what they say."""
    space = sweeps.space_of(context.config.sweep.space)
    plans = sweep.plans(context.config, space)  # a setting that cannot be is said before any work
    if context.dry_run:
        for each in plans:
            print(f"trial  {each.label()}")
        how = context.config.sweep
        print(f"{len(plans) or how.samples} trials ({how.search}); the first that is not done yet:")
        configs = [each.config for each in plans] or [context.config] * how.samples

        def every(context: Context, until: str | None) -> None:
            for config in configs:
                pipeline.run(replace(context, config=config), until)

        first = replace(context, config=configs[0])
        print(plan.describe(first, every, "train", partial(foresee.sweeping, trials=configs)))
        return None
    trials = sweep.run(context, space)
    return sweep_results.write(context, space, trials).url


if __name__ == "__main__":
    job.main(sweep_all, "Sweep over a config's values.")
