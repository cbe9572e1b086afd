"""Counts rows, tokens and errors of every stage for Prometheus, through Ray's own exporter.

Called where work is done, in workers too, once a part, a request's reply or a training step: never a row.
What is counted is what this cluster has worked on, whichever job asked for it; a part that was done already
counts nothing. Ray puts ``ray_`` before the names and ``_total`` behind them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.metrics import Counter

# Names, what they count, and by which tag beside stage and collection.
ROWS = ("retrieval_ray_rows", "Rows that a stage has worked on: of training, its steps", ())
TOKENS = ("retrieval_ray_tokens", "Tokens that models have read (in) and written (out)", ("direction",))
ERRORS = ("retrieval_ray_errors", "Rejects, requests without a reply, steps not finite", ("reason",))
METRICS = (ROWS, TOKENS, ERRORS)

_early: list[tuple[Any, int, dict[str, str]]] = []  # counted before this process joined a cluster


def count(
    stage: str,
    collection: str,
    *,
    rows: int = 0,
    tokens: Mapping[str, int] | None = None,
    errors: Mapping[str, int] | None = None,
) -> None:
    """Add to what a stage has done on a collection. tokens: by direction (in, out); errors: by reason."""
    tags = {"stage": stage, "collection": collection}
    _early.append((ROWS, rows, tags))
    _early.extend((TOKENS, number, {**tags, "direction": way}) for way, number in (tokens or {}).items())
    _early.extend((ERRORS, number, {**tags, "reason": why}) for why, number in (errors or {}).items())
    if not ray.is_initialized():
        return
    for (name, what, more), number, own in _early:
        if number:
            # Made anew each time, which costs little: one of an earlier cluster would count for that alone.
            Counter(name, what, ("stage", "collection", *more)).inc(int(number), own)
    _early.clear()


@dataclass(frozen=True)
class Counted:
    """What a stage's parts count as. rows: which of a part's facts holds its rows."""

    stage: str
    collection: str
    rows: str = "rows"

    def part(self, facts: Mapping[str, Any]) -> None:
        """Count a part by what its worker returned: rows, tokens read and written, errors by reason."""
        count(
            self.stage,
            self.collection,
            rows=int(facts.get(self.rows, 0)),
            tokens={"in": int(facts.get("tokens", 0)), "out": int(facts.get("tokens_out", 0))},
            errors=facts.get("errors"),
        )
