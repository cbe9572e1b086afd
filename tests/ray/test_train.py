"""The train stage's wiring: what Ray is asked and what the user is told. Starts no Ray."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray.train

from retrieval_ray.artifacts import Location
from retrieval_ray.config import Config
from retrieval_ray.stages import train
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile
from retrieval_ray.step import Lists


def test_a_preemption_notice_is_passed_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([None, None, object(), object()])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(told))
    notice = train._preemption_notice()
    assert [notice() for _ in range(5)] == [False, False, True, False, False]
    assert next(told) is not None  # not asked again: each asking is a barrier


def test_a_ray_without_notices_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray.train, "get_preemption_info", raising=False)
    assert train._preemption_notice()() is False


def _lists(size: int) -> Lists:
    return Lists([f"q{n}" for n in range(size)], [["p"]] * size, np.zeros((size, 1)), [[]] * size)


@pytest.mark.parametrize(
    ("sizes", "batch", "said"),
    [
        ([40_000], 4096, []),
        ([800], 100, ["800 training queries are fewer than 8 batches of 4096; batches of 100 are used"]),
        ([40_000, 90], 4096, ["'c1' has 90 training queries, fewer than a batch of 4096: one short batch"]),
        ([40_000, 0], 4096, ["'c1' has 0 training queries, fewer than a batch of 4096: nothing is learned"]),
    ],
)
def test_a_corpus_of_few_queries_is_trained_on_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: list[int], batch: int, said: list[str]
) -> None:
    config = Config()
    config.train.student_temperature = 0.1
    context = Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    corpora = [SimpleNamespace(name=f"c{n}") for n in range(len(sizes))]
    settings = train._settings(context, corpora, [_lists(size) for size in sizes])  # type: ignore[arg-type]
    assert settings.batch_queries == batch
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == len(said) and all(part in line for part, line in zip(said, lines, strict=True))
