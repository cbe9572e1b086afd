"""Free memory as recorded files of machines and containers say it."""

import subprocess
import sys

import psutil
import pytest
import torch

from retrieval_ray import memory
from retrieval_ray.memory import activation_bytes, free_bytes, give_back

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def machine(tmp_path):
    """A function that writes the files of a machine with 8 GiB available."""

    def make(cgroup="", **files):
        (tmp_path / "proc/self").mkdir(parents=True)
        meminfo = f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\n"
        (tmp_path / "proc/meminfo").write_text(meminfo)
        if cgroup:
            (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for name, text in files.items():
            place = tmp_path / "sys/fs/cgroup" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(str(text))
        return tmp_path

    return make


def test_a_machine_without_limits_has_what_is_available(machine):
    assert free_bytes(CPU, machine()) == 8 * GIB


def test_a_container_has_what_its_limit_leaves(machine):
    files = {
        "a/b/memory.max": "max",
        "a/b/memory.current": 1 * GIB,
        "a/memory.max": 4 * GIB,
        "a/memory.current": 3 * GIB,
        "a/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB // 2}\n",
    }
    assert free_bytes(CPU, machine("0::/a/b\n", **files)) == GIB + GIB // 2


def test_a_container_of_the_first_version_likewise(machine):
    files = {
        "memory/a/memory.limit_in_bytes": 3 * GIB,
        "memory/a/memory.usage_in_bytes": 1 * GIB,
        "memory/memory.limit_in_bytes": 2**63 - 4096,
        "memory/memory.usage_in_bytes": 9 * GIB,
    }
    assert free_bytes(CPU, machine("4:cpu,cpuacct:/z\n3:memory:/a\n0::/\n", **files)) == 2 * GIB


def test_a_limit_above_what_is_available_changes_nothing_and_one_overrun_leaves_nothing(machine):
    roomy = {"a/memory.max": 64 * GIB, "a/memory.current": GIB}
    full = {"b/memory.max": 4 * GIB, "b/memory.current": 5 * GIB}
    root = machine("0::/a\n", **roomy, **full)
    assert free_bytes(CPU, root) == 8 * GIB
    (root / "proc/self/cgroup").write_text("0::/b\n")
    assert free_bytes(CPU, root) == 0


def test_this_machine_has_memory_and_its_workers_share_it(monkeypatch):
    assert free_bytes(CPU) > 2**20
    monkeypatch.setattr("retrieval_ray.memory.free_bytes", lambda device: 8 * GIB)
    assert activation_bytes(CPU, 0) == 2 * GIB
    assert activation_bytes(CPU, 2**20) == 2 * GIB - 12 * 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert activation_bytes(CPU, 0) == GIB // 2
    assert activation_bytes(CPU, 0, runs=2) == GIB // 4  # trials of a sweep
    assert activation_bytes(CPU, 2**40) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_that_the_allocator_holds_unused_is_free():
    device = torch.device("cuda")
    before = free_bytes(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) == pytest.approx(2**28, rel=0.2)
    del block
    assert free_bytes(device) == pytest.approx(before, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_freed_below_what_is_kept_goes_back_to_the_machine():
    """128 MiB in pieces that glibc takes from its heap, every hundredth kept on top of freed ones."""
    process = psutil.Process()
    pieces = [b"x" * 65_536 for _ in range(2048)]
    full = process.memory_info().rss
    del pieces[:-1]
    give_back()
    assert full - process.memory_info().rss > 100 * 2**20


def test_between_short_parts_memory_is_not_given_back(monkeypatch):
    now, times = [10.0], []
    monkeypatch.setattr(memory, "_given_back", -1.0)
    monkeypatch.setattr(memory, "give_back", lambda: times.append(now[0]))
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    for now[0] in (10.0, 10.5, 11.0, 11.2, 12.1, 12.3, 15.0):
        memory.give_back_seldom()
    assert times == [10.0, 11.2, 12.3, 15.0]


_ALLOCATE = """
import resource, torch
from retrieval_ray.memory import give_back, keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        for size in (3, 40, 7):
            torch.ones(size, 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed()
faults()
kept = faults()
give_back()
print(first, kept, faults() > kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_freed_memory_is_not_asked_for_again():
    """40 MiB that are freed and taken again ten times are 100,000 pages to clear, or none."""
    done = subprocess.run([sys.executable, "-c", _ALLOCATE], capture_output=True, text=True, check=True)
    first, kept, given_back = done.stdout.split()
    assert int(first) > 50_000 and int(kept) < 1_000 and given_back == "True"
