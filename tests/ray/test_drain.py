"""A node is about to be taken away: training is told, writes a checkpoint at once, and goes on elsewhere."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from .conftest import ROOT, small_settings
from .nodes import ray
from .test_kill import kill_tree, wait_until

pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.cluster, pytest.mark.timeout(900),
]  # fmt: skip
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_memory_monitor_refresh_ms": "0"}


def checkpoints(output: Path) -> dict[int, int]:
    """How many epochs had been measured, the zeroth among them, by the step of each checkpoint there is."""
    names = [path.stem.split("-") for path in (output / "store").glob("train-*/checkpoint-*.json")]
    return {int(step): int(measured) for _, step, measured in names}


def drain(cluster: Any, node: Any) -> None:
    """As an autoscaler does before a spot machine goes."""
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    where = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "600"]
    command = ray("drain-node", *where, *why)
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=120)


def test_a_drained_node(
    collection: Path, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has room for no worker, so all run on the node that goes, and then on the one that comes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    output, log = tmp_path / "out", tmp_path / "log"
    settings = [
        *small_settings(collection, Path(student_folder), output),
        "train.checkpoint_minutes=60", "train.batch_queries=1", "train.max_epochs=12", "train.patience=12",
        "compute.workers=1", "compute.cpus_per_worker=2",
    ]  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=4)
        cluster.wait_for_nodes()
        command = [sys.executable, str(ROOT / "jobs" / "adapt.py"), str(ROOT / "configs" / "cpu.yaml")]
        process = subprocess.Popen(
            [*command, *settings], stdout=log.open("ab"), stderr=subprocess.STDOUT, cwd=ROOT,
            env={**ENVIRONMENT, "RAY_ADDRESS": cluster.address},
        )  # fmt: skip
        try:
            assert wait_until(lambda: 2 in checkpoints(output).values(), process, log), "it was too fast"
            per_epoch = next(step for step, measured in checkpoints(output).items() if measured == 2)
            drain(cluster, node)
            mid_epoch = wait_until(
                lambda: any(step % per_epoch for step in checkpoints(output)), process, log
            )
            assert mid_epoch, f"no checkpoint but those at the end of epochs: {checkpoints(output)}"
            kept = max(step for step in checkpoints(output) if step % per_epoch)
            cluster.remove_node(node, allow_graceful=False)
            removed = time.time()
            cluster.add_node(num_cpus=4)
            assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
        finally:
            if process.poll() is None:
                kill_tree(process)
    finally:
        cluster.shutdown()
    (steps,) = (output / "store").glob("train-*/steps.jsonl")
    made = {row["step"]: row["time"] for row in map(json.loads, steps.read_text().splitlines())}
    assert len(made) == 12 * per_epoch
    assert all(made[step] < removed for step in range(1, kept + 1))  # none of them was made again
    assert made[len(made)] > removed
