"""When lists are mined anew, and from which step on they are used. Starts no Ray."""

from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.artifacts import Location, stage
from retrieval_ray.stages import train

N = 3


class Run:
    """Notes what training and mining are given; patience may end training at a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, ends: int | None = None) -> None:
        self.ends, self.trained, self.mined = ends, [], []  # type: ignore[var-annotated]
        self.target = stage(Location.of(str(folder)), "train", {})
        monkeypatch.setattr(train, "snapshot", lambda folder, step: f"student at {step}")
        monkeypatch.setattr(train.refresh, "facts", lambda lists: lists)

    def train(self, lists: Any, until: int | None) -> bool:
        self.trained.append((lists, until))
        return self.ends is not None and (until is None or until >= self.ends)

    def mine(self, student: Any, step: int) -> Any:
        self.mined.append((student, step))
        return f"mined at {step}"

    def go(self, total: int) -> list[dict[str, Any]]:
        return train._with_refreshes(self.train, self.mine, "first", self.target, total, N)  # type: ignore[arg-type]


def test_what_is_mined_at_r_n_is_used_from_r_plus_1_n(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Run(monkeypatch, tmp_path)
    found = run.go(5 * N)
    assert run.mined == [(f"student at {r * N}", r * N) for r in (1, 2, 3)]  # the fourth would never be used
    assert run.trained == [
        ("first", N), ("first", 2 * N), (f"mined at {N}", 3 * N), (f"mined at {2 * N}", 4 * N),
        (f"mined at {3 * N}", None),
    ]  # fmt: skip
    assert [(row["mined_at"], row["used_from"]) for row in found] == [
        (r * N, (r + 1) * N) for r in (1, 2, 3)
    ]  # fmt: skip


def test_a_last_piece_may_be_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, tmp_path)
    assert [row["used_from"] for row in run.go(2 * N + 1)] == [2 * N]
    assert run.trained[-1] == (f"mined at {N}", None)
    run = Run(monkeypatch, tmp_path)
    assert run.go(2 * N) == [] and run.mined == [] and run.trained == [("first", N), ("first", None)]


def test_training_that_ends_early_uses_nothing_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, tmp_path, ends=3 * N)
    found = run.go(9 * N)
    assert [row["used_from"] for row in found] == [2 * N]
    assert run.trained[-1] == (f"mined at {N}", 3 * N) and len(run.mined) == 2


def test_what_fails_while_mining_fails_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(monkeypatch, tmp_path)

    def broken(student: Any, step: int) -> Any:
        raise ValueError("no search")

    run.mine = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no search"):
        run.go(5 * N)
    assert run.trained == [("first", N), ("first", 2 * N)]
