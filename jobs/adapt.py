"""The main job: a corpus goes in, a better retriever for that corpus comes out.

    python jobs/adapt.py configs/demo.yaml [key=value ...] [--dry-run] [--until STAGE]

This file is the pipeline; each line is a stage that reads tables and writes tables.
"""

from retrieval_ray.artifacts import Stage
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.sources import open_source
from retrieval_ray.stages import (
    cluster,
    encode,
    evaluate,
    generate,
    group,
    ingest,
    job,
    negatives,
    plan,
    queries,
    results,
    retrieve,
    score,
    train,
)  # fmt: skip
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judges import judges_of


def adapt(context: Context, until: str | None) -> str | None:
    """Run every stage up to ``until``; returns the path of metrics.json."""
    if context.dry_run:
        print(plan.describe(context, pipeline, until))
        return None
    return pipeline(context, until)


def pipeline(context: Context, until: str | None) -> str | None:
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
    models = config.retrieve.models
    encoded = [encode.run(context, collection, models=models) for collection in collections]
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
    if until == "groups":
        return None
    proven = [each for each in grouped if group.may_train(context, each)]
    trained = train.run(context, proven) if proven else None
    if until == "train":
        return None
    outcomes = [evaluated(context, each, trained) for each in grouped]
    if context.dry_run:
        return None
    where = results.write(context, outcomes, trained)
    say(f"report: {config.output_dir}/report.html, model: {config.output_dir}/model")
    return where.url


def evaluated(context: Context, grouped: Grouped, trained: Stage | None) -> results.Outcome:
    """Encode and search one collection with the trained model, where there is one, and measure."""
    adapted = None
    if trained:
        now, note = context.with_student(train.candidate(trained)), " with the adapted model"
        adapted = retrieve.run(now, encode.run(now, grouped, note), ["dense"], note)
    return results.Outcome(grouped, adapted, evaluate.run(context, grouped, adapted))


if __name__ == "__main__":
    job.main(adapt, "Adapt a dense retriever to a corpus.")
