"""What a cluster offers, told apart from what it has at this moment. Starts no Ray."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import ray

from retrieval_ray.config import ComputeConfig
from retrieval_ray.doctor import Pool
from retrieval_ray.errors import UserError
from retrieval_ray.stages import cluster

from .conftest import ROOT

pytestmark = pytest.mark.ray


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cluster of a head that runs no work; its home folder."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"driver_node": 1.0, "memory": 5.0})
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def nodes_are(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    total: Counter[str] = Counter()
    for each in resources:
        total.update(each)  # type: ignore[arg-type]
    monkeypatch.setattr(ray, "cluster_resources", lambda: dict(total))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": each} for each in resources])


def test_machines_that_the_launcher_may_still_start_count(head: Path) -> None:
    shutil.copy(ROOT / "cluster.yaml", head / "ray_bootstrap_config.yaml")
    types, most = cluster.node_types()
    assert Pool(cpus=8, gpus=1, count=16) in types and most == 24
    assert cluster.offered(ComputeConfig()) == {  # of 24 nodes, each spot or on demand
        "driver_node": 1.0, "memory": 5.0, "CPU": 4 * 96 + 16 * 32 + 4 * 8, "GPU": 4 * 8 + 20 * 1,
    }  # fmt: skip
    assert cluster.gpus_per_worker(ComputeConfig()) == 1.0
    cluster.join(ComputeConfig(workers=16, cpus_per_worker=7))
    cluster.join(ComputeConfig(workers=52, cpus_per_worker=7))
    with pytest.raises(UserError, match=r"compute.workers=53 needs 53 GPU .* has at most 52"):
        cluster.join(ComputeConfig(workers=53, cpus_per_worker=1))


def test_no_more_nodes_are_counted_than_may_be_there_together(head: Path) -> None:
    """Three: two large ones and a small one."""
    (head / "ray_bootstrap_config.yaml").write_text(
        "max_workers: 3\n"
        "available_node_types:\n"
        "  head: {resources: {CPU: 0}, max_workers: 0}\n"
        "  small: {resources: {CPU: 4}, max_workers: 3}\n"
        "  large: {resources: {CPU: 5}, max_workers: 2}\n"
    )
    assert cluster.offered(ComputeConfig())["CPU"] == 2 * 5 + 4
    cluster.join(ComputeConfig(workers=3, cpus_per_worker=3))
    with pytest.raises(UserError, match=r"compute.workers=4: .* nodes hold 3"):
        cluster.join(ComputeConfig(workers=4, cpus_per_worker=3))
    with pytest.raises(UserError, match=r"compute.workers=5 needs 17 CPU .* has at most 14"):
        cluster.join(ComputeConfig(workers=5, cpus_per_worker=3))


def test_a_cluster_of_fixed_size_is_what_it_is(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_are(monkeypatch, {"CPU": 4.0})
    assert cluster.offered(ComputeConfig()) == {"CPU": 4.0, "GPU": 0.0}
    assert cluster.gpus_per_worker(ComputeConfig()) == 0.0
    with pytest.raises(UserError, match=r"compute.workers=4 needs 6 CPU .* has at most 4"):
        cluster.join(ComputeConfig(workers=4))


def test_a_worker_is_whole_on_one_node(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_are(monkeypatch, {"CPU": 5.0}, {"CPU": 5.0}, {"CPU": 5.0}, {"driver_node": 1.0})
    cluster.join(ComputeConfig(workers=3, cpus_per_worker=3))
    with pytest.raises(UserError, match=r"compute.workers=1: of workers of 6 CPU .* nodes hold 0"):
        cluster.join(ComputeConfig(workers=1, cpus_per_worker=6))
    with pytest.raises(UserError, match=r"compute.workers=4: .* nodes hold 3"):
        cluster.join(ComputeConfig(workers=4, cpus_per_worker=3))
    lower = (
        r"compute.workers=1 x sweep.trials_at_once=4: .* nodes hold 3. Lower sweep.trials_at_once or compute"
    )
    with pytest.raises(UserError, match=lower):
        cluster.join(ComputeConfig(workers=1, cpus_per_worker=3), trials=4)


def test_one_that_grows_nobody_knows_how_far_is_asked_for_anything(head: Path) -> None:
    compute = ComputeConfig(workers=500, autoscale=True)
    assert cluster.gpus_per_worker(compute) == 1.0
    cluster.join(compute)


def test_another_cluster_s_file_is_not_read_for_a_local_one(
    head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "cluster.yaml", head / "ray_bootstrap_config.yaml")
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster.node_types() == ([], 0)
