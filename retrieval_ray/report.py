"""Metrics and manifests -> one self-contained HTML page."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrieval_ray import plots, report_drift, report_training
from retrieval_ray.markup import cells, document, prose
from retrieval_ray.metrics import METRICS


@dataclass(frozen=True)
class Facts:
    """What the page shows of one corpus: metrics.json's document and the manifests behind it."""

    metrics: Mapping[str, Any]
    gate: Mapping[str, Any]
    groups: Mapping[str, Any]
    queries: Mapping[str, Any]
    corpus: Mapping[str, Any]
    per_query: Mapping[str, Mapping[str, Mapping[str, float]]]
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # dev nDCG@10: student, teacher
    parity: Sequence[Mapping[str, Any]] = ()  # the same weights on another engine or at another precision
    drift: Mapping[str, Any] | None = None  # what training did to vectors, where there was any


def page(
    corpora: Sequence[Facts],
    *,
    fit: Mapping[str, Any] | None,
    training: Mapping[str, Any] | None,
    speed: Mapping[str, Any] | None = None,
    rounds: int = 1,
) -> str:
    """The whole report as one HTML document; pictures are inline SVG, nothing is loaded.

    fit, training, speed: of the last of ``rounds``.
    """
    names = ", ".join(str(facts.metrics["dataset"]) for facts in corpora)
    sections = [section for facts in corpora for section in _corpus(facts)]
    if fit and training:
        sections.append(report_training.section(fit, training, speed, rounds))
    if drifts := {str(f.metrics["dataset"]): f.drift for f in corpora if f.drift is not None}:
        sections.append(report_drift.section(drifts))
    heading = f"<h1>{html.escape(names)}: base and adapted retriever</h1>"
    return document(names, heading + "".join(sections))


def _corpus(facts: Facts) -> list[str]:
    m = facts.metrics
    after = "candidate" if "candidate" in facts.per_query else "adapted"  # a candidate that lost, instead
    base, other = facts.per_query["base"], facts.per_query[after]
    trained = {"of these trained on": facts.groups["train"], "of these held out": facts.groups["dev"]}
    return [
        f"<h2>{html.escape(m['dataset'])} ({html.escape(m['split'])}, "
        f"{m['queries_judged']} judged queries)</h2>",
        f"<p class='verdict'>{_verdict(m)}</p>",
        _table(m["systems"]),
        plots.bars(facts.per_query),
        "<p class='note'>Each interval is of one system's mean. Base and adapted answer the same queries, so "
        "their difference, which is tested in pairs, can be clear where these intervals overlap.</p>",
        plots.changes(
            [other[q]["ndcg@10"] - base[q]["ndcg@10"] for q in base],
            f"Change of nDCG@10 per query, base to {after}",
            "judged queries, sorted by their change",
        ),
        "<h3>Queries: from collected to trained on</h3>",
        plots.funnel(
            m["queries"]["rejected"], m["queries"]["kept"], trained if m["training"] is not None else {}
        ),
        drops(facts.queries["rejected"], facts.queries["samples"]),
        drops(facts.groups["rejected"], facts.groups["samples"]),
        _passages(facts.corpus),
        left_out(facts.groups["left_out"]),
        "<h3>The teacher</h3>",
        f"<p>{_gate(facts.gate)}</p>",
        plots.scores(facts.groups["score_quantiles"], facts.gate["weights"]),
        "<p class='note'>Raw scores over all pairs that the teacher scored. Dark: the middle half of the "
        "pairs; light: the middle nine tenths; white: the median; the line runs from the lowest to the "
        "highest score. Narrow bars: nearly the same score for most pairs.</p>",
        *trust(facts.groups["trust"], facts.beside, facts.parity),
    ]


def drops(rejected: Mapping[str, int], samples: Mapping[str, Sequence[str]]) -> str:
    """A table of dropped queries: reason, count, and a few of each to look at."""
    if not rejected:
        return ""
    rows = [
        f"<tr><td>{html.escape(reason.replace('_', ' '))}<td>{count:,}"
        f"<td>{'<br>'.join(html.escape(text) for text in samples.get(reason, ()))}"
        for reason, count in sorted(rejected.items(), key=lambda item: (-item[1], item[0]))
    ]
    return f"<table><tr><th>dropped as<th>queries<th>for example{''.join(rows)}</table>"


def _passages(corpus: Mapping[str, Any]) -> str:
    if not corpus["rejected"]:
        return ""
    reasons = ", ".join(
        f"{reason.replace('_', ' ')} {count:,}" for reason, count in sorted(corpus["rejected"].items())
    )
    return f"<p>Of {corpus['rows']:,} passages some take no part in training: {html.escape(reasons)}.</p>"


def left_out(found: Mapping[str, Any]) -> str:
    """Passages that the lists' rules kept out of the negatives."""
    masked = {int(count): lists for count, lists in found["masked"].items()}
    if not any(masked):
        return "<p>No passage was masked as a suspected false negative.</p>"
    lists = sum(masked.values())
    text = (
        f"<p>{sum(count * number for count, number in masked.items()):,} passages of {lists:,} training "
        "lists are masked from InfoNCE as suspected false negatives."
    )
    if found["too_close"]:
        text += (
            f" {found['too_close']:,} of them, in {found['lists_too_close']:,} lists, are over the margin "
            f"and stand in no list; in {found['lists_filled_deeper']:,} lists a deeper rank took the place."
        )
    return (
        text + "</p>" + plots.counts(masked, "Training lists by passages masked", "masked passages of a list")
    )


