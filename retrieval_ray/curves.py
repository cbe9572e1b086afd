"""A training's log as curves, and a run's results as single numbers: what trackers are told.

Names hold letters, digits and `` _-./`` alone, since some trackers refuse others: nDCG@10 is ``ndcg_at_10``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_NAMES = {"lr": "learning_rate", "norm": "grad_norm"}
_NOT_CURVES = ("step", "epoch", "time")
_SECRET = re.compile(r"(^|_)(key|token|secret|password|authorization)$", re.IGNORECASE)
_REFUSED = re.compile(r"[^\w\-./ ]")
_LONGEST = 500  # characters of a parameter: MLflow takes some thousand


@dataclass(frozen=True)
class Row:
    """What is known of one step. time: when, in seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]


Curves = dict[str, list[Row]]  # "train": a row a step; "dev": a row an epoch


def curves(
    steps: Sequence[Mapping[str, float]],
    epochs: Sequence[Mapping[str, float]],
    *,
    learning_rate: float,
    start: int = 0,
) -> Curves:
    """The rows of ``steps.jsonl`` and ``epochs.jsonl`` as curves.

    learning_rate: at its peak; the log holds shares of it. start: the step of the untouched student.
    An epoch's time is that of its last step, and the first one's for the untouched student.
    """
    times = {row["step"]: row["time"] for row in steps}
    first = steps[0]["time"] - steps[0]["seconds"] if steps else 0.0
    train = [
        Row(
            start + int(row["step"]),
            row["time"],
            {
                f"train/{_NAMES.get(name, name)}": value * (learning_rate if name == "lr" else 1.0)
                for name, value in row.items()
                if name not in _NOT_CURVES
            },
        )
        for row in steps
    ]
    dev = [
        Row(
            start + int(row["step"]),
            times.get(row["step"], first),
            {
                f"dev/{_plain(name.removeprefix('dev_'))}": value
                for name, value in row.items()
                if name not in _NOT_CURVES
            },
        )
        for row in epochs
    ]
    return {"train": train, "dev": dev}


def after(found: Curves, last: Mapping[str, int]) -> Curves:
    """The rows of each curve after the last step that is known of it."""
    return {name: [row for row in rows if row.step > last.get(name, -1)] for name, rows in found.items()}


def results(document: Mapping[str, Any]) -> dict[str, float]:
    """Every system's metrics on the test split, and base against adapted, out of ``metrics.json``."""
    found: dict[str, float] = {}
    for corpus in document.get("datasets", {"": document}).values():
        prefix = f"test/{corpus['dataset']}" if "datasets" in document else "test"
        for system, values in corpus["systems"].items():
            found |= {f"{prefix}/{system}/{name}": value for name, value in values.items()}
        for name, difference in corpus["delta"].items():
            found |= {f"{prefix}/delta/{name}": difference["mean"], f"{prefix}/p/{name}": difference["p"]}
    return {_plain(name): float(value) for name, value in found.items()}


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """A nested config as text by dotted keys, without what must stay secret.

    A URL loses user, password and query; the text of a key that is named like a secret is not told.
    """
    return {_plain(key): _told(key, value) for key, value in _flat(config, "")}


def _plain(name: str) -> str:
    return _REFUSED.sub("_", name.replace("@", "_at_"))


def _flat(value: Any, key: str) -> "chain[tuple[str, Any]]":
    if isinstance(value, Mapping) and value:
        inner = [_flat(each, f"{key}.{name}" if key else str(name)) for name, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        inner = [_flat(each, f"{key}.{number}") for number, each in enumerate(value)]
    else:
        return chain([(key, value)])
    return chain.from_iterable(inner)


def _told(key: str, value: Any) -> str:
    text = str(value)
    if isinstance(value, str) and _SECRET.search(key.rpartition(".")[2]):
        return "(not told)"
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        text = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return text[:_LONGEST]
