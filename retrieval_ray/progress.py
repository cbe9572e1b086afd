"""Progress of long work: a bar on a terminal, plain lines elsewhere. Always on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
Advance = Callable[[int, str], None]  # (how much is done in all, a word on it)
Listener = Callable[[str], None]
_listeners: list[Listener] = []


@contextmanager
def progress(label: str, total: int) -> Iterator[Advance]:
    """Show how far a piece of work is: call the yielded function with what is done so far."""
    if _listeners or not sys.stderr.isatty():
        with _lines(label, total) as advance:
            yield advance
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total, note="")
        yield lambda done, note: bars.update(task, completed=done, note=note)


@contextmanager
def _lines(label: str, total: int) -> Iterator[Advance]:
    last = time.monotonic()

    def advance(done: int, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"  {label}: {done} of {total} {note}".rstrip())

    yield advance


def say(line: str) -> None:
    """One line for the person who waits."""
    if _listeners:
        _listeners[-1](line)
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Lines go to the listener: nobody reads what a process far away prints."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
