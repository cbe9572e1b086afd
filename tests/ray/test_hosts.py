"""The whole pipeline on hosts of their own, and in each stage one of them is cut off and another comes.

    sudo .venv/bin/python -m pytest -m hosts -s tests/ray/test_hosts.py

A head that runs no work and two hosts that do, each with room for one worker, so that training always
crosses the network; a server that speaks S3 holds all that outlives a host. Takes 25 minutes.
"""

import fnmatch
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retrieval_ray.artifacts import Location

from . import nodes
from .chat import KEY, Server, serving
from .conftest import write_collection
from .hosts import SUBNET, US, Host, Network

pytestmark = [
    pytest.mark.ray,
    pytest.mark.hosts,
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"),
        reason="needs Linux, root, iproute2 and util-linux",
    ),
]
PASSAGES, QUERIES = 16_600, 96  # more passages than the driver searches and looks up by itself
# What shows that a stage is under way: a line that the job says, or a file in a folder without a manifest.
MOMENTS = {
    "corpus": "line corpus 'words'",
    "generate": "file replies/*",
    "encode": "file encode-*/vectors-000000[1-6]*",
    "retrieve": "line retrieval on",
    "score": "file score-late-*/scores-*",
    "groups": "line groups of",
    "train": "file train-*/checkpoint-0000000[3-9]*",
    "evaluate": "line with the adapted model",
}
# Which stage that is, where it has another name, and how many of it were finished before.
WITHIN = {"evaluate": ("encode", 2)}  # passages and queries, now by the adapted model
ALONE = ("corpus", "groups")  # the driver's work: the host that is cut off there has none
# A host that falls silent is given up after about forty seconds; one that is only slow must not be.
PATIENCE = {
    "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "not-a-secret"}


class Cluster:
    """A Ray cluster on a network: the head, and the hosts that work, oldest first."""

    def __init__(self, base: Path, corpus: Path, endpoint: str) -> None:
        self.base, self.corpus, self.endpoint = base, corpus, endpoint
        self.python = nodes.image(base / "image")
        (base / "home").mkdir()
        nodes.make_token(base / "home")
        self.network = Network(base)
        token = (base / "home" / ".ray" / "auth_token").read_text()
        own = self.network.own
        self.environment = nodes.environment(
            own / "home", self.python, RAY_AUTH_TOKEN=token, TMPDIR=str(own / "tmp"),
            RAY_TMPDIR=str(own / "tmp"), RAY_AUTH_MODE="token", AWS_ENDPOINT_URL=endpoint,
            OPENAI_API_KEY=KEY, **KEYS, **PATIENCE,
        )  # fmt: skip
        self.running: dict[Host, subprocess.Popen[bytes]] = {}
        self.gone: list[Host] = []  # cut off
        user = nodes.environment(base / "home", self.python)
        self.dashboard = nodes.Dashboard(f"http://{SUBNET}.1:8265", user)

    def start(self) -> None:
        """The head and two hosts that work."""
        self.head = self._start(
            "--head", "--num-cpus=0", "--resources", '{"driver_node": 1}', "--dashboard-host=0.0.0.0",
            f"--temp-dir={self.network.own / 'ray'}",
        )  # fmt: skip
        log = self.base / f"{self.head.name}.log"
        nodes.wait_for_node(lambda: len(self.alive()) == 1, self.running[self.head], log)
        self.add()
        self.add()
        nodes.wait_for(lambda: len(self.alive()) == 3, "three nodes are there")

    def _start(self, *words: str, hidden: Path | None = None) -> Host:
        host = self.network.add()
        told = (f"--node-ip-address={host.address}", "--object-store-memory=200000000", "--block")
        command = nodes.ray("start", *words, *told, python=self.python)
        entered = self.network.on(host, command, hidden=hidden)
        self.running[host] = nodes.spawn(entered, self.environment, self.base / f"{host.name}.log")
        return host

    def add(self) -> None:
        """Another host, with room for one worker of two CPUs and for Ray Data; it does not see the corpus."""
        self._start(f"--address={self.head.address}:6379", "--num-cpus=3", hidden=self.corpus)

    def oldest(self) -> Host:
        """Of the hosts that work."""
        return [host for host in self.running if host != self.head][0]

    def at_work(self, host: Host) -> bool:
        """Whether one of a job's workers lives there."""
        (node,) = [node["node_id"] for node in self.dashboard.nodes() if node["node_ip"] == host.address]
        return any(actor["node_id"] == node for actor in self.dashboard.actors())

    def cut(self, host: Host) -> None:
        """Pull the host's cable."""
        self.network.cut(host)
        self.gone.append(host)

    def clear(self) -> None:
        """End what runs on hosts that were cut off and not forgotten."""
        for host in [host for host in self.running if host in self.gone]:
            self.forget(host)

    def alive(self) -> set[str]:
        return {node["node_ip"] for node in self.dashboard.nodes()}

    def forget(self, host: Host) -> None:
        """End what runs on a host."""
        nodes.end(self.running.pop(host))

    def remove(self) -> None:
        for host in list(self.running)[::-1]:
            self.forget(host)
        self.network.remove()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """Passages of a dozen words, and queries of three words of one of them."""
    folder = tmp_path_factory.mktemp("words", numbered=False)
    rng = random.Random(5)
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(PASSAGES)]
    passages = [(f"p{n}", "", text) for n, text in enumerate(texts)]
    asked = {f"q{n}": (" ".join(texts[7 * n].split()[2:5]), f"p{7 * n}") for n in range(QUERIES)}
    write_collection(
        folder, passages, asked, {"train": range(64), "dev": range(64, 80), "test": range(80, QUERIES)}
    )
    return folder


