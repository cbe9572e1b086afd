"""What finished stages say of a row, where the start of workers is most of their time. Starts no Ray."""

from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.artifacts import Location
from retrieval_ray.config import Config
from retrieval_ray.stages import cluster, rates
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile

pytestmark = pytest.mark.ray


@pytest.fixture
def context(tmp_path: Path) -> Context:
    config = Config()
    config.compute.workers = 16
    return Context(config, Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 16))


def finished(context: Context, name: str, identity: dict[str, Any], **facts: Any) -> None:
    """A manifest in the store."""
    config = {
        "compute": {"workers": 16},
        "student": {"model": context.config.student.model},
        "groups": {"list_size": 9},
        "train": {},
    }
    identity = {**identity, "profile": context.profile.numeric()}
    (context.store / name / "manifest.json").write_json(
        {"identity": identity, "config": config, "parts": dict.fromkeys("ab", ""), **facts}
    )


def test_the_start_of_workers_is_no_part_of_a_row(context: Context) -> None:
    """100 rows of two parts in 20 s; of 16 workers two were busy, for a second each."""
    small = {"rows": 100, "rows_this_run": 100, "seconds": 20.0, "busy_seconds": 2.0}
    finished(context, "encode-1", {"role": "passage"}, **small)
    found = rates.found(context, []).of("encode-passage")
    assert found.seconds == pytest.approx(2 / 100)
    assert found.start == pytest.approx(19) and found.of(100, 2) == pytest.approx(20)  # as it was
    million = found.of(10**6, 16)
    assert million is not None and 1250 < million < 1270  # not the 200,000 s of ten thousand such stages


def test_a_short_stage_whose_busy_time_nobody_knows_counts_where_no_sample_can_be_made(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_sampled", lambda *given: given[4])  # what is known before
    monkeypatch.setattr(cluster, "ready", lambda compute: False)

    def of_a_train(seconds: float) -> float | None:
        finished(context, "train-1", {}, rows=4, rows_this_run=4, seconds=seconds, batch_queries=8)
        return rates.sampled(context, [], ["a passage"], [], train=True).of("train").seconds

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert of_a_train(30.0) is None
    assert of_a_train(300.0) == pytest.approx(300 * 16 / (4 * 8 * 10))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert of_a_train(30.0) == pytest.approx(30 * 16 / (4 * 8 * 10))
