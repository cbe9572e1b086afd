"""The main job: a corpus goes in, a better retriever for that corpus comes out.

    python jobs/adapt.py configs/demo.yaml [key=value ...] [--dry-run] [--until STAGE]

This file is the pipeline; each line is a stage that reads tables and writes tables.
"""

from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.sources import open_source
from retrieval_ray.stages import (
    encode,
    evaluate,
    generate,
    group,
    ingest,
    job,
    plan,
    results,
    retrieve,
    score,
    train,
)  # fmt: skip
from retrieval_ray.stages.context import Context, Model, connect
from retrieval_ray.student import resolve_model, weights_sha


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
    names = [source.name for source in sources]
    everyone = range(len(datasets))
    if len(set(names)) < len(names):
        raise UserError(f"datasets: two corpora have the same name ({', '.join(sorted(names))})")

    corpora = [ingest.run(context, datasets[i], sources[i]) for i in everyone]
    if until == "corpus":
        return None
    queries = [generate.run(context, datasets[i], sources[i], corpora[i]) for i in everyone]
    if until == "queries":
        return None
    if not context.dry_run:
        connect(context)  # only now: what is wrong with the data shows before any cluster starts
    passages = [encode.run(context, corpora[i], "passage", f"encoding '{names[i]}'") for i in everyone]
    vectors = [
        encode.run(context, queries[i], "query", f"encoding queries of '{names[i]}'") for i in everyone
    ]
    if until == "encode":
        return None
    retrieved = [
        retrieve.run(
            context, corpora[i], queries[i], passages[i], vectors[i], f"retrieval on '{names[i]}'",
            retrievers=config.retrieve.retrievers,
        )
        for i in everyone
    ]  # fmt: skip
    if until == "retrieve":
        return None
    cross_encoder = None
    if config.teacher.kind == "cross_encoder":
        path = resolve_model(str(config.teacher.model))
        cross_encoder = Model(path, weights_sha(path))
    scored = [
        score.run(
            context, corpora[i], queries[i], passages[i], vectors[i], retrieved[i], cross_encoder,
            f"teacher on '{names[i]}'",
        )
        for i in everyone
    ]  # fmt: skip
    if until == "score":
        return None
    groups = [
        group.run(
            context, names[i], queries[i], retrieved[i], scored[i],
            retrievers=config.retrieve.retrievers,
        )
        for i in everyone
    ]  # fmt: skip
    if until == "groups":
        return None

    proven = [i for i in everyone if group.may_train(context, names[i], groups[i])]
    trained = None
    if proven:
        trained = train.run(
            context,
            [
                train.Trained(
                    names[i], corpora[i], queries[i], passages[i], vectors[i], retrieved[i], groups[i]
                )
                for i in proven
            ],
        )  # fmt: skip
    if until == "train":
        return None

    evaluated, stages = [], []
    for i in everyone:
        stages.append(
            {
                "corpus": corpora[i], "queries": queries[i], "encode": passages[i],
                "retrieve": retrieved[i], "groups": groups[i],
                **{f"score_{teacher}": done for teacher, done in scored[i].items()},
            }
        )  # fmt: skip
        found = None
        if trained:
            adapted = context.with_student(train.candidate(trained))
            new_passages = encode.run(
                adapted, corpora[i], "passage", f"encoding '{names[i]}' with the adapted model"
            )
            new_vectors = encode.run(
                adapted, queries[i], "query", f"encoding queries of '{names[i]}' with it"
            )
            found = retrieve.run(
                adapted, corpora[i], queries[i], new_passages, new_vectors,
                f"retrieval on '{names[i]}' with it", retrievers=["dense"],
            )  # fmt: skip
            stages[i] |= {"encode_adapted": new_passages, "retrieve_adapted": found}
        evaluated.append(
            evaluate.run(
                context, names[i], datasets[i].relevance_threshold, queries[i], retrieved[i],
                scored[i], groups[i], found,
            )
        )  # fmt: skip
    if context.dry_run:
        return None
    stages = [{**kept, "evaluate": evaluated[i]} for i, kept in enumerate(stages)]
    where = results.write(
        context,
        [results.Outcome(names[i], datasets[i].split, stages[i], groups[i], evaluated[i]) for i in everyone],
        trained,
    )
    say(f"report: {config.output_dir}/report.html, model: {config.output_dir}/model")
    return where.path


if __name__ == "__main__":
    job.main(adapt, "Adapt a dense retriever to a corpus.")
