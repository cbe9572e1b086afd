"""The main job: a corpus goes in, a better retriever for that corpus comes out.

    python jobs/adapt.py configs/demo.yaml [key=value ...] [--dry-run] [--until STAGE]

What happens in between stands on one screen in ``retrieval_ray/stages/pipeline.py``.
"""

from retrieval_ray.stages import foresee, job, pipeline, plan
from retrieval_ray.stages.context import Context


def adapt(context: Context, until: str | None) -> str | None:
    """Run every stage up to ``until``; returns the path of metrics.json."""
    if context.dry_run:
        print(plan.describe(context, pipeline.run, until, foresee.adapting))
        return None
    plan.begin(context)
    return pipeline.run(context, until)


if __name__ == "__main__":
    job.main(adapt, "Adapt a dense retriever to a corpus.")
