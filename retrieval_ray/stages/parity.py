"""Does a teacher score alike on another engine or at another precision? Asked of what the store holds."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from retrieval_ray import trust
from retrieval_ray.artifacts import Location, Stage
from retrieval_ray.negatives import Scores
from retrieval_ray.stages.collection import Judged
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.scores import part_count, some_scores

_PAIRS = 1_000_000  # that are compared, about


def run(context: Context, judged: Judged) -> list[dict[str, Any]]:
    """This run's scores beside other finished ones by the same weights, on the pairs that both judged.

    Others are score stages of this store over the same corpus and queries whose teacher has the same model
    and other settings: precision, engine, lengths. Nothing is judged for this: where there is no such stage,
    nothing is compared, nor where a manifest is so old that it does not name the model.
    """
    found: list[dict[str, Any]] = []
    same_data = _same_data(context.store, judged.retrieved)
    for own in judged.scores.values():
        ours = own.manifest()
        for other in _stages(context.store, f"{own.name}-"):
            theirs = other.manifest()
            if "model" not in ours or theirs.get("model") != ours["model"]:
                continue
            if theirs["settings"] == ours["settings"] or other.identity.get("retrieved") not in same_data:
                continue
            one_N, other_N = _shared(own, other)
            if len(one_N):
                names = {"ours": ours["teacher"], "theirs": theirs["teacher"]}
                found.append({**names, **asdict(trust.parity(one_N, other_N))})
    return found


def _shared(own: Stage, other: Stage) -> tuple[Scores, Scores]:
    """Both runs' scores of pairs that both have judged, ``_PAIRS`` at most (about), by query and passage."""
    keys = ["query_id", "passage_id"]
    parts = min(part_count(own), part_count(other))
    rows = max(1, *(int(scores.manifest()["rows"]) for scores in (own, other)))
    first = math.ceil(parts * min(1.0, _PAIRS / rows))
    one, another = (some_scores(scores, (first, parts)) for scores in (own, other))
    both = one.join(another, keys, join_type="inner", right_suffix="_of_other", use_threads=False)
    both = both.sort_by([(key, "ascending") for key in keys])
    one_N, other_N = (both.column(name).to_numpy().astype(np.float64) for name in ("score", "score_of_other"))
    return one_N, other_N


def _same_data(store: Location, retrieved: Stage) -> set[str]:
    """The contents of all rankings of this corpus for these queries, this run's own among them."""
    return {
        other.content()
        for other in _stages(store, f"{retrieved.name}-")
        if all(other.identity[key] == retrieved.identity[key] for key in ("corpus", "queries"))
    }


def _stages(store: Location, prefix: str) -> Iterator[Stage]:
    """The finished stages of a store whose folder's name begins with the prefix."""
    for folder in store.names():
        if folder.startswith(prefix) and (store / folder / "manifest.json").exists():
            name, _, fingerprint = folder.rpartition("-")
            manifest = (store / folder / "manifest.json").read_json()
            yield Stage(name, fingerprint, manifest["identity"], store / folder)
