"""What a job will do, take, store and cost: sums over its stages, as a table, and how close they came.

Arithmetic on values. How much a stage does is ``amounts.py``'s; what a row of it takes is measured.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GIB = 2.0**30


@dataclass(frozen=True)
class Prices:
    """Of an hour of one worker, a million tokens of an endpoint, a GiB kept for a month; None: not known."""

    worker_hour: float | None = None
    tokens_in_million: float | None = None
    tokens_out_million: float | None = None
    gib_month: float | None = None

    def any(self) -> bool:
        """Whether there is one."""
        return any(price is not None for price in asdict(self).values())


@dataclass(frozen=True)
class Rate:
    """What a row takes. seconds: of one worker; None: not known."""

    seconds: float | None
    start: float = 0.0  # seconds before the first row: workers start, a model is loaded
    tokens: float = 0.0

    def of(self, rows: float, workers: int = 1) -> float | None:
        """Seconds of that many workers for these rows."""
        return None if self.seconds is None else self.start + rows * self.seconds / workers


@dataclass(frozen=True)
class Work:
    """What one stage will do."""

    stage: str  # as its manifest names it, of encoding with the role: encode-passage
    label: str  # of a line of the table; what has the same label is added up there
    unit: str
    rows: float  # as its manifest will say
    at_most: bool = False
    calls: float = 0.0  # of a model: texts it reads, pairs it judges, requests it answers
    tokens_in: float = 0.0
    tokens_out: float = 0.0
    paid: bool = False  # by the token, to an endpoint
    seconds: float | None = 0.0  # of the clock; None: not known
    workers: int = 1
    gpus: float = 0.0  # of each worker
    stored: float = 0.0  # bytes, for good
    done: bool = False  # then all amounts are 0

    @property
    def worker_hours(self) -> float:
        """0 where they are not known."""
        return (self.seconds or 0.0) * self.workers / 3600

    def finished(self) -> "Work":
        """The same stage where the store has it already."""
        return Work(self.stage, self.label, self.unit, 0, seconds=0.0, done=True)


@dataclass(frozen=True)
class Total:
    """Sums over stages."""

    at_most: bool
    calls: float
    tokens_in: float
    tokens_out: float
    gpu_hours: float
    cpu_hours: float  # of workers without a GPU
    stored: float
    unknown: bool  # whether some stage's hours are not known, and so not in the sums

    @classmethod
    def of(cls, works: Sequence[Work]) -> "Total":
        """Nothing is stored twice, and one stage runs at a time: the whole is the sum of its parts."""
        return cls(
            at_most=any(work.at_most for work in works),
            calls=sum(work.calls for work in works),
            tokens_in=sum(work.tokens_in for work in works),
            tokens_out=sum(work.tokens_out for work in works),
            gpu_hours=sum(work.worker_hours * work.gpus for work in works),
            cpu_hours=sum(work.worker_hours for work in works if not work.gpus),
            stored=sum(work.stored for work in works),
            unknown=any(work.seconds is None for work in works),
        )


def money(work: Work, prices: Prices) -> float:
    """Of one stage: its workers' hours, the tokens of an endpoint, a month of what it stores.

    What has no price costs nothing. In the currency of the prices.
    """
    tokens = 0.0
    if work.paid:
        tokens += work.tokens_in * (prices.tokens_in_million or 0.0) / 1e6
        tokens += work.tokens_out * (prices.tokens_out_million or 0.0) / 1e6
    hours = work.worker_hours * (prices.worker_hour or 0.0)
    return hours + tokens + work.stored / GIB * (prices.gib_month or 0.0)


def table(works: Sequence[Work], prices: Prices) -> list[str]:
    """A line a stage and one of totals, below a heading; without prices no money."""
    head = ["stage", "rows", "calls", "tokens in", "tokens out", "worker hours", "stored"]
    total = Total.of(works)
    rows = [head, *(_cells(group) for group in _by_label(works))]
    last = ["total, at most" if total.at_most else "total", "", _count(total.calls)]
    last += [_count(total.tokens_in), _count(total.tokens_out)]
    last += [_hours(total.gpu_hours, total.cpu_hours, total.unknown), _bytes(total.stored)]
    rows.append(last)
    if prices.any():
        costs = [sum(money(work, prices) for work in group) for group in _by_label(works)]
        for row, cell in zip(rows, ["money", *(f"{c:,.2f}" for c in (*costs, sum(costs)))], strict=True):
            row.append("" if row[1] == "done" else cell)
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def compared(foreseen: Work, happened: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """By what is counted: foreseen, happened, and the ratio of the two, None where it says nothing.

    happened: rows, seconds, bytes, and of what asks an LLM tokens_in and tokens_out.
    """
    expected = {**asdict(foreseen), "bytes": foreseen.stored}
    found: dict[str, dict[str, float | None]] = {}
    for name, value in happened.items():
        before = expected[name]
        ratio = value / before if before else None
        found[name] = {"foreseen": _rounded(before), "happened": value, "ratio": _rounded(ratio)}
    return found


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Work]:
    """What ``asdict`` made of works."""
    return [Work(**row) for row in rows]


class Ledger:
    """What was foreseen of the stages of a run, and which of them the run has come to.

    A run comes to the stages of one name in the order in which they were foreseen; those that are made
    within another (pools within scores, all that a refresh makes within training) belong to that one.
    """

    def __init__(self, works: Sequence[Work] = ()) -> None:
        self.foreseen: dict[str, list[Work]] = {}
        for work in works:
            self.foreseen.setdefault(work.stage, []).append(work)
        self.seen: Counter[str] = Counter()
        self.open: dict[str, tuple[str, Work | None]] = {}  # by fingerprint: name, what was foreseen of it
        self.inner: dict[str, int] = {}  # bytes of what was made within a stage

    def reused(self, stage: str) -> None:
        """The run has come to a stage that is done."""
        if not self._around(stage):
            self._next(stage)

    def begun(self, stage: str, fingerprint: str) -> None:
        """The run works on a stage from now on."""
        self.open[fingerprint] = (stage, None if self._around(stage) else self._next(stage))

    def ended(self, fingerprint: str, size: int, happened: Mapping[str, float]) -> dict[str, Any] | None:
        """What was foreseen of a stage beside what happened; None where nothing was. size: bytes it wrote."""
        stage, work = self.open.pop(fingerprint)
        for outer in self._around(stage):
            self.inner[outer] = self.inner.get(outer, 0) + size
        if work is None or work.done:
            return None
        return compared(work, {**happened, "bytes": size + self.inner.get(fingerprint, 0)})

    def _around(self, stage: str) -> list[str]:
        """Of the stages that are worked on, those of another kind; both sides of encoding are one kind."""
        kind = stage.partition("-")[0]
        return [key for key, (name, _) in self.open.items() if name.partition("-")[0] != kind]

    def _next(self, stage: str) -> Work | None:
        works, place = self.foreseen.get(stage, []), self.seen[stage]
        self.seen[stage] += 1
        return works[place] if place < len(works) else None


def left(works: Sequence[Work], done: Mapping[str, int]) -> list[Work]:
    """The works with those finished that are done: so many of each stage, the first ones."""
    seen: Counter[str] = Counter()
    found = []
    for work in works:
        found.append(work.finished() if seen[work.stage] < done.get(work.stage, 0) else work)
        seen[work.stage] += 1
    return found


def _by_label(works: Sequence[Work]) -> list[list[Work]]:
    found: dict[str, list[Work]] = {}
    for work in works:
        found.setdefault(work.label, []).append(work)
    return list(found.values())


def _cells(group: Sequence[Work]) -> list[str]:
    """One line: the stages of one label, of several corpora."""
    first = group[0]
    if all(work.done for work in group):
        return [first.label, "done", "", "", "", "", ""]
    total = Total.of(group)
    rows = f"{_count(sum(work.rows for work in group))} {first.unit}"
    return [
        first.label,
        f"at most {rows}" if total.at_most else rows,
        _count(total.calls),
        _count(total.tokens_in),
        _count(total.tokens_out),
        _hours(total.gpu_hours, total.cpu_hours, total.unknown),
        _bytes(total.stored),
    ]


def _count(value: float) -> str:
    """A number to be read; nothing for none."""
    if not value:
        return ""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e7, "M")):
        if value >= size:
            return f"{value / min(size, 1e6 if letter == 'M' else size):,.1f} {letter}"
    return f"{value:,.0f}"


def _hours(gpu: float, cpu: float, unknown: bool) -> str:
    known = [
        f"{value:,.{3 if value < 10 else 1}f} {kind}" for value, kind in ((gpu, "GPU"), (cpu, "CPU")) if value
    ]
    return " + ".join([*known, *(["?"] if unknown else [])])


def _bytes(value: float) -> str:
    for size, name in ((GIB, "GiB"), (2.0**20, "MiB")):
        if value >= size:
            return f"{value / size:,.1f} {name}"
    return f"{value / 2**10:,.0f} KiB" if value else ""


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}") if value % 1 else value
