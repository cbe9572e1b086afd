"""The report's part on training: losses, dev measures, refreshes of negatives, what experts took."""

from collections.abc import Mapping, Sequence
from typing import Any

from retrieval_ray import plots, report_drift
from retrieval_ray.markup import cells


def section(
    fit: Mapping[str, Any], training: Mapping[str, Any], speed: Mapping[str, Any] | None, rounds: int
) -> str:
    """What ``fit.json`` and the train stage's manifest say, as HTML; of the last of ``rounds``.

    speed: of its steps (``throughput.speed``).
    """
    tau = training["temperatures"]
    return (
        "<h2>Training</h2>"
        f"<p>Batches of {training['batch_queries']} queries; temperatures: student "
        f"{tau['student']:.3g}, teacher {tau['teacher']:.3g}, InfoNCE {tau['infonce']:.3g}. "
        f"Epoch returned: {training['epoch']}"
        + (" (the untouched model)" if training["epoch"] == 0 else "")
        + f".{_rounds(rounds)}</p>"
        + _speed(speed)
        + _refreshes(training["refreshes"])
        + plots.loss(fit)
        + plots.dev(fit, training["epoch"])
        + report_drift.gains(fit)
        + _epochs(fit, training)
        + _load(fit)
    )


def _rounds(rounds: int) -> str:
    return "" if rounds < 2 else f" This is round {rounds}; each began with the student of the one before."


def _speed(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return ""
    shares = sorted(speed["shares"].items(), key=lambda item: -item[1])
    return (
        f"<p class='note'>A step's median: {speed['tokens_per_second']:,.0f} tokens a second, "
        f"{speed['matmul_share']:.0%} of what the device multiplies at best. Of the time "
        f"{', '.join(f'{part} {share:.1%}' for part, share in shares)}.</p>"
    )


def _refreshes(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far each refresh changed the negatives, and what it cost the teacher."""
    if not rows:
        return ""
    return cells(
        ["negatives of step", "used from", "corpus", "lists renewed", "new negatives", "judged", "known"],
        (
            [
                f"{row['mined_at']}", f"{row['used_from']}", name, f"{found['renewed']:,}",
                f"{found['new_negatives'] or 0:.1%}", f"{found['judged']:,}", f"{found['from_cache']:,}",
            ]
            for row in rows
            for name, found in row["corpora"].items()
        ),
        marked="",
    )  # fmt: skip


def _load(fit: Mapping[str, Any]) -> str:
    """What experts took, in training of the best trained epoch."""
    rows = [row for row in fit["load"] if row["epoch"] == fit["best_epoch"]]
    if not rows:
        return ""
    return plots.load(rows[0]["taken"], f"Share of tokens by expert, epoch {rows[0]['epoch']}") + (
        "<p class='note'>Each colour is an expert, each row a layer with experts; dashed: where all "
        "experts take alike.</p>"
    )


def _epochs(fit: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    measures = [name for name in plots.MEASURES if name in fit["history"][0]]
    rows = ([f"{row['epoch']:.0f}", *(f"{row[name]:.4f}" for name in measures)] for row in fit["history"])
    return cells(["epoch", *(plots.MEASURES[name] for name in measures)], rows, marked=str(training["epoch"]))
