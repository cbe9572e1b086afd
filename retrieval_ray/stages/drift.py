"""The drift stage: how far training moved a student's vectors, by layer and by judged query."""

from typing import Any

import numpy as np

from retrieval_ray import drift
from retrieval_ray.artifacts import Stage, stage
from retrieval_ray.gate import METRIC
from retrieval_ray.metrics import spearman, spearman_p
from retrieval_ray.model_files import Model
from retrieval_ray.stages import layers
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.evaluate import values_of

VERSION = 1


def run(context: Context, collection: Collection, trained: Model, evaluated: Stage | None = None) -> Stage:
    """Compare a trained model with the context's student; ``facts_of`` reads what is found.

    evaluated: an evaluate stage whose candidate is this model; without it nothing is said of single
    queries' quality. The student is looked at once, whatever the number of models that come of it.
    """
    now = context.with_student(trained)
    base_target, trained_target = (layers.target_of(each, collection) for each in (context, now))
    identity = {
        "version": VERSION,
        "base": base_target.fingerprint,
        "trained": trained_target.fingerprint,
        "evaluated": evaluated.content() if evaluated else None,
        "seed": context.config.seed,
    }
    target = stage(context.store, "drift", identity)
    if not context.start(target, f"drift of vectors on '{collection.name}'"):
        return target
    base = layers.run(context, collection)
    after = layers.run(now, collection, " with the trained model")
    queries, positives = layers.pairs_of(base)
    rows = []
    for name in layers.names_of(base):
        one, other = layers.vectors_of(base, name), layers.vectors_of(after, name)
        rows.append({"layer": name, **drift.compare(one, other, np.array(positives))})
    moved_Q = 1 - drift.cosines(one.queries_QD, other.queries_QD)  # at the last layer, the embedding
    change_Q = _changes(evaluated, queries) if evaluated else None
    found = {
        "queries": len(queries),
        "passages": len(one.passages_PD),
        "layers": rows,
        "query_ids": queries,
        "moved": moved_Q.tolist(),
        "change": None if change_Q is None else change_Q.tolist(),
        "spearman": None
        if change_Q is None
        else {
            "value": spearman(moved_Q, change_Q),
            "p": spearman_p(moved_Q, change_Q, seed=context.config.seed),
        },
    }
    (target.folder / "drift.json").write_json(_rounded(found))
    context.finish(target, ["drift.json"], rows=len(rows), queries=len(queries), collection=collection.name)
    return target


def facts_of(drifted: Stage) -> dict[str, Any]:
    """What a finished drift stage found.

    layers: a row each, the first one first, see ``drift.compare``. moved: 1 - cosine of each query's
    embedding before and after, by query_ids; change: of its nDCG@10; spearman: of the two, with its p.
    """
    found: dict[str, Any] = (drifted.folder / "drift.json").read_json()
    return found


def _changes(evaluated: Stage, queries: list[str]) -> Any:
    values = values_of(evaluated)
    return np.array([values["candidate"][q][METRIC] - values["base"][q][METRIC] for q in queries])


def _rounded(value: Any) -> Any:
    """To six digits: the last bits of sums differ between machines."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 6) if isinstance(value, float) else value
