"""The pictures of a sweep's page, as inline SVG."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from retrieval_ray.plots import figure, legend
from retrieval_ray.selection import gain
from retrieval_ray.sweeps import Choices, Level, Range, Setting, Space, Trial, label

_BEST, _OTHER, _QUIET, _INK = "#1f6feb", "#b9c0c9", "#8a8f98", "#1c2128"
_SHOWN = 12  # settings whose learning curves have a name


def effect(name: str, levels: Sequence[Level]) -> str:
    """The mean gain of a parameter's levels, with 95 % intervals."""
    return figure(lambda ax: _effect(ax, name, levels), 0.9 + 0.36 * len(levels))


def _effect(ax: Axes, name: str, levels: Sequence[Level]) -> None:
    best = max(level.gain.mean for level in levels)
    for at, level in enumerate(levels):
        g = level.gain
        colour = _BEST if g.mean == best else _QUIET
        ax.plot([g.low, g.high], [at, at], color=colour, linewidth=2)
        ax.plot(g.mean, at, "o", color=colour)
        ax.annotate(f"{g.mean:+.4f}", (g.high, at), (7, 0), textcoords="offset points", va="center")
    ax.axvline(0, color=_QUIET, linewidth=1, linestyle="--")
    ax.set_yticks(range(len(levels)), [f"{each.label} ({each.trials})" for each in levels])
    ax.set_ylim(len(levels) - 0.5, -0.5)
    ax.margins(x=0.12)
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_title(f"{name}: gain on dev queries by level (trials)")


def against(name: str, parameter: Range, trials: Sequence[Trial]) -> str:
    """Gain against the values of a range, a dot a trial."""
    return figure(lambda ax: _against(ax, name, parameter, trials), 3.0)


def _against(ax: Axes, name: str, parameter: Range, trials: Sequence[Trial]) -> None:
    shown = [trial for trial in trials if not math.isnan(trial.gain)]
    ax.plot([trial.point[name] for trial in shown], [trial.gain for trial in shown], "o", color=_BEST)
    ax.axhline(0, color=_QUIET, linewidth=1, linestyle="--")
    if parameter.log:
        ax.set_xscale("log")
    ax.grid(axis="y")
    ax.set_title(f"{name}: gain on dev queries of each trial")
    ax.set_xlabel(name)


def parallel(space: Space, settings: Sequence[Setting]) -> str:
    """Every setting as a line through its parameters to its gain; the best one stands out."""
    return figure(lambda ax: _parallel(ax, space, settings), 4.2)


def _parallel(ax: Axes, space: Space, settings: Sequence[Setting]) -> None:
    shown = [setting for setting in settings if math.isfinite(setting.gain)]
    gains = np.array([setting.gain for setting in shown])
    low, high = gains.min(), gains.max()
    at_gain = (gains - low) / (high - low) if high > low else np.full(len(gains), 0.5)
    columns = [*(_places(name, space[name], shown) for name in space), at_gain.tolist()]
    colours = plt.get_cmap("viridis")(0.9 * at_gain)
    for n in reversed(range(len(shown))):
        style = {"color": _BEST, "linewidth": 3.0} if n == 0 else {"color": colours[n], "linewidth": 1.2}
        ax.plot(range(len(columns)), [column[n] for column in columns], alpha=0.9, **style)
    for x, name in enumerate(space):
        ax.axvline(x, color=_QUIET, linewidth=0.8)
        for place, text in _ticks(space[name]):
            ax.annotate(text, (x, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    x = len(space)
    ax.axvline(x, color=_QUIET, linewidth=0.8)
    for place, value in ((0.0, low), (1.0, high)) if high > low else ((0.5, low),):
        ax.annotate(f"{value:+.4f}", (x, place), (5, 0), textcoords="offset points", va="center")
    ax.set_xticks(range(x + 1), [*(name.rpartition(".")[2] for name in space), "gain"])
    ax.set_xlim(-0.1, x + 0.45)
    ax.yaxis.set_visible(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(axis="x", length=0)
    ax.set_title("Every setting, from its parameters to its gain; blue: the best")


def _places(name: str, parameter: Range | Choices, settings: Sequence[Setting]) -> list[float]:
    return [_place(parameter, setting.point[name]) for setting in settings]


def _place(parameter: Range | Choices, value: object) -> float:
    """Where a value stands on its axis, from 0 to 1."""
    if isinstance(parameter, Choices):
        labels = list(parameter.settings)
        return labels.index(str(value)) / max(1, len(labels) - 1)
    number, low, high = float(str(value)), parameter.low, parameter.high
    if parameter.log:
        return math.log(number / low) / math.log(high / low)
    return (number - low) / (high - low)


def _ticks(parameter: Range | Choices) -> list[tuple[float, str]]:
    if isinstance(parameter, Choices):
        return [(_place(parameter, each), each) for each in parameter.settings]
    return [(0.0, label(float(parameter.low))), (1.0, label(float(parameter.high)))]


def curves(settings: Sequence[Setting]) -> str:
    """The gain of every trial by epoch, the best setting's in blue."""
    return figure(lambda ax: _curves(ax, settings), 3.2)


def _curves(ax: Axes, settings: Sequence[Setting]) -> None:
    colours = plt.get_cmap("tab10")
    for n, setting in reversed(list(enumerate(settings))):
        colour = _BEST if n == 0 else colours(n % 10) if len(settings) <= _SHOWN else _OTHER
        name = setting.name() if n == 0 or len(settings) <= _SHOWN else None
        for trial in setting.trials:
            rows = _gains(trial)
            ax.plot(list(rows), list(rows.values()), color=colour, marker=".", label=name)
            name = None
    ax.axhline(0, color=_QUIET, linewidth=1, linestyle="--")
    ax.locator_params(axis="x", integer=True)
    ax.grid(axis="y")
    ax.set_title("Gain on dev queries by epoch")
    ax.set_xlabel("epoch (0 is the untouched student)")
    if len(settings) <= _SHOWN:
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    else:
        legend(ax)


def _gains(trial: Trial) -> Mapping[int, float]:
    return {int(row["epoch"]): gain(trial.history, int(row["epoch"])) for row in trial.history}
