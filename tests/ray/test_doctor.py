"""The doctor on a real cluster of two nodes on this machine, as a user calls it."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import run_job

pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that runs no work, and a node that does."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = {"num_cpus": 0, "resources": {"driver_node": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=6)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


def settings(student_folder: str, output: Path) -> list[str]:
    return ["configs/cpu.yaml", f"student.model={student_folder}", f"output_dir={output}"]


def test_nothing_stands_in_the_way_and_then_much_does(
    two_nodes: Any, student_folder: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = run_job("doctor", [*settings(student_folder, output), "compute.workers=4"])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "2 nodes, 0 problems" in done.stdout
    assert not output.exists()  # what was tried is gone

    output.mkdir()
    (output / "mine").touch()
    two_nodes.add_node(num_cpus=2, num_gpus=1)
    two_nodes.wait_for_nodes()
    (tmp_path / "file").write_text("no folder")
    wrong = [f"store={tmp_path / 'file'}", "compute.workers=9", "compute.gpus_per_worker=0"]
    wrong += ["teacher.kind=cross_encoder", f"teacher.model={tmp_path / 'nowhere'}"]
    done = run_job("doctor", [*settings(student_folder, output), *wrong])
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    problems = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    on_all = r"PROBLEM [^ ,]+, [^ ,]+, [^ ,]+: "  # three nodes
    assert sum(bool(re.match(on_all + "store: ", line)) for line in problems) == 1
    assert sum(bool(re.match(on_all + "teacher.model: no model", line)) for line in problems) == 1
    assert sum("Ray counts 1 GPU, torch sees 0" in line for line in problems) == 1
    assert sum("9 workers (1 CPU and 0 GPU each) do not fit: 8 do" in line for line in problems) == 1
    assert len(problems) == 4 and "3 nodes, 4 problems" in done.stdout
    assert os.listdir(output) == ["mine"]


def test_a_command_that_is_wrong(tmp_path: Path) -> None:
    done = run_job("doctor", ["configs/cpu.yaml", f"output_dir={tmp_path}", "--until", "score"])
    assert done.returncode == 2 and "error: --until" in done.stderr


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:  # and not listened to
        taken.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*taken.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address)
        done = run_job("doctor", ["configs/cpu.yaml", f"output_dir={tmp_path}"])
    assert done.returncode == 2 and f"error: RAY_ADDRESS: no cluster answers at {address}" in done.stderr
    assert "Traceback" not in done.stderr
