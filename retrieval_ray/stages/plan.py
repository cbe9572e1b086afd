"""A dry run: which stages would be reused, which would run, on how much."""

import sys
from collections.abc import Callable

from retrieval_ray.datasets import judged_ids, passages_of, read_judged, read_log, read_log_file, survey
from retrieval_ray.sources import open_source
from retrieval_ray.stages import forecast
from retrieval_ray.stages.context import STAGES, Context, WouldRun
from retrieval_ray.stages.queries import sources_of

Pipeline = Callable[[Context, str | None], str | None]


def describe(context: Context, pipeline: Pipeline, until: str | None) -> str:
    """The plan as text. Reads the collections, writes nothing, starts nothing."""
    lines = ["plan (nothing is run):"]
    try:
        pipeline(context, until)
        lines += [*context.planned, "everything is done already"]
    except WouldRun:
        lines += [
            *context.planned,
            "run    every stage after it" + (f", until {until}" if until else ""),
        ]
    return "\n".join([*lines, "", *_amounts(context)])


def _amounts(context: Context) -> list[str]:
    config = context.config
    lines = [f"stages: {', '.join(STAGES)}"]
    for dataset in config.corpora():
        source = open_source(dataset.path)
        count = survey(source).passages
        named = {
            p for split in (dataset.split, dataset.dev_split) if split for p in judged_ids(source, split)
        }
        ids = {key for key, _, _ in passages_of(source) if key in named}
        judged = set(read_judged(source, dataset.split, ids, max_queries=dataset.max_queries).texts)
        if dataset.dev_split:
            judged |= set(read_judged(source, dataset.dev_split, ids).texts)
        sources = sources_of(config.queries, dataset)
        training = 0
        if "log" in sources:
            split = dataset.log_split or config.queries.log_split
            training += len(read_log(source, split, without=judged)) if split else 0
            path = config.queries.log_path
            training += len(read_log_file(path)) if path else 0
        if "extractive" in sources:
            training += min(
                config.queries.extractive_max,
                config.queries.extractive_per_passage * count,
            )
        calls = 0
        if "llm" in sources:
            cost = forecast.of(context, sorted(passages_of(source)), titles=dataset.titles)
            calls, training = cost.requests, training + cost.requests
            lines += cost.lines()
        training = min(training, config.queries.max_queries)
        pairs = (training + len(judged)) * config.teacher.depth
        lines.append(
            f"{source.name}: {count:,} passages to encode (twice: base and adapted), "
            f"up to {training:,} training queries from {' and '.join(sources)}, {len(judged):,} judged "
            f"queries, up to {pairs:,} pairs for the teacher ({config.teacher.kind}), {calls:,} LLM calls"
        )
    sys.stdout.flush()
    return lines
