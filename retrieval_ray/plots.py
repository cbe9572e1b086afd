"""The report's pictures, as inline SVG."""

import io
from collections.abc import Callable, Mapping, Sequence
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
    "balance": ("balance of experts", "#4f6d7a"),
}
_COLOURS = {
    "base": "#8a8f98", "adapted": "#1f6feb", "teacher": "#d4881c", "bm25": "#5aa469",
    "candidate": "#b35c9e",
}  # fmt: skip
_MORE_COLOURS = ("#7c5cc4", "#0f8a8a", "#a0522d", "#c2486b")  # teachers that are no system
_EXPERTS = (
    "#1f6feb", "#d4881c", "#5aa469", "#b35c9e", "#7c5cc4", "#0f8a8a", "#a0522d", "#8a8f98",
)  # fmt: skip
BETTER, WORSE, QUIET, INK = "#1f6feb", "#c8553d", "#8a8f98", "#1c2128"
_WIDTH = 9.6  # inches, the page's text width
_PLOT = {
    "svg.hashsalt": "retrieval_ray",
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "legend.frameon": False,
    "legend.fontsize": 10,
}
MEASURES = {
    "dev_ndcg@10": "nDCG@10 on judged dev queries",
    "teacher_ndcg@10": "nDCG@10 against the teacher's order",
    "dev_kl": "KL to the teacher",
}  # the first that was measured chooses the epoch


