"""A dry run: which stages would be reused, which would run, on how much, in what time, for what money.

What it foresees is kept in ``output_dir/forecast.json``, and stands in the manifests of the stages that a run
then works on beside what happened.
"""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from retrieval_ray.artifacts import Location, digest
from retrieval_ray.forecast import Ledger, Prices, Work, from_rows, left, table
from retrieval_ray.stages import job
from retrieval_ray.stages.context import Context, WouldRun
from retrieval_ray.stages.foresee import Foreseen

Pipeline = Callable[[Context, str | None], Any]
Foresee = Callable[[Context, str | None], Foreseen]
FILE = "forecast.json"


def describe(context: Context, pipeline: Pipeline, until: str | None, foresee: Foresee) -> str:
    """The plan as text. Reads the collections, tries a sample, starts nothing; writes what is foreseen."""
    lines = ["plan (nothing is run):"]
    try:
        pipeline(context, until)
        return "\n".join([*lines, *context.planned, "everything is done already"])
    except WouldRun:
        after = "run    every stage after it" + (f", until {until}" if until else "")
    foreseen = foresee(context, until)
    _write(context, foreseen.works)
    works = left(foreseen.works, context.ledger.seen)
    lines += [*context.planned, after, "", *foreseen.lines]
    return "\n".join([*lines, f"forecast (rates: {foreseen.source}):", *shown(context, works)])


def shown(context: Context, works: list[Work]) -> list[str]:
    """The table, at the config's prices."""
    return table(works, Prices(**vars(context.config.prices)))


def begin(context: Context) -> None:
    """Before a run: take what a dry run of it foresaw. Without one nothing is foreseen."""
    record = Location.of(context.config.output_dir) / FILE
    known = record.read_json() if record.exists() else {}
    context.ledger = Ledger(from_rows(known["works"]) if known.get("run") == _run(context) else [])


def _write(context: Context, works: list[Work]) -> None:
    document = {"run": _run(context), "works": [asdict(work) for work in works]}
    (Location.of(context.config.output_dir) / FILE).write_json(document)


def _run(context: Context) -> str:
    """Which run a forecast is of; one that another version wrote, of other fields, is of none."""
    return digest([job.identity_of(context.config), [field.name for field in fields(Work)]])