@pytest.fixture(scope="module")
def writer(cluster: "Cluster") -> Iterator[str]:
    """An endpoint that takes its time to write queries, on this machine's end of the bridge."""
    served = Server()
    served.delay = 1.0
    with serving(served, US) as url:
        yield url


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """Short: the path of a socket may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rr-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(base: Path, corpus: Path, student_folder: str) -> Iterator[Cluster]:
    """Three nodes, the S3 server, and the student in a bucket: no worker sees this machine's folders."""
    port = nodes.free_port()
    endpoint = f"http://{US}:{port}"
    found = None
    server = [sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", str(port)]
    storage = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(name, value)
        try:
            nodes.wait_for(_make_bucket, "the S3 server answers")
            Location.of(student_folder).copy_to(Location.of("s3://lake/student"))
            found = Cluster(base, corpus, endpoint)
            found.start()
            yield found
        finally:
            if found:
                found.remove()
            nodes.end(storage)


def _make_bucket() -> bool:
    Location.of("s3://lake?allow_bucket_creation=true").filesystem.create_dir("lake")
    return True


def job(corpus: Path, writer: str, output: str) -> list[str]:
    return [
        "jobs/adapt.py", "configs/cpu.yaml", f"dataset.path={corpus}",
        "dataset.dev_split=dev", "queries.log_split=train", "student.model=s3://lake/student",
        "queries.sources=[log,llm]", "llm.engine=endpoint", f"llm.url={writer}", "llm.model=writer",
        "llm.passages=60", "llm.kinds={claim: 2}", "llm.concurrency=2",
        f"output_dir=s3://lake/{output}", "groups.list_size=6", "teacher.depth=20",
        "train.max_epochs=3", "train.patience=9", "train.batch_queries=8", "train.chunk_tokens=512",
        "train.checkpoint_minutes=0", "compute.precision=float32", "compute.token_budget=2048",
        "compute.workers=2", "compute.cpus_per_worker=2", "compute.threads=1",
        "compute.gpus_per_worker=0",  # this cluster will never have one, however long it is waited for
        "compute.autoscale=true",  # what is lacking is waited for: another host will come
    ]  # fmt: skip


def contents(output: str) -> dict[str, str]:
    """What every stage wrote, and the bytes of the model that the run returned."""
    found = {}
    for path in _files(output):
        file = Location.of(f"s3://{path}")
        if path.endswith("/manifest.json") and "/store/" in path:
            found[path.split("/")[-2]] = str(file.read_json()["content"])
        elif path.endswith("model.safetensors") and "/store/" not in path:
            found[path.removeprefix(f"lake/{output}/")] = hashlib.sha256(file.read()).hexdigest()
    return found


def _files(output: str) -> list[str]:
    from pyarrow import fs

    lake = Location.of(f"s3://lake/{output}")
    selector = fs.FileSelector(lake.path, recursive=True, allow_not_found=True)
    return [str(info.path) for info in lake.filesystem.get_file_info(selector) if info.is_file]


def is_there(sign: str, output: str, lines: list[str]) -> bool:
    how, _, what = sign.partition(" ")
    if how == "line":
        return any(what in line for line in lines)
    files = [path.partition("/store/")[2] for path in _files(output)]
    done = {path.rpartition("/")[0] for path in files if path.endswith("/manifest.json")}
    return any(fnmatch.fnmatch(path, what) and path.rpartition("/")[0] not in done for path in files)


def finished(output: str) -> Counter[str]:
    """How many stages of each name have a manifest."""
    manifests = (path for path in _files(output) if path.endswith("/manifest.json") and "/store/" in path)
    return Counter(path.split("/")[-2].partition("-")[0] for path in manifests)


def metrics(output: str) -> Any:
    found = Location.of(f"s3://lake/{output}/metrics.json").read_json()
    del found["seconds"]
    return found


@pytest.fixture(scope="module")
def whole(cluster: Cluster, corpus: Path, writer: str, base: Path) -> dict[str, str]:
    """What a job writes that loses no host."""
    code, said = cluster.dashboard.run("whole", *job(corpus, writer, "whole"), log=base / "whole.log")
    print("\n".join(said))
    assert code == 0
    assert metrics("whole")["training"] is not None
    return contents("whole")


def test_the_doctor_finds_three_hosts_fit(cluster: Cluster, corpus: Path, base: Path) -> None:
    told = ["configs/cpu.yaml", f"dataset.path={corpus}", "student.model=s3://lake/student"]
    told += ["output_dir=s3://lake/doctor", "compute.workers=2", "compute.cpus_per_worker=2"]
    code, said = cluster.dashboard.run("doctor", "jobs/doctor.py", *told, log=base / "doctor.log")
    print("\n".join(said))
    assert code == 0 and "3 nodes, 0 problems" in said[-1]
    assert not _files("doctor")


@pytest.mark.parametrize("stage", MOMENTS)
def test_a_host_is_cut_off(
    stage: str, cluster: Cluster, corpus: Path, writer: str, base: Path, whole: dict[str, str]
) -> None:
    """The job ends by itself, with the tables of one that lost no host."""
    name = f"broken-{stage}"
    process = cluster.dashboard.submit(name, *job(corpus, writer, name), log=base / f"{name}.log")
    try:
        assert comes(MOMENTS[stage], name, cluster, process)
        gone = cluster.oldest()
        if stage not in ALONE:
            nodes.wait_for(lambda: cluster.at_work(gone), f"{gone.name} works")
        begin = time.monotonic()
        at = cluster.dashboard.said(name)[-1]
        cluster.cut(gone)
        within, before = WITHIN.get(stage, (stage, 0))
        assert finished(name)[within] == before
        cluster.add()
        nodes.wait_for(lambda: gone.address not in cluster.alive(), "the loss is noticed")
        noticed = time.monotonic() - begin
        cluster.forget(gone)
        nodes.wait_for(lambda: len(cluster.alive()) == 3, "another host is there", 600)
        replaced = time.monotonic() - begin
        code = process.wait(timeout=1200)
    finally:
        cluster.clear()
        if process.poll() is None:
            cluster.dashboard.stop(name)
        nodes.end(process)
        said = cluster.dashboard.said(name)
        print("\n".join(said))
    times = f"given up after {noticed:.0f} s, another after {replaced:.0f} s"
    print(f"{stage}: {gone.name} cut off at '{at}', {times}, all done after {time.monotonic() - begin:.0f} s")
    assert code == 0 and not [line for line in said if "Traceback" in line]
    assert contents(name) == whole
    assert metrics(name) == metrics("whole")


def comes(sign: str, output: str, cluster: Cluster, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a stage is under way; False if the job ends first."""
    while True:
        try:
            if is_there(sign, output, cluster.dashboard.said(output)):
                return True
        except OSError:  # the job is not submitted yet
            pass
        if process.poll() is not None:
            return False
        time.sleep(0.3)