def trust(
    found: Mapping[str, Any],
    beside: Mapping[str, tuple[float, float]],
    parity: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The teacher on single queries: judged ones beside the student, all others by what can be seen."""
    parts = []
    if beside:
        parts += [
            plots.changes(
                [teacher - student for student, teacher in beside.values()],
                "nDCG@10 per judged dev query, teacher against student",
                "judged dev queries, sorted by the difference",
            ),
            _losses(found["losses"]),
        ]
    if found["agreement"]:
        rows = {f"{name}, tau": row["tau"] for name, row in found["agreement"].items()}
        rows |= {f"{name}, overlap@10": row["overlap@10"] for name, row in found["agreement"].items()}
        kinds = found["kinds"]
        parts += [
            plots.ranges(rows, "Agreement with each retriever, over training queries", (-1, 1)),
            "<p class='note'>tau: Kendall's, between a retriever's order of the judged pool and the "
            "teacher's, 1 is the same order; overlap@10: the share of a retriever's first ten among the "
            "teacher's. The number is the median. A teacher that always agrees has nothing to teach; one "
            "that never does is better, or broken.</p>",
            plots.ranges(
                {f"{kind} ({row['queries']:,})": row["spread"] for kind, row in kinds.items()},
                "How far the teacher tells a query's passages apart: deviation of its scores in a pool",
            ),
            _kinds(kinds),
            _inverted(found["inverted"]),
        ]
    return [*parts, *(_parity(row) for row in parity)]


def _losses(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>On no judged dev query does the teacher fall behind the student.</p>"
    return "<p>Where the teacher falls behind most:</p>" + prose(
        ["query", "student", "teacher", "a relevant passage", "its ranks", "the teacher's first"],
        (
            [
                row["query"], f"{row['student']:.3f}", f"{row['teacher']:.3f}", row["relevant"],
                f"student {row['student_rank'] or '–'}, teacher {row['teacher_rank'] or '–'}",
                row["teacher_first"],
            ]
            for row in rows
        ),
    )  # fmt: skip


def _kinds(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    return cells(
        ["queries of kind", "with a pool", "source in the pool", "source not first", "inverted"],
        (
            [
                kind, f"{row['queries']:,}", f"{row['sources']:,}",
                "–" if row["not_first"] is None else f"{row['not_first']:.1%}", f"{row['inverted']:.1%}",
            ]
            for kind, row in kinds.items()
        ),
        marked="",
    )  # fmt: skip


def _inverted(rows: Sequence[Mapping[str, Any]]) -> str:
    note = (
        "<p class='note'>Inverted: the passage that the query was written from, or, for a logged query, the "
        "retriever's first, stands in the lower half of the teacher's order.</p>"
    )
    if not rows:
        return note
    return note + prose(
        ["query", "kind", "should stand high", "teacher's rank", "gap", "the teacher's first"],
        (
            [
                row["query"], row["kind"], f"{row['anchor']}: {row['anchor_text']}",
                f"{row['rank']} of {row['depth']}", f"{row['gap']:.3g}", row["best_text"],
            ]
            for row in rows
        ),
    )  # fmt: skip


def _parity(row: Mapping[str, Any]) -> str:
    return (
        f"<p><b>Parity:</b> {html.escape(row['ours'])} against {html.escape(row['theirs'])}, the same "
        f"weights with other settings, on {row['pairs']:,} pairs that both judged: largest difference "
        f"{row['largest']:.3g}, mean {row['mean']:.3g} (scores deviate by {row['scale']:.3g}), rank "
        f"correlation {row['rank_correlation']:.4f}.</p>"
    )


def _verdict(m: Mapping[str, Any]) -> str:
    d = m["delta"]["ndcg@10"]
    if m["decision"] == "adapted":
        return (
            f"<b>The adapted model is returned.</b> nDCG@10 {m['systems']['base']['ndcg@10']:.4f} → "
            f"{m['systems']['adapted']['ndcg@10']:.4f} ({d['mean']:+.4f}, 95 % interval "
            f"{d['ci95'][0]:+.4f} to {d['ci95'][1]:+.4f}, p = {d['p']:.2g})."
        )
    why = (
        "the teacher did not prove better than it on the judged dev queries, so nothing was trained"
        if m["training"] is None
        else "no trained epoch was better on the dev queries"
    )
    return f"<b>The base model is returned:</b> {why}."


def _gate(gate: Mapping[str, Any]) -> str:
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in gate["weights"].items())
    if gate["passed"] is None:
        return (
            f"<b>Unproven here:</b> there are no judged dev queries, so nobody knows whether the "
            f"teacher is better than the student on this corpus. Weights: {weights}."
        )
    d = gate["difference"]
    return (
        f"<b>Gate {'passed' if gate['passed'] else 'not passed'}</b> on {gate['queries']} judged dev "
        f"queries (weights cross-fitted over five folds): student {gate['student']:.4f}, teacher "
        f"{gate['teacher']:.4f} nDCG@10 ({d['mean']:+.4f}, 95 % interval {d['low']:+.4f} to "
        f"{d['high']:+.4f}). Weights: {weights}."
    )


def _table(systems: Mapping[str, Mapping[str, float]]) -> str:
    rows = ([name, *(f"{values[metric]:.4f}" for metric in METRICS)] for name, values in systems.items())
    return cells(["system", *METRICS], rows, marked="adapted")
