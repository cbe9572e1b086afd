"""The whole method on one screen: each line is a stage that reads tables and writes tables."""

from collections.abc import Sequence

from retrieval_ray.artifacts import Stage
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.sources import open_source
from retrieval_ray.stages import (
    cluster,
    drift,
    encode,
    evaluate,
    generate,
    group,
    ingest,
    negatives,
    queries,
    reported,
    results,
    retrieve,
    score,
    train,
    trainer,
)  # fmt: skip
from retrieval_ray.stages.collection import Collection, Grouped
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judges import Judge, judges_of


def run(context: Context, until: str | None) -> str | None:
    """Every stage up to ``until``; returns the path of metrics.json where results were written."""
    grouped = lists(context, until)
    if grouped is None:
        return None
    rounds = trained(context, grouped)
    if until == "train":
        return None
    outcomes = [evaluated(context, each, rounds) for each in grouped]
    if context.dry_run:
        return None
    where = results.write(context, outcomes, rounds)
    say(f"report: {context.config.output_dir}/report.html, model: {context.config.output_dir}/model")
    return where.url


def lists(context: Context, until: str | None = None) -> list[Grouped] | None:
    """The training lists of each corpus, and everything before them; None where it stops before."""
    config = context.config
    datasets = config.corpora()
    sources = [open_source(dataset.path) for dataset in datasets]
    say(f"student: {context.student.source}")  # found, or refused before any work
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"datasets: two corpora have the same name ({', '.join(sorted(names))})")

    corpora = [ingest.run(context, *pair) for pair in zip(datasets, sources, strict=True)]
    if until == "corpus":
        return None
    # What is missing or wrong in what is given is said before any LLM is asked.
    asked = [queries.asked(context, *each) for each in zip(datasets, sources, corpora, strict=True)]
    judges = judges_of(context)
    if until in (None, "train") and not context.dry_run:
        trainer.check(context)
    generated = [generate.run(context, *each) for each in zip(sources, corpora, strict=True)]
    if until == "generate":
        return None
    collections = [
        queries.run(context, *each) for each in zip(datasets, sources, corpora, asked, generated, strict=True)
    ]
    if until == "queries":
        return None
    if not context.dry_run:  # only now: what is wrong with the data shows before any cluster starts
        cluster.join(config.compute, context.worker_resources()["num_gpus"])
    return _listed(context, collections, judges, until)


def _listed(
    context: Context, collections: Sequence[Collection], judges: list[Judge], until: str | None = None
) -> list[Grouped] | None:
    """The training lists that the context's student and the teachers make; None where it stops before."""
    config = context.config
    encoded = [encode.run(context, each, models=config.retrieve.models) for each in collections]
    if until == "encode":
        return None
    ranked = [retrieve.run(context, each, config.retrieve.retrievers) for each in encoded]
    if until == "retrieve":
        return None
    judged = [score.run(context, each, judges) for each in ranked]
    if until == "score":
        return None
    grouped = [group.run(context, each) for each in judged]
    if config.queries.negatives:
        grouped = [negatives.run(context, each) for each in grouped]
    return None if until == "groups" else grouped


def trained(context: Context, grouped: list[Grouped]) -> list[Stage]:
    """Train, round by round, on the corpora whose teacher is good enough; none, where none is."""
    judges = judges_of(context)
    rounds = []
    if proven := [each for each in grouped if group.may_train(context, each)]:
        rounds = [train.run(context, proven, judges)]
    while 0 < len(rounds) < context.config.train.rounds and (
        better := _another(context, proven, judges, rounds)
    ):
        rounds.append(better)
    return rounds


def _another(
    context: Context, corpora: list[Grouped], judges: list[Judge], rounds: list[Stage]
) -> Stage | None:
    """A round whose retriever, and embedded teacher, is the student of the last; None where none helps.

    A round begins where the last one ended. None follows one whose dev measures did not rise.
    """
    if not train.improved(rounds[-1]):
        return None
    say(f"round {len(rounds) + 1}")
    now = context.with_student(train.candidate(rounds[-1]))
    proven = [each for each in _listed(now, corpora, judges) or [] if group.may_train(now, each)]
    trained = train.run(now, proven, judges) if proven else None
    return trained if trained is not None and train.improved(trained) else None


def evaluated(context: Context, grouped: Grouped, rounds: list[Stage]) -> results.Outcome:
    """Encode and search one collection with the trained model, where there is one, and measure."""
    if not rounds:
        return results.Outcome(grouped, None, evaluate.run(context, grouped, None))
    trained, note = train.candidate(rounds[-1]), " with the adapted model"
    now = context.with_student(trained)
    adapted = retrieve.run(now, encode.run(now, reported.run(context, grouped), note), ["dense"], note)
    evaluation = evaluate.run(context, grouped, adapted)
    return results.Outcome(grouped, adapted, evaluation, drift.run(context, grouped, trained, evaluation))
