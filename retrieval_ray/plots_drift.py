"""The report's pictures of what training did to vectors, as inline SVG."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from retrieval_ray.plots import BETTER, QUIET, WORSE, figure, legend

_ROLES = {"passages": "#1f6feb", "queries": "#d4881c"}
_MEASURES = {"cka": ("CKA", "-"), "cosine": ("cosine", "--")}
GAINS = {  # of the measures of an epoch
    "teacher_ndcg@10": ("training queries held out, the teacher's order", "#d4881c"),
    "dev_ndcg@10": ("judged dev queries", "#1f6feb"),
}


def layers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Likeness to the base model's vectors, by layer; a gap where it is undefined."""
    return figure(lambda ax: _layers(ax, rows), 3.2)


def _layers(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    lowest = 1.0
    for measure, (name, style) in _MEASURES.items():
        for role, colour in _ROLES.items():
            values = np.array([row[measure][role] for row in rows], dtype=float)  # None becomes nan
            if np.isfinite(values).any():
                lowest = min(lowest, float(np.nanmin(values)))
            ax.plot(values, style, marker="o", markersize=4, color=colour, label=f"{name}, {role}")
    ax.set_title("Likeness to the base model")
    _over_layers(ax, rows, lowest)


def beside(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """CKA of passages' vectors with the base model's, by layer, a line a trained model."""
    return figure(lambda ax: _beside(ax, models), 3.2)


def _beside(ax: Axes, models: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    lowest = 1.0
    for name, rows in models.items():
        values = np.array([row["cka"]["passages"] for row in rows], dtype=float)
        lowest = min(lowest, *values[np.isfinite(values)])
        ax.plot(values, marker="o", markersize=4, label=name)
    ax.set_title("CKA with the base model, passages")
    _over_layers(ax, next(iter(models.values())), lowest)


def _over_layers(ax: Axes, rows: Sequence[Mapping[str, Any]], lowest: float) -> None:
    """lowest: of the values that are drawn; the highest is 1."""
    ax.set_xticks(range(len(rows)), [row["layer"] for row in rows])
    bottom = min(0.95, lowest - 0.1 * (1 - lowest))
    ax.set_ylim(bottom, 1 + 0.05 * (1 - bottom))
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.grid(axis="y")
    ax.set_xlabel("layer")
    legend(ax)


def moves(moved_Q: Sequence[float], change_Q: Sequence[float]) -> str:
    """Each judged query: how far its vector moved, and by how much its nDCG@10 changed."""
    return figure(lambda ax: _moves(ax, np.array(moved_Q), np.array(change_Q)), 3.4)


def _moves(ax: Axes, moved_Q: Any, change_Q: Any) -> None:
    ax.axhline(0, color=QUIET, linewidth=1)
    for keep, colour, name in (
        (change_Q == 0, QUIET, "equal"), (change_Q > 0, BETTER, "better"), (change_Q < 0, WORSE, "worse")
    ):  # fmt: skip
        ax.scatter(
            moved_Q[keep], change_Q[keep], s=16, alpha=0.6, linewidths=0, color=colour,
            label=f"{int(keep.sum())} {name}",
        )  # fmt: skip
    ax.set_xlim(left=0)
    ax.grid()
    ax.set_title("Change of nDCG@10 by movement, a point a judged query")
    ax.set_xlabel("movement of the query's vector (1 - cosine of before and after)")
    legend(ax)


def gains(history: Sequence[Mapping[str, float]]) -> str:
    """Gains over the untouched model, by epoch, on training queries held out and on judged ones."""
    return figure(lambda ax: _gains(ax, history), 3.0)


def _gains(ax: Axes, history: Sequence[Mapping[str, float]]) -> None:
    epochs = [int(row["epoch"]) for row in history]
    ax.axhline(0, color=QUIET, linestyle="--", linewidth=1)
    for measure, (name, colour) in GAINS.items():
        gained = [row[measure] - history[0][measure] for row in history]
        ax.plot(epochs, gained, marker="o", color=colour, label=name)
    ax.locator_params(axis="x", integer=True)
    ax.margins(y=0.15)
    ax.grid(axis="y")
    ax.set_title("Gain of nDCG@10")
    ax.set_xlabel("epoch (0 is the untouched model)")
    legend(ax)
