"""Each thing that can be wrong with a cluster is found, and the advice names what to change."""

from dataclasses import replace
from pathlib import Path

import pytest

from retrieval_ray.doctor import GIB, Found, Node, Place, Pool, Problem, Request, problems, report, source_sha

VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "vllm": "0.29.0"}
REQUEST = Request(workers=2, cpus=4, gpus=1)
POOLS = [Pool(cpus=8, gpus=1, count=1), Pool(cpus=8, gpus=1, count=1)]


def node(name: str, **more: object) -> Node:
    healthy = Node(
        name=name,
        cpus=8,
        gpus=1,
        versions=VERSIONS,
        source="a" * 64,
        source_folder="/app/retrieval_ray",
        visible_gpus=1,
        storage={"output_dir": Place("s3://b/run", write=200, read=300)},
        models={"student.model": Found("org/model", sha="c" * 64)},
        object_store=8 * GIB,
        spill_folder="/mnt/spill",
        spill_free=100 * GIB,
        fetched=1000,
    )
    return replace(healthy, **more)  # type: ignore[arg-type]


def found(*nodes: Node, request: Request = REQUEST, pools: list[Pool] = POOLS) -> list[Problem]:
    return problems(nodes, pools, request, driver_source="a" * 64, silent={})


def test_a_healthy_cluster_has_no_problem() -> None:
    assert found(node("n1"), node("n2")) == []


@pytest.mark.parametrize(
    ("wrong", "where", "what", "advice"),
    [
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, "cluster", "torch differs", "docker.image"),
        ({"versions": {**VERSIONS, "python": "3.12.1"}}, "cluster", "python differs", "one image"),
        ({"source": "b" * 64}, "cluster", "source differs", "--working-dir"),
        (
            {"storage": {"output_dir": Place("/runs", error="Permission denied")}},
            "n2", "output_dir: '/runs': Permission denied", "Set output_dir=",
        ),
        (
            {"storage": {"store": Place("s3://b/s", error="AccessDenied")}},
            "n2", "store: 's3://b/s': AccessDenied", "credentials",
        ),
        ({"storage": {"store": Place("/x", sees_driver=False)}}, "n2", "another folder", "Set store="),
        ({"storage": {"store": Place("/x", seen_by_driver=False)}}, "n2", "another folder", "Set store="),
        (
            {"models": {"student.model": Found("/m", error="no folder")}},
            "n2", "student.model: no folder", "Set student.model=",
        ),
        (
            {"models": {"student.model": Found("org/model", sha="d" * 64)}},
            "cluster", "student.model: other files on other nodes", "id@revision",
        ),
        (
            {"spill_error": "[Errno 30] Read-only file system"},
            "n2", "where objects are spilled (/mnt/spill): [Errno 30]", "right to write",
        ),
        ({"visible_gpus": 0}, "n2", "Ray counts 1 GPU, torch sees 0", "newer GPU driver"),
        ({"cut_off": "no object of n1 came through"}, "n2", "no object of n1", "--object-manager-port"),
        ({"skew": -7.5}, "n2", "-7.5 s", "chrony"),
    ],
)  # fmt: skip
def test_what_stops_a_job(wrong: dict[str, object], where: str, what: str, advice: str) -> None:
    (problem,) = found(node("n1"), node("n2", **wrong))
    assert problem.where == where and what in problem.what and advice in problem.advice and problem.stops


@pytest.mark.parametrize(
    ("wrong", "what", "advice"),
    [
        ({"storage": {"store": Place("/x", write=5, read=500)}}, "store: slow: 5 MiB/s", "region"),
        ({"fetched": 12.0}, "12 MiB/s from another node", "10 Gbit/s"),
        ({"object_store_folder": "/tmp"}, "lies on a disk (/tmp)", "--shm-size"),
        ({"object_store": 0.2 * GIB}, "0.2 GiB", "--object-store-memory"),
        ({"spill_free": 3 * GIB}, "3.0 GiB free where objects are spilled (/mnt/spill)", "--object-spilling"),
    ],
)
def test_what_makes_a_job_slow_is_a_warning(wrong: dict[str, object], what: str, advice: str) -> None:
    (problem,) = found(node("n1"), node("n2", **wrong))
    assert problem.where == "n2" and what in problem.what and advice in problem.advice and not problem.stops


