"""Have an LLM write queries for a corpus, and do no more: the first stages of the main job.

    python jobs/generate.py configs/NAME.yaml [key=value ...] [--dry-run] [--show N]

Replies and queries lie in the store, where ``jobs/adapt.py`` with the same settings finds them.
"""

from retrieval_ray.errors import UserError
from retrieval_ray.sources import open_source
from retrieval_ray.stages import forecast, foresee, generate, ingest, job, plan, queries
from retrieval_ray.stages.context import Context


def write(context: Context, until: str | None, show: int | None) -> str | None:
    """Write the queries of every corpus; returns where the last of them lie."""
    if "llm" not in (context.config.queries.sources or []):
        raise UserError("queries.sources must name 'llm': this job writes queries with an LLM, and only so")
    if show is not None:
        if show < 1:
            raise UserError("--show: how many passages, at least 1")
        for dataset in context.config.corpora():
            print("\n".join(forecast.shown(context, dataset, show)))
        return None
    if context.dry_run:
        print(plan.describe(context, pipeline, until or "queries", foresee.adapting))
        return None
    plan.begin(context)
    return pipeline(context, until)


def pipeline(context: Context, until: str | None) -> str | None:
    where = None
    for dataset in context.config.corpora():
        source = open_source(dataset.path)
        corpus = ingest.run(context, dataset, source)
        if until == "corpus":
            continue
        asked = queries.asked(context, dataset, source, corpus)  # what is missing is said before any call
        generated = generate.run(context, source, corpus)
        if until == "generate":
            continue
        where = queries.run(context, dataset, source, corpus, asked, generated).queries.folder.url
    return where


if __name__ == "__main__":
    job.main(write, "Write queries for a corpus.", show="print the prompts of N passages and stop")
