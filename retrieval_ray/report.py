"""Metrics and manifests -> one self-contained HTML page with plots."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from retrieval_ray.metrics import METRICS

_COLOURS = {
    "base": "#8a8f98", "adapted": "#1f6feb", "teacher": "#d4881c", "bm25": "#5aa469",
    "candidate": "#b35c9e",
}  # fmt: skip
_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c2128;max-width:960px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{margin-top:2.2rem;font-size:1.2rem;border-bottom:1px solid #d0d7de}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;text-align:right;
border-bottom:1px solid #e4e8ec}td:first-child,th:first-child{text-align:left}
.verdict{padding:.9rem 1.2rem;border-radius:8px;background:#eef4ff;font-size:1.1rem}
svg{max-width:100%;height:auto}.note{color:#57606a;font-size:.9rem}
"""


@dataclass(frozen=True)
class Facts:
    """What the page shows of one corpus: metrics.json's document and the manifests behind it."""

    metrics: Mapping[str, Any]
    gate: Mapping[str, Any]
    groups: Mapping[str, Any]
    queries: Mapping[str, Any]
    per_query: Mapping[str, Mapping[str, Mapping[str, float]]]


def page(
    corpora: Sequence[Facts],
    *,
    fit: Mapping[str, Any] | None,
    training: Mapping[str, Any] | None,
) -> str:
    """The whole report as one HTML document; pictures are inline SVG, nothing is loaded."""
    names = ", ".join(str(facts.metrics["dataset"]) for facts in corpora)
    sections = [section for facts in corpora for section in _corpus(facts)]
    if fit and training:
        sections.append(_training(fit, training))
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>retrieval_ray: {html.escape(names)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(names)}: base and adapted retriever</h1>" + "".join(sections) + "</html>\n"
    )


def _corpus(facts: Facts) -> list[str]:
    m = facts.metrics
    return [
        f"<h2>{html.escape(m['dataset'])} ({html.escape(m['split'])}, "
        f"{m['queries_judged']} judged queries)</h2>",
        f"<p class='verdict'>{_verdict(m)}</p>",
        _table(m["systems"]),
        _figure(lambda ax: _bars(ax, facts), 8, 3.6),
        _figure(lambda ax: _per_query(ax, facts), 8, 3.0),
        "<h2>Queries: from collected to trained on</h2>",
        _figure(lambda ax: _funnel(ax, facts), 8, 3.0),
        "<h2>The teacher</h2>",
        f"<p>{_gate(facts.gate)}</p>",
        _figure(lambda ax: _scores(ax, facts), 8, 3.0),
        "<p class='note'>Raw scores of each teacher over all judged pairs, each scaled to its own "
        "range: a narrow curve means that the teacher hardly tells passages apart.</p>",
    ]


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
    head = "".join(f"<th>{metric}</th>" for metric in METRICS)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{values[metric]:.4f}</td>" for metric in METRICS)
        + "</tr>"
        for name, values in systems.items()
    )
    return f"<table><tr><th>system</th>{head}</tr>{rows}</table>"


def _bars(ax: Axes, facts: Facts) -> None:
    """Each system's mean with the bootstrap interval of that mean."""
    rng = np.random.default_rng(0)
    width = 0.8 / len(facts.per_query)
    for at, (system, queries) in enumerate(facts.per_query.items()):
        table_QM = np.array([[row[metric] for metric in METRICS] for row in queries.values()])
        draws = rng.integers(0, len(table_QM), (1000, len(table_QM)))
        spread = np.stack([table_QM[draw].mean(0) for draw in draws])
        low, high = np.percentile(spread, [2.5, 97.5], axis=0)
        mean_M = table_QM.mean(0)
        ax.bar(
            np.arange(len(METRICS)) + at * width,
            mean_M,
            width,
            yerr=np.maximum(0, [mean_M - low, high - mean_M]),
            label=system,
            color=_COLOURS[system],
            error_kw={"elinewidth": 1},
        )
    ax.set_xticks(np.arange(len(METRICS)) + 0.4 - width / 2, METRICS)
    ax.set_title("Before and after, with 95 % intervals")
    ax.legend(ncols=5, fontsize=8, frameon=False)