def bars(per_query: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Each system's mean of each metric, with the bootstrap interval of that mean."""
    return figure(lambda ax: _bars(ax, per_query), 3.6)


def _bars(ax: Axes, per_query: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    width = 0.8 / len(per_query)
    for at, (system, queries) in enumerate(per_query.items()):
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
            error_kw={"elinewidth": 1, "ecolor": INK},
        )
    ax.set_xticks(np.arange(len(METRICS)) + 0.4 - width / 2, METRICS)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    ax.set_title("Before and after, with 95 % intervals")
    legend(ax)


def changes(change_Q: Sequence[float], title: str, label: str) -> str:
    """Differences per query, sorted: how many are better, worse, equal."""
    return figure(lambda ax: _changes(ax, sorted(change_Q, reverse=True), title, label), 3.0)


def _changes(ax: Axes, ordered: Sequence[float], title: str, label: str) -> None:
    change = np.array(ordered)
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    ax.stairs(np.maximum(change, 0), fill=True, color=BETTER, label=f"{better} better")
    ax.stairs(np.minimum(change, 0), fill=True, color=WORSE, label=f"{worse} worse")
    ax.axhline(0, color=QUIET, linewidth=1, label=f"{len(change) - better - worse} equal")
    ax.set_xlim(0, len(change))
    if not (better or worse):
        ax.set_ylim(-1, 1)
        ax.text(len(change) / 2, 0.1, "no query changed", ha="center", color=QUIET)
    ax.grid(axis="y")
    ax.set_title(title)
    ax.set_xlabel(label)
    legend(ax)


def funnel(rejected: Mapping[str, int], kept: int, trained: Mapping[str, int]) -> str:
    """From collected to kept queries. trained: what became of the kept ones, by name."""
    return figure(lambda ax: _funnel(ax, rejected, kept, trained), 0.4 + 0.33 * (4 + len(rejected)))


def _funnel(ax: Axes, rejected: Mapping[str, int], kept: int, trained: Mapping[str, int]) -> None:
    """Each bar begins where the one above leaves off, so that what is dropped is seen to go."""
    left = kept + sum(rejected.values())
    steps = [("collected", 0, left, QUIET)]
    for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
        left -= count
        steps.append((f"dropped: {reason.replace('_', ' ')}", left, count, WORSE))
    steps.append(("kept", 0, kept, "#5aa469"))
    at = 0
    for (name, count), colour in zip(trained.items(), ("#1f6feb", "#d4881c"), strict=False):
        steps.append((name, at, count, colour))
        at += count
    names, lefts, counts, colours = zip(*reversed(steps), strict=True)
    bars = ax.barh(names, counts, left=lefts, color=colours, height=0.7)
    ax.bar_label(bars, [f"{count:,}" for count in counts], padding=4)
    ax.margins(x=0.08, y=0.02)
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def scores(quantiles: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> str:
    """Each teacher's spread on its own range; the ends are labelled with the scores there.

    quantiles: of each teacher's scores, at even steps from the lowest to the highest.
    """
    return figure(lambda ax: _scores(ax, quantiles, weights), 1.0 + 0.5 * len(quantiles))


def _scores(ax: Axes, quantiles: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> None:
    names = list(quantiles)
    more = iter(_MORE_COLOURS * len(names))
    for at, name in enumerate(names):
        values = np.array(quantiles[name])
        span = values[-1] - values[0] or 1.0
        scaled = (values - values[0]) / span
        low, q1, median, q3, high = np.interp(
            [0.05, 0.25, 0.5, 0.75, 0.95], np.linspace(0, 1, len(values)), scaled
        )
        colour = _COLOURS.get(name) or next(more)
        ax.plot([0, scaled[-1]], [at, at], color=colour, linewidth=1, zorder=1)
        _range(ax, at, (low, q1, median, q3, high), colour)
        ax.text(-0.01, at, f"{values[0]:.3g}", ha="right", va="center", color="#57606a")
        ax.text(1.01, at, f"{values[-1]:.3g}", ha="left", va="center", color="#57606a")
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


def ranges(rows: Mapping[str, Sequence[float]], title: str, within: tuple[float, float] | None = None) -> str:
    """Percentiles 5, 25, 50, 75, 95 of several things on one scale; within: its ends."""
    return figure(lambda ax: _ranges(ax, rows, title, within), 0.9 + 0.36 * len(rows))


def _ranges(
    ax: Axes, rows: Mapping[str, Sequence[float]], title: str, within: tuple[float, float] | None
) -> None:
    colours = iter((*_COLOURS.values(), *_MORE_COLOURS) * len(rows))
    for at, (name, percentiles) in enumerate(rows.items()):
        _range(ax, at, percentiles, _COLOURS.get(name) or next(colours))
        ax.annotate(
            f"{percentiles[2]:.2f}", (percentiles[4], at), (6, 0), textcoords="offset points", va="center"
        )
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.08)
    ax.set_xlim(*(within or (min(0.0, *(low for low, *_ in rows.values())), None)))
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_title(title)


def _range(ax: Axes, at: int, percentiles: Sequence[float], colour: str) -> None:
    """Dark: the middle half; light: the middle nine tenths; white: the median."""
    low, q1, median, q3, high = percentiles
    ax.barh(at, high - low, left=low, height=0.5, color="white")
    ax.barh(at, high - low, left=low, height=0.5, color=colour, alpha=0.35)
    ax.barh(at, q3 - q1, left=q1, height=0.5, color=colour)
    ax.plot([median, median], [at - 0.25, at + 0.25], color="white", linewidth=2)


def counts(histogram: Mapping[int, int], title: str, label: str) -> str:
    """How many lists have 0, 1, 2, ... of something."""
    return figure(lambda ax: _counts(ax, histogram, title, label), 2.6)


def _counts(ax: Axes, histogram: Mapping[int, int], title: str, label: str) -> None:
    ax.bar(list(histogram), list(histogram.values()), color=WORSE, width=0.9)
    ax.locator_params(axis="both", integer=True)
    ax.grid(axis="y")
    ax.set_title(title)
    ax.set_xlabel(label)


def loss(fit: Mapping[str, Any]) -> str:
    """Both terms of the training loss, by step."""
    return figure(lambda ax: _loss(ax, fit), 3.0)


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
    legend(ax)


def load(taken: Mapping[str, Sequence[int]], title: str) -> str:
    """Which share of a layer's tokens each expert took, a row a layer; dashed: even shares."""
    return figure(lambda ax: _load(ax, taken, title), 0.9 + 0.3 * len(taken))


def _load(ax: Axes, taken: Mapping[str, Sequence[int]], title: str) -> None:
    counts_LE = np.array(list(taken.values()), dtype=float)
    shares_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True)
    experts = shares_LE.shape[1]
    lefts_LE = np.cumsum(shares_LE, axis=1) - shares_LE
    for e, colour in zip(range(experts), _EXPERTS, strict=False):
        ax.barh(range(len(taken)), shares_LE[:, e], left=lefts_LE[:, e], height=0.7, color=colour)
    for e in range(1, experts):
        ax.axvline(e / experts, color=INK, linestyle="--", linewidth=0.8)
    ax.set_yticks(range(len(taken)), list(taken))
    ax.set_ylim(len(taken) - 0.5, -0.5)
    ax.set_xlim(0, 1)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_title(title)


def dev(fit: Mapping[str, Any], chosen: int) -> str:
    """The measure that chose the epoch; the others are on other scales."""
    return figure(lambda ax: _dev(ax, fit, chosen), 3.0)


def _dev(ax: Axes, fit: Mapping[str, Any], chosen: int) -> None:
    measure = next(name for name in MEASURES if name in fit["history"][0])
    values = {int(row["epoch"]): row[measure] for row in fit["history"]}
    ax.plot(list(values), list(values.values()), marker="o", color=_COLOURS["adapted"])
    ax.axhline(values[0], color=QUIET, linestyle="--", label="untouched model")
    ax.plot(
        chosen,
        values[chosen],
        "o",
        markersize=14,
        fillstyle="none",
        color=INK,
        label=f"returned: epoch {chosen}",
    )
    ax.locator_params(axis="x", integer=True)
    ax.margins(y=0.2)
    ax.grid(axis="y")
    ax.set_title(MEASURES[measure])
    ax.set_xlabel("epoch (0 is the untouched model)")
    legend(ax)


def legend(ax: Axes) -> None:
    """Beside the title, where it covers no data."""
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0.3, columnspacing=1.4)


def figure(draw: Callable[[Axes], None], height: float) -> str:
    """What ``draw`` draws, as wide as the page; height in inches."""
    with matplotlib.rc_context(_PLOT):
        canvas, ax = plt.subplots(figsize=(_WIDTH, height), layout="constrained")
        draw(ax)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        plt.close(canvas)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
