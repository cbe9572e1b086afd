"""kill -9 while pairs are judged: a worker, the whole job, a node of a cluster. The table is the same."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from .conftest import ROOT
from .test_kill import kill_tree, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(1200)]
PAIRS = 26_000


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """Pairs for a handful of parts, some seconds each for the tiny model."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as lines:
        for n in range(PAIRS):
            passage = " ".join(words[(n * 7 + k) % 256] for k in range(40)) + f" {n // 4}"
            lines.write(json.dumps({"query": f"{words[n % 256]} {n % 11}", "passage": passage}) + "\n")
    return path


def start(
    pairs: Path, cross_encoder: str, output: Path, log: Path, **environment: str
) -> subprocess.Popen[bytes]:
    settings = [
        f"pairs={pairs}", "teacher.kind=cross_encoder", f"teacher.model={cross_encoder}",
        "teacher.max_tokens=64",
        "compute.precision=float32", "compute.threads=1", "compute.workers=2", "compute.cpus_per_worker=2",
        "compute.token_budget=2048", f"output_dir={output}",
    ]  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "jobs" / "score.py"),
        str(ROOT / "configs" / "score.yaml"),
        *settings,
    ]
    return subprocess.Popen(
        command,
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment},
    )


def table(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / "scores.parquet").to_pylist()
    return rows


def kept(output: Path) -> list[bytes]:
    """Every judged pair that was committed."""
    found: list[bytes] = []
    for file in (output / "store").glob("scores/*/*/*/*.parquet"):
        found += pq.read_table(file).column("key").to_pylist()
    return found


class Commits(threading.Thread):
    """Looks on while pairs are judged: a file of the cache that is there twice was judged twice."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.output, self.over = output, threading.Event()
        self.seen: set[tuple[str, int]] = set()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for file in (self.output / "store").glob("scores/*/*/*/*.parquet"):
                self.seen.add((str(file), file.stat().st_mtime_ns))

    def __enter__(self) -> "Commits":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()

    def again(self) -> int:
        """Files that were written once more."""
        return len(self.seen) - len({path for path, _ in self.seen})


def finished(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(
    pairs: Path, cross_encoder_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("whole")
    log = output / "log"
    finished(start(pairs, cross_encoder_folder, output / "out", log), log)
    rows = table(output / "out")
    assert len(rows) == PAIRS
    return rows


def check(output: Path, undisturbed: list[dict[str, Any]], commits: Commits) -> None:
    """Nothing is lost; what was committed once is never judged again, only what was in flight."""
    assert table(output) == undisturbed
    again = Counter(kept(output))
    assert len(again) == PAIRS and max(again.values()) == 1
    assert len({path for path, _ in commits.seen}) > 2 and commits.again() == 0


def test_a_killed_worker(
    pairs: Path, cross_encoder_folder: str, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    with Commits(output) as commits:
        process = start(pairs, cross_encoder_folder, output, log)
        assert wait_until(lambda: len(kept(output)) > 0, process, log)
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in family if "_Actor" in " ".join(p.cmdline())]
        assert workers
        workers[0].send_signal(signal.SIGKILL)
        finished(process, log)
    check(output, undisturbed, commits)


def test_a_killed_job(
    pairs: Path, cross_encoder_folder: str, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    with Commits(output) as commits:
        process = start(pairs, cross_encoder_folder, output, log)
        assert wait_until(lambda: len(kept(output)) > 0, process, log)
        kill_tree(process)
        before = len(kept(output))
        assert 0 < before < PAIRS
        finished(start(pairs, cross_encoder_folder, output, log), log)
    check(output, undisturbed, commits)
    facts = json.loads((output / "scores.json").read_text())["teachers"]["cross_encoder"]
    assert facts["rows_this_run"] == PAIRS - before  # what was judged before was not judged again


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.cluster
def test_a_lost_node(
    two_nodes: Any, pairs: Path, cross_encoder_folder: str, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The node with one of the two workers is lost, and another takes its place."""
    output, log = tmp_path / "out", tmp_path / "log"
    node = two_nodes.add_node(num_cpus=4)
    two_nodes.wait_for_nodes()
    with Commits(output) as commits:
        process = start(pairs, cross_encoder_folder, output, log, RAY_ADDRESS=two_nodes.address)
        assert wait_until(lambda: len(kept(output)) > 0, process, log)
        two_nodes.remove_node(node, allow_graceful=False)
        two_nodes.add_node(num_cpus=4)
        finished(process, log)
    check(output, undisturbed, commits)
