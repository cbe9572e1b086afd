"""Where the parts of a stage are worked on. What they return does not depend on it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from ray.experimental import internal_kv

from retrieval_ray.artifacts import Location
from retrieval_ray.config import Config
from retrieval_ray.stages import parts
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile

pytestmark = pytest.mark.ray


class Squares:
    def __init__(self, more: int) -> None:
        self.more = more

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["n"] == 1313:
            os.kill(os.getpid(), signal.SIGKILL)
        if part["n"] < 0:
            raise ValueError(f"{part['n']} has no place")
        found = {"value": part["n"] ** 2 + self.more, "threads": torch.get_num_threads()}
        return {**found, "process": os.getpid()}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Config(), Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))


@pytest.mark.parametrize(("workers", "light"), [(1, False), (2, True)])
def test_a_laptop_s_parts_and_a_few_light_ones_are_done_in_this_process(
    context: Context, workers: int, light: bool
) -> None:
    """With a worker's threads, and this process's afterwards. Starts no Ray."""
    context.config.compute.workers = workers
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = parts.run_parts(context, "", Squares, {"more": 1}, [{"n": 2}, {"n": 3}], light=light)
        assert [each["value"] for each in found] == [5, 10]
        assert {each["process"] for each in found} == {os.getpid()}
        assert {each["threads"] for each in found} == {1} and torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="-1 has no place"):
            parts.run_parts(context, "", Squares, {"more": 1}, [{"n": -1}], light=light)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "address", "how", "count"),
    [
        (2, "", {"light": False}, 2),
        (2, "", {"light": True}, parts._FEW + 1),
        (1, "", {"apart": True}, 2),
        (1, "somewhere:6379", {}, 2),  # this process may be on a head that runs no work
    ],
)
def test_many_parts_and_heavy_ones_are_done_by_workers(
    context: Context, ray_local: None, monkeypatch: pytest.MonkeyPatch,
    workers: int, address: str, how: dict[str, bool], count: int,
) -> None:  # fmt: skip
    context.config.compute.workers = workers
    monkeypatch.setenv("RAY_ADDRESS", address)
    wanted = [{"n": n} for n in range(count)]
    found = parts.run_parts(context, "", Squares, {"more": 1}, wanted, **how)
    assert not internal_kv._internal_kv_list("counted-")  # nothing is left on the cluster
    assert sorted(each["value"] for each in found) == [n**2 + 1 for n in range(count)]
    assert os.getpid() not in {each["process"] for each in found}


@pytest.mark.slow
@pytest.mark.chaos
def test_a_part_that_kills_every_worker_ends_the_job(
    context: Context, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data by itself starts workers for it for ever."""
    context.config.compute.workers = 2
    monkeypatch.setattr(parts, "_ATTEMPTS", 2)
    with pytest.raises(RayTaskError, match=r"UserError: squares: 2 workers died over the same part .*1313"):
        parts.run_parts(context, "squares", Squares, {"more": 1}, [{"n": 2}, {"n": 1313}])
