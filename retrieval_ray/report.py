"""Metrics and manifests -> one self-contained HTML page with plots."""

import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from retrieval_ray.metrics import METRICS

_TERMS = {  # of the loss
    "infonce": ("InfoNCE", "#d4881c"),
    "infonce_list": ("InfoNCE of the list", "#a33ea1"),
    "kl": ("KL to the teacher", "#1f6feb"),
    "margin_mse": ("MarginMSE", "#2a9d5c"),
    "ranking": ("RankNet", "#7a6a4f"),
    "clp": ("CLP", "#c2334d"),
}
_COLOURS = {
    "base": "#8a8f98", "adapted": "#1f6feb", "teacher": "#d4881c", "bm25": "#5aa469",
    "candidate": "#b35c9e",
}  # fmt: skip
_MORE_COLOURS = ("#7c5cc4", "#0f8a8a", "#a0522d", "#c2486b")  # teachers that are no system
_BETTER, _WORSE, _QUIET, _INK = "#1f6feb", "#c8553d", "#8a8f98", "#1c2128"
_WIDTH = 9.6  # inches, the page's text width
_PLOT = {
    "svg.hashsalt": "retrieval_ray",
    "font.size": 10,
    "text.color": _INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _QUIET,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "legend.frameon": False,
    "legend.fontsize": 10,
}
_MEASURES = {
    "dev_ndcg@10": "nDCG@10 on judged dev queries",
    "teacher_ndcg@10": "nDCG@10 against the teacher's order",
    "dev_kl": "KL to the teacher",
}  # the first that was measured chooses the epoch
_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c2128;max-width:928px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{margin-top:2.4rem;font-size:1.3rem;border-bottom:1px solid #d0d7de}
h3{margin:2rem 0 .6rem;font-size:1.1rem}
table{border-collapse:collapse;margin:1rem 0 1.4rem;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .9rem;text-align:right;border-bottom:1px solid #e4e8ec}
td:first-child,th:first-child{text-align:left}tr.marked{font-weight:600;background:#eef4ff}
.verdict{padding:.9rem 1.2rem;border-radius:8px;background:#eef4ff;font-size:1.1rem}
svg{display:block;max-width:100%;height:auto;margin-top:1rem}.note{color:#57606a;font-size:.9rem}
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
        _figure(lambda ax: _bars(ax, facts), _WIDTH, 3.6),
        "<p class='note'>Each interval is of one system's mean. Base and adapted answer the same queries, so "
        "their difference, which is tested in pairs, can be clear where these intervals overlap.</p>",
        _figure(lambda ax: _per_query(ax, facts), _WIDTH, 3.0),
        "<h3>Queries: from collected to trained on</h3>",
        _figure(lambda ax: _funnel(ax, facts), _WIDTH, 0.4 + 0.33 * (4 + len(m["queries"]["rejected"]))),
        drops(facts.queries["rejected"], facts.queries["samples"]),
        "<h3>The teacher</h3>",
        f"<p>{_gate(facts.gate)}</p>",
        _figure(lambda ax: _scores(ax, facts), _WIDTH, 1.0 + 0.5 * len(facts.groups["score_quantiles"])),
        "<p class='note'>Raw scores over all pairs that the teacher scored. Dark: the middle half of the "
        "pairs; light: the middle nine tenths; white: the median; the line runs from the lowest to the "
        "highest score. Narrow bars: nearly the same score for most pairs.</p>",
    ]


def drops(rejected: Mapping[str, int], samples: Mapping[str, Sequence[str]]) -> str:
    """A table of what was dropped before retrieval: reason, count, and a few of each to look at."""
    if not rejected:
        return ""
    rows = [
        f"<tr><td>{html.escape(reason.replace('_', ' '))}<td>{count:,}"
        f"<td>{'<br>'.join(html.escape(text) for text in samples.get(reason, ()))}"
        for reason, count in sorted(rejected.items(), key=lambda item: (-item[1], item[0]))
    ]
    return f"<table><tr><th>dropped as<th>queries<th>for example{''.join(rows)}</table>"


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
    return _cells(["system", *METRICS], rows, marked="adapted")


def _cells(head: Sequence[str], rows: Iterable[Sequence[str]], *, marked: str) -> str:
    """A table; the row that begins with ``marked`` stands out."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=marked' * (row[0] == marked)}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _bars(ax: Axes, facts: Facts) -> None:
    """Each system's mean with the bootstrap interval of that mean."""
    width = 0.8 / len(facts.per_query)
    for at, (system, queries) in enumerate(facts.per_query.items()):
        table_QM = np.array([[row[metric] for metric in METRICS] for row in queries.values()])
        rng = np.random.default_rng(0)  # the same draws for every system
        draws = rng.integers(0, len(table_QM), (1000, len(table_QM)))
        spread = np.stack([table_QM[draw].mean(0) for draw in draws])
        low, high = np.percentile(spread, [2.5, 97.5], axis=0)
        mean_M = table_QM.mean(0)
        ax.bar(
            np.arange(len(METRICS)) + at * width,
            mean_M,
            0.94 * width,
            yerr=np.maximum(0, [mean_M - low, high - mean_M]),
            label=system,
            color=_COLOURS[system],
            error_kw={"elinewidth": 1, "ecolor": _INK},
        )
    ax.set_xticks(np.arange(len(METRICS)) + 0.4 - width / 2, METRICS)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    ax.set_title("Before and after, with 95 % intervals")
    _legend(ax)


def _per_query(ax: Axes, facts: Facts) -> None:
    """What was returned against the base; a candidate, where one was trained and lost, instead."""
    after = "candidate" if "candidate" in facts.per_query else "adapted"
    base, other = facts.per_query["base"], facts.per_query[after]
    change = np.array(sorted((other[q]["ndcg@10"] - base[q]["ndcg@10"] for q in base), reverse=True))
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    ax.stairs(np.maximum(change, 0), fill=True, color=_BETTER, label=f"{better} better")
    ax.stairs(np.minimum(change, 0), fill=True, color=_WORSE, label=f"{worse} worse")
    ax.axhline(0, color=_QUIET, linewidth=1, label=f"{len(change) - better - worse} equal")
    ax.set_xlim(0, len(change))
    if not (better or worse):
        ax.set_ylim(-1, 1)
        ax.text(len(change) / 2, 0.1, "no query changed", ha="center", color=_QUIET)
    ax.grid(axis="y")
    ax.set_title(f"Change of nDCG@10 per query, base to {after}")
    ax.set_xlabel("judged queries, sorted by their change")
    _legend(ax)


def _funnel(ax: Axes, facts: Facts) -> None:
    """Each bar begins where the one above leaves off, so that what is dropped is seen to go."""
    rejected = facts.metrics["queries"]["rejected"]
    kept, train, dev = facts.metrics["queries"]["kept"], facts.groups["train"], facts.groups["dev"]
    left = kept + sum(rejected.values())
    steps = [("collected", 0, left, _QUIET)]
    for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
        left -= count
        steps.append((f"dropped: {reason.replace('_', ' ')}", left, count, _WORSE))
    steps.append(("kept", 0, kept, "#5aa469"))
    if facts.metrics["training"] is not None:
        steps.append(("of these trained on", 0, train, "#1f6feb"))
        steps.append(("of these held out", train, dev, "#d4881c"))
    names, lefts, counts, colours = zip(*reversed(steps), strict=True)
    bars = ax.barh(names, counts, left=lefts, color=colours, height=0.7)
    ax.bar_label(bars, [f"{count:,}" for count in counts], padding=4)
    ax.margins(x=0.08, y=0.02)
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _scores(ax: Axes, facts: Facts) -> None:
    """Each teacher's spread on its own range; the ends are labelled with the scores there."""
    names = list(facts.groups["score_quantiles"])
    more = iter(_MORE_COLOURS * len(names))
    for at, name in enumerate(names):
        values = np.array(facts.groups["score_quantiles"][name])
        span = values[-1] - values[0] or 1.0
        scaled = (values - values[0]) / span
        low, q1, median, q3, high = np.interp(
            [0.05, 0.25, 0.5, 0.75, 0.95], np.linspace(0, 1, len(values)), scaled
        )
        colour = _COLOURS.get(name) or next(more)
        ax.plot([0, scaled[-1]], [at, at], color=colour, linewidth=1, zorder=1)
        ax.barh(at, high - low, left=low, height=0.5, color="white")
        ax.barh(at, high - low, left=low, height=0.5, color=colour, alpha=0.35)
        ax.barh(at, q3 - q1, left=q1, height=0.5, color=colour)
        ax.plot([median, median], [at - 0.25, at + 0.25], color="white", linewidth=2)
        ax.text(-0.01, at, f"{values[0]:.3g}", ha="right", va="center", color="#57606a")
        ax.text(1.01, at, f"{values[-1]:.3g}", ha="left", va="center", color="#57606a")
    weights = facts.gate["weights"]
    ax.set_yticks(
        range(len(names)),
        [f"{name} (weight {weights[name]:.3g})" if name in weights else name for name in names],
    )
    ax.set_xlim(-0.1, 1.08)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.xaxis.set_visible(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_title("How far each scorer spreads its scores, lowest to highest")


def _training(fit: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    tau = training["temperatures"]
    return (
        "<h2>Training</h2>"
        f"<p>Batches of {training['batch_queries']} queries; temperatures: student "
        f"{tau['student']:.3g}, teacher {tau['teacher']:.3g}, InfoNCE {tau['infonce']:.3g}. "
        f"Epoch returned: {training['epoch']}"
        + (" (the untouched model)" if training["epoch"] == 0 else "")
        + ".</p>"
        + _figure(lambda ax: _loss(ax, fit), _WIDTH, 3.0)
        + _figure(lambda ax: _dev(ax, fit, training), _WIDTH, 3.0)
        + _epochs(fit, training)
    )


def _epochs(fit: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    measures = [name for name in _MEASURES if name in fit["history"][0]]
    rows = ([f"{row['epoch']:.0f}", *(f"{row[name]:.4f}" for name in measures)] for row in fit["history"])
    return _cells(["epoch", *(_MEASURES[name] for name in measures)], rows, marked=str(training["epoch"]))


def _loss(ax: Axes, fit: Mapping[str, Any]) -> None:
    for term, (name, colour) in _TERMS.items():
        if any(term in row for row in fit["steps"]):
            ax.plot(
                [row["step"] for row in fit["steps"]],
                [row[term] for row in fit["steps"]],
                label=name,
                color=colour,
            )
    ax.set_yscale("log")
    ax.grid(axis="y")
    ax.set_title("Training loss by step (log scale, before weighting)")
    ax.set_xlabel("step")
    _legend(ax)


def _dev(ax: Axes, fit: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """The measure that chose the epoch; the table below has the others, which are on other scales."""
    measure = next(name for name in _MEASURES if name in fit["history"][0])
    values = {int(row["epoch"]): row[measure] for row in fit["history"]}
    ax.plot(list(values), list(values.values()), marker="o", color=_COLOURS["adapted"])
    ax.axhline(values[0], color=_QUIET, linestyle="--", label="untouched model")
    chosen = training["epoch"]
    ax.plot(
        chosen,
        values[chosen],
        "o",
        markersize=14,
        fillstyle="none",
        color=_INK,
        label=f"returned: epoch {chosen}",
    )
    ax.locator_params(axis="x", integer=True)
    ax.margins(y=0.2)
    ax.grid(axis="y")
    ax.set_title(_MEASURES[measure])
    ax.set_xlabel("epoch (0 is the untouched model)")
    _legend(ax)


def _legend(ax: Axes) -> None:
    """Beside the title, where it covers no data."""
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.3, columnspacing=1.4)


def _figure(draw: Callable[[Axes], None], width: float, height: float) -> str:
    with matplotlib.rc_context(_PLOT):
        figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
        draw(ax)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
