"""What a cluster offers, told apart from what it has at this moment. Starts no Ray."""

import pytest
import ray
from ray._private.state import state

from retrieval_ray.config import ComputeConfig
from retrieval_ray.errors import UserError
from retrieval_ray.stages import cluster

pytestmark = pytest.mark.ray


@pytest.fixture
def autoscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that runs no work; 16 machines of 8 CPUs and a GPU may come."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"driver_node": 1.0, "memory": 5.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 128, "GPU": 16})


def test_machines_that_may_still_come_count(autoscaled: None) -> None:
    assert cluster.offered() == {"driver_node": 1.0, "memory": 5.0, "CPU": 128.0, "GPU": 16.0}
    assert cluster.gpus_per_worker(ComputeConfig()) == 1.0
    cluster.join(ComputeConfig(workers=16, cpus_per_worker=7))
    with pytest.raises(UserError, match=r"compute.workers=17 needs 17 GPU .* has at most 16"):
        cluster.join(ComputeConfig(workers=17, cpus_per_worker=1))


def test_a_cluster_of_fixed_size_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    assert cluster.offered() == {"CPU": 4.0}
    assert cluster.gpus_per_worker(ComputeConfig()) == 0.0
