"""Write the training lists as files of another library: scored by the teacher, ready to train on.

    python jobs/export.py configs/NAME.yaml format=flagembedding out=FOLDER [key=value ...] [--dry-run]

format: sentence-transformers, tevatron, flagembedding or pylate. false_negatives=drop leaves out what
training masks. The stages are those of ``jobs/adapt.py``; what is in the store already is not done again.
"""

from retrieval_ray.config import DatasetConfig
from retrieval_ray.errors import UserError
from retrieval_ray.export import FORMATS
from retrieval_ray.sources import open_source
from retrieval_ray.stages import (
    cluster,
    encode,
    export,
    foresee,
    generate,
    group,
    ingest,
    job,
    plan,
    queries,
    retrieve,
    score,
)  # fmt: skip
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judges import judges_of


def write(
    context: Context, until: str | None, format: str = "", out: str = "", false_negatives: str = "keep"
) -> str | None:
    """Build the lists of every corpus and write them; returns where."""
    if until is not None:
        raise UserError("--until: this job writes lists, so it always goes on to the groups stage")
    folder = export.target(format, out, false_negatives)
    if context.dry_run:
        print(plan.describe(context, pipeline, "groups", foresee.adapting))
        return None
    plan.begin(context)
    made = [lists(context, dataset) for dataset in context.config.corpora()]
    with export.writing(folder):
        for grouped in made:
            place = folder if len(made) == 1 else folder / grouped.name
            export.run(grouped, format, place, drop=false_negatives == "drop")
    return folder.url


def pipeline(context: Context, until: str | None) -> str | None:
    for dataset in context.config.corpora():
        lists(context, dataset)
    return None


def lists(context: Context, dataset: DatasetConfig) -> Grouped:
    """The training lists of one corpus."""
    config, source = context.config, open_source(dataset.path)
    corpus = ingest.run(context, dataset, source)
    asked, judges = queries.asked(context, dataset, source, corpus), judges_of(context)
    generated = generate.run(context, source, corpus)
    collected = queries.run(context, dataset, source, corpus, asked, generated)
    if not context.dry_run:
        cluster.join(config.compute, context.worker_resources()["num_gpus"])
    encoded = encode.run(context, collected, models=config.retrieve.models)
    ranked = retrieve.run(context, encoded, config.retrieve.retrievers)
    return group.run(context, score.run(context, ranked, judges))


if __name__ == "__main__":
    job.main(
        write,
        "Export training lists.",
        keys={
            "format": " | ".join(FORMATS),
            "out": "the folder to write to",
            "false_negatives": "keep | drop what training masks",
        },
    )
