"""Train a cross-encoder to be a teacher, where no model hub has one: from judged pairs and mined negatives.

    python jobs/teacher.py configs/teacher.yaml 'datasets=[{path: FOLDER}, {path: OTHER}]' [key=value ...]

The model ends in ``output_dir/model``; give it to the main job as ``teacher.kind=cross_encoder
teacher.model=FOLDER``. Killed in the middle, the same command goes on from the last checkpoint.
"""

from retrieval_ray.artifacts import Location
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import Model
from retrieval_ray.progress import say
from retrieval_ray.sources import open_source
from retrieval_ray.stages import cluster, encode, foresee, ingest, job, plan, reranker, retrieve
from retrieval_ray.stages.context import Context


def teach(context: Context, until: str | None) -> str | None:
    """Train; returns the model's folder."""
    if until is not None:
        raise UserError("--until: this job has no stages to stop at but its last")
    if context.dry_run:
        print(plan.describe(context, pipeline, until, foresee.teaching))
        return None
    plan.begin(context)
    return pipeline(context, until)


def pipeline(context: Context, until: str | None) -> str:
    config = context.config
    base = Model.of(config.reranker.base, "reranker.base", trust_remote_code=config.teacher.trust_remote_code)
    ranked = []
    for dataset in config.corpora():
        source = open_source(dataset.path)
        corpus = ingest.run(context, dataset, source)
        collected = reranker.judged_queries(context, dataset, source, corpus)
        if not context.dry_run:
            cluster.join(config.compute, context.worker_resources()["num_gpus"])
        ranked.append(retrieve.run(context, encode.run(context, collected), config.retrieve.retrievers))
    trained = reranker.run(context, ranked, base)
    facts = trained.manifest()
    output = Location.of(config.output_dir)
    if not context.dry_run:
        (output / "model").remove()
        (trained.folder / "model").copy_to(output / "model")
        (output / "metrics.json").write_json({"dev": facts["dev"], "pairs": facts["rows"]})
        for corpus_name, row in facts["dev"].items():
            say(
                f"  {corpus_name}, {row['queries']:.0f} held-out queries, nDCG@10: as retrieved "
                f"{row['retrieved_ndcg@10']:.4f}, reranked {row['reranked_ndcg@10']:.4f}"
            )
    return (output / "model").url


if __name__ == "__main__":
    job.main(teach, "Train a cross-encoder teacher.")
