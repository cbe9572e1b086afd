"""Have a teacher judge given pairs, and do no more.

    python jobs/score.py configs/score.yaml pairs=run.trec dataset.path=my_corpus \\
        teacher.kind=cross_encoder teacher.model=NAME output_dir=out/scores [key=value ...] [--dry-run]

pairs is a TREC run, or a table (.jsonl, .parquet) with query or query_id, passage or passage_id. Writes
scores.parquet, rejects.parquet and, last, scores.json; each pair is judged once for every run of a store.
"""

from retrieval_ray.artifacts import Location
from retrieval_ray.errors import UserError
from retrieval_ray.progress import say
from retrieval_ray.stages import cluster, foresee, given, job, plan, score
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.judges import judges_of


def write(context: Context, until: str | None) -> str | None:
    """Judge every pair by every teacher; returns the path of scores.json."""
    if context.dry_run:
        print(plan.describe(context, judged, until, foresee.judging))
        return None
    plan.begin(context)
    return judged(context, until)


def judged(context: Context, until: str | None) -> str | None:
    judges = judges_of(context)
    unfit = sorted({judge.kind for judge in judges} & {"bm25", "dense"})
    if unfit:
        raise UserError(
            f"teacher: {' and '.join(unfit)} come from a retrieval, which this job does not run; name a "
            "teacher that reads the texts: teacher.kind=late, or cross_encoder with a teacher.model"
        )
    layouts = {by: given.run(context, by_query=by) for by in {judge.kind == "listwise" for judge in judges}}
    if not context.dry_run:
        cluster.join(context.config.compute, context.worker_resources()["num_gpus"])
    stages = {
        judge.name: score.of_pairs(context, judge, layouts[judge.kind == "listwise"]) for judge in judges
    }
    if context.dry_run:
        return None
    output = Location.of(context.config.output_dir)
    facts = score.gather(output, stages, list(layouts.values()))
    repeated = f", {facts['repeated']:,} pairs given more than once" if facts["repeated"] else ""
    say(f"{facts['rows']:,} scores, {facts['rejects']:,} rejects in {output.url}{repeated}")
    return (output / "scores.json").url


if __name__ == "__main__":
    job.main(write, "Judge given pairs.")
