"""The report's part on what training did to vectors, and whether it holds beyond training queries."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from retrieval_ray import plots_drift
from retrieval_ray.markup import cells, prose

_GEOMETRY = {
    "alignment": "alignment",
    "uniformity_passages": "uniformity of passages",
    "uniformity_queries": "uniformity of queries",
    "hubness": "hubness",
}
_MEANING = (
    "Alignment: mean squared distance of a query and its relevant passage, less is better. Uniformity: log "
    "mean exp(-2 distance²) of all pairs, the less, the more evenly spread; near 0 vectors have collapsed. "
    "Hubness: skewness of how often passages stand among queries' first ten; high, a few passages stand "
    "everywhere. InfoNCE pushes for the first two, and may pay for them in ranking.</p>"
)


def section(drifts: Mapping[str, Mapping[str, Any]]) -> str:
    """What the drift stages found, by corpus, as HTML."""
    parts = ["<h2>What training did to the vectors</h2>"]
    for name, found in drifts.items():
        if len(drifts) > 1:
            parts.append(f"<h3>{html.escape(name)}</h3>")
        parts += [
            f"<p>The trained model beside the base model, on {found['passages']:,} passages and "
            f"{found['queries']:,} judged queries.</p>",
            plots_drift.layers(found["layers"]),
            "<p class='note'>1: nothing moved. Cosine: mean over texts, between a text's vector before and "
            "after. CKA: whether the same texts are told apart, in whatever directions (linear, unbiased). "
            "A low cosine with a high CKA is a turn of the whole space, which by itself changes no ranking; "
            "a low CKA is another view of the texts: there most was learned, or forgotten.</p>",
            _geometry(found["layers"][-1]),
            "<p class='note'>Of the embedding. " + _MEANING,
            _moves(found),
            _every_layer(found["layers"]),
        ]
    return "".join(parts)


def comparison(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What several trainings of the same base model did to its vectors; each drift stage's facts by name."""
    last = {name: found["layers"][-1] for name, found in models.items()}
    base = next(iter(last.values()))["base"]
    rows = [["base", "–", "–", *(_number(base[key]) for key in _GEOMETRY)]]
    rows += [
        [
            name, _number(row["cka"]["passages"]), _number(row["cosine"]["passages"]),
            *(_number(row["trained"][key]) for key in _GEOMETRY),
        ]
        for name, row in last.items()
    ]  # fmt: skip
    return (
        plots_drift.beside({name: found["layers"] for name, found in models.items()})
        + cells(["model", "CKA", "cosine", *_GEOMETRY.values()], rows, marked="base")
        + "<p class='note'>Of the embedding; CKA and cosine of passages with the base model's. "
        + _MEANING
    )


def gains(fit: Mapping[str, Any]) -> str:
    """The gain on training queries beside that on judged ones; nothing where either was not measured."""
    history = fit["history"]
    if not plots_drift.GAINS.keys() <= history[0].keys():
        return ""
    return plots_drift.gains(history) + (
        "<p class='note'>Rising together: what is learned from the training queries holds for what people "
        "ask. Where the first still rises and the second falls or stands, training overfits to its own "
        "queries or to the teacher's taste: other query sources, fewer epochs or a better teacher may help, "
        "more of the same will not.</p>"
    )


def _geometry(row: Mapping[str, Any]) -> str:
    return cells(
        ["", "base", "trained"],
        ([name, _number(row["base"][key]), _number(row["trained"][key])] for key, name in _GEOMETRY.items()),
        marked="",
    )


def _moves(found: Mapping[str, Any]) -> str:
    if found["change"] is None:
        return ""
    related = found["spearman"]
    return plots_drift.moves(found["moved"], found["change"]) + (
        f"<p class='note'>Spearman's rank correlation of movement and change: {related['value']:+.3f} "
        f"(p = {related['p']:.2g}). Positive: the queries that moved furthest gained most; negative: they "
        "lost most, so training moves what had better stay.</p>"
    )


def _every_layer(rows: Sequence[Mapping[str, Any]]) -> str:
    """All figures, folded away."""
    roles = ("passages", "queries")
    table = prose(
        [
            "layer",
            *(f"{measure}, {role}" for measure in ("CKA", "cosine") for role in roles),
            *_GEOMETRY.values(),
        ],
        (
            [
                row["layer"],
                *(_number(row[measure][role]) for measure in ("cka", "cosine") for role in roles),
                *(
                    "→".join(_number(row[model][key], 2) for model in ("base", "trained"))
                    for key in _GEOMETRY
                ),
            ]
            for row in rows
        ),
    )
    return f"<details><summary>Every layer in figures, base→trained</summary>{table}</details>"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")