def _per_query(ax: Axes, facts: Facts) -> None:
    base, adapted = facts.per_query["base"], facts.per_query["adapted"]
    change = sorted((adapted[q]["ndcg@10"] - base[q]["ndcg@10"] for q in base), reverse=True)
    better, worse = sum(c > 0 for c in change), sum(c < 0 for c in change)
    ax.bar(range(len(change)), change, width=1.0, color=_COLOURS["adapted"])
    ax.axhline(0, color="#57606a", linewidth=0.8)
    ax.set_title(
        f"Change of nDCG@10 per query: {better} better, {worse} worse, {len(change) - better - worse} equal"
    )
    ax.set_xlabel("judged queries, sorted")


def _funnel(ax: Axes, facts: Facts) -> None:
    rejected = facts.metrics["queries"]["rejected"]
    kept = facts.metrics["queries"]["kept"]
    steps = [("collected", kept + sum(rejected.values()), "#8a8f98")]
    steps += [
        (f"dropped: {reason}", count, "#d97a7a")
        for reason, count in sorted(rejected.items(), key=lambda item: -item[1])
    ]
    steps += [
        ("kept", kept, "#5aa469"),
        ("of these trained on", facts.groups["train"], "#1f6feb"),
        ("of these held out", facts.groups["dev"], "#d4881c"),
    ]
    names, counts, colours = zip(*reversed(steps), strict=True)
    bars = ax.barh(names, counts, color=colours)
    ax.bar_label(bars, padding=3, fontsize=8)


def _scores(ax: Axes, facts: Facts) -> None:
    for teacher, quantiles in facts.groups["score_quantiles"].items():
        values = np.array(quantiles)
        span = values[-1] - values[0]
        shares = np.linspace(0, 1, len(values))
        ax.plot((values - values[0]) / span if span else values * 0, shares, label=teacher)
    ax.set_xlabel("raw score, lowest to highest")
    ax.set_ylabel("share of pairs below")
    ax.legend(fontsize=8, frameon=False)
    ax.set_title("Distribution of the teachers' scores")


def _training(fit: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    tau = training["temperatures"]
    return (
        "<h2>Training</h2>"
        f"<p>Batches of {training['batch_queries']} queries; temperatures: student "
        f"{tau['student']:.3g}, teacher {tau['teacher']:.3g}, InfoNCE {tau['infonce']:.3g}. "
        f"Epoch returned: {training['epoch']}"
        + (" (the untouched model)" if training["epoch"] == 0 else "")
        + ".</p>"
        + _figure(lambda ax: _loss(ax, fit), 8, 3.0)
        + _figure(lambda ax: _dev(ax, fit, training), 8, 3.0)
    )


def _loss(ax: Axes, fit: Mapping[str, Any]) -> None:
    for term, colour in (("kl", "#1f6feb"), ("infonce", "#d4881c")):
        ax.plot(
            [row["step"] for row in fit["steps"]],
            [row[term] for row in fit["steps"]],
            label=term,
            color=colour,
        )
    ax.set_yscale("log")
    ax.set_title("Training loss by step")
    ax.legend(fontsize=8, frameon=False)


def _dev(ax: Axes, fit: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    epochs = [row["epoch"] for row in fit["history"]]
    for name, colour in (
        ("dev_ndcg@10", "#1f6feb"), ("teacher_ndcg@10", "#5aa469"), ("dev_kl", "#d4881c"),
    ):  # fmt: skip
        if name in fit["history"][0]:
            values = [row[name] for row in fit["history"]]
            ax.plot(epochs, values, marker="o", label=name, color=colour)
    ax.axvline(training["epoch"], color="#57606a", linestyle=":", label="returned")
    ax.set_title("Dev measures by epoch (0 is the untouched model)")
    ax.legend(fontsize=8, frameon=False)


def _figure(draw: Callable[[Axes], None], width: float, height: float) -> str:
    figure, ax = plt.subplots(figsize=(width, height))
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    draw(ax)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "retrieval_ray"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
