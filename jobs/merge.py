"""Make a model with experts dense: each layer's experts become their mean, and the loss is measured.

    python jobs/merge.py configs/cpu.yaml student.model=out/mine/model dataset.path=my_corpus \\
        output_dir=out/dense [merge.weights=uniform] [merge.evaluate=false]

The dense model of the original architecture lies in ``output_dir/model``, what it lost in its card and in
``merge.json``. Runs in this process, on one machine.
"""

from retrieval_ray.progress import say
from retrieval_ray.stages import foresee, job, merge, plan
from retrieval_ray.stages.context import Context


def make_dense(context: Context, until: str | None) -> str | None:
    """Merge and measure; returns the path of merge.json."""
    if context.dry_run:
        print(f"would merge the experts of {context.student.source} into {context.config.output_dir}/model")
        print("\n".join(plan.shown(context, foresee.merging(context, until).works)))
        return None
    where = merge.run(context)
    say(f"model: {context.config.output_dir}/model")
    return where.url


if __name__ == "__main__":
    job.main(make_dense, "Make a model with experts dense, and measure what that costs.")
