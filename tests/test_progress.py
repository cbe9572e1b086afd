"""Progress goes to standard error alone, so that standard output can be read by programs."""

import io
import sys

import pytest

from retrieval_ray import progress as module
from retrieval_ray.progress import heard_by, progress, say


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets: its only entry is the time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_say_writes_one_line_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    say("reading the corpus")
    assert capfd.readouterr() == ("", "reading the corpus\n")


def test_a_listener_hears_what_is_said_and_how_far_work_is(
    capfd: pytest.CaptureFixture[str], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    heard: list[str] = []
    with heard_by(heard.append):
        say("reading")
        with progress("encode", 40) as advance:
            clock[0] += module.SECONDS_BETWEEN_LINES
            advance(10, "")
    assert (heard, capfd.readouterr()) == (["reading", "  encode: 10 of 40"], ("", ""))
    say("again")
    assert (len(heard), capfd.readouterr().err) == (2, "again\n")


def test_lines_say_what_is_done_of_how_much(capfd: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress("encode", 40) as advance:
        for done, note in ((10, "320 passages/s"), (20, "")):
            clock[0] += module.SECONDS_BETWEEN_LINES
            advance(done, note)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "  encode: 10 of 40 320 passages/s\n  encode: 20 of 40\n"


def test_lines_are_no_closer_than_their_distance(
    capfd: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress("encode", 1000) as advance:
        for done in range(1000):
            clock[0] += 0.1
            advance(done, "")
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 100 / module.SECONDS_BETWEEN_LINES


def test_short_work_says_nothing(capfd: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress("encode", 3) as advance:
        advance(3, "done")
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_on_standard_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("encode", 40) as advance:
        advance(10, "busy")
        advance(40, "nearly")
    assert capfd.readouterr().out == ""
    assert "encode" in terminal.getvalue() and "40/40" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_in_the_work_comes_through(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    with pytest.raises(KeyError, match="lost"), progress("encode", 4) as advance:
        advance(1, "")
        raise KeyError("lost")