@pytest.mark.parametrize(
    ("request_", "pools", "what", "advice"),
    [
        (Request(4, 4, 1), POOLS, "4 workers (4 CPU and 1 GPU each) do not fit: 2 do", "compute.workers=2"),
        (Request(4, 4, 1, "compute.min_workers"), POOLS, "do not fit", "Set compute.min_workers=2"),
        (Request(1, 16, 1), POOLS, "no node can ever hold a worker", "compute.cpus_per_worker"),
        (Request(1, 4, 2), POOLS, "no node can ever hold a worker", "compute.gpus_per_worker"),
        (Request(2, 8, 1), POOLS, "no 2 CPUs are left", "Lower compute.cpus_per_worker"),
        (Request(1, 1, 0), [], "no node can ever hold a worker", "add larger nodes"),
        (
            Request(2, 4, 1, engines=2, engine_gpus=2),
            POOLS,
            "2 vLLM engines of 2 GPU",
            "tensor_parallel_size",
        ),
        (Request(2, 4, 1, engines=3, engine_gpus=1), POOLS, "do not fit: 2 do", "Lower llm.replicas"),
    ],
)
def test_a_request_that_the_cluster_can_never_meet(
    request_: Request, pools: list[Pool], what: str, advice: str
) -> None:
    (problem,) = found(node("n1"), request=request_, pools=pools)
    assert problem.where == "cluster" and what in problem.what and advice in problem.advice and problem.stops


def test_workers_are_whole_on_a_node() -> None:
    """Two nodes of 6 CPUs hold two workers of 4, though 12 CPUs would do for three; more nodes may come."""
    six = Pool(cpus=6, gpus=0, count=2)
    assert len(found(node("n1"), request=Request(3, 4, 0), pools=[six])) == 1
    assert found(node("n1"), request=Request(3, 4, 0), pools=[replace(six, count=3)]) == []
    assert found(node("n1"), request=Request(16, 0.5, 0.25), pools=[Pool(32, 8, 1)]) == []
    assert found(node("n1"), request=Request(5, 1, 0.2), pools=[Pool(32, 1, 1)]) == []  # 1.0 // 0.2 is 4


def test_of_a_cluster_that_grows_no_room_is_asked() -> None:
    assert problems([node("n1")], None, Request(500, 64, 8), driver_source="a" * 64, silent={}) == []


def test_vllm_is_asked_for_where_it_is_used() -> None:
    without = {**VERSIONS, "vllm": None}
    head = node("head", gpus=0, versions=without)
    assert found(head, node("n1")) == []  # a node without GPUs may be without vLLM
    asked = replace(REQUEST, vllm_keys=("llm.engine",))
    assert found(head, node("n1"), request=asked) == []
    (problem,) = found(head, node("n1", versions=without), request=asked)
    assert problem.where == "n1" and "llm.engine asks for it" in problem.what


def test_on_a_cluster_without_gpus_some_node_must_have_vllm() -> None:
    asked = Request(workers=2, cpus=4, gpus=0, vllm_keys=("llm.engine",))
    with_it, without = node("n1", gpus=0), node("n2", gpus=0, versions={**VERSIONS, "vllm": None})
    assert found(with_it, without, request=asked) == [] == found(without)
    (problem,) = found(without, replace(without, name="n3"), request=asked)
    assert problem.where == "n2, n3" and "vLLM is not installed" in problem.what


def test_the_driver_s_source_counts_too() -> None:
    (problem,) = problems([node("n1")], POOLS, REQUEST, driver_source="b" * 64, silent={})
    assert "source differs" in problem.what and "(driver)" in problem.what


def test_a_silent_node_is_a_problem_and_the_worst_comes_first() -> None:
    slow = node("n1", fetched=1.0)
    told = problems([slow], POOLS, REQUEST, driver_source="a" * 64, silent={"n2": "no answer"})
    assert [(problem.where, problem.stops) for problem in told] == [("n2", True), ("n1", False)]
    assert told[0].what == "could not be looked at: no answer"


def test_what_is_wrong_on_many_nodes_is_told_once() -> None:
    """With the names of the first."""
    wrong = {"store": Place("/x", error="Permission denied")}
    (problem,) = found(*(node(f"n{n}", storage=wrong) for n in range(5)))
    assert problem.where == "n0, n1, n2 and 2 more" and "Permission denied" in problem.what


def test_the_report_has_a_row_for_each_node_and_a_line_for_each_problem() -> None:
    nodes = [node("n1"), node("n2", skew=9.0, fetched=3.0, storage={"store": Place("/x", error="no")})]
    text = report(nodes, found(*nodes))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["n1", "n2"] and "failed" in lines[3]
    assert sum(line.startswith("PROBLEM n2: ") for line in lines) == 2
    assert sum(line.startswith("warning n2: ") for line in lines) == 1
    assert lines[-1] == "2 nodes, 2 problems, 1 warning"


def test_the_source_s_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    first = source_sha(tmp_path)
    (tmp_path / "a.pyc").write_bytes(b"compiled")
    assert source_sha(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = source_sha(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({first, second, source_sha(tmp_path)}) == 3
