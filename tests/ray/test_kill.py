"""kill -9 of the whole process tree in each stage, and what the next start makes of it.

Each start has a hash seed of its own (Python's default), so the bytes do not depend on it either.
"""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import ROOT, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(2400)]
# What shows that a stage is under way: a line it says when it begins, or a file in its folder.
MOMENTS = [
    "line corpus 'trade",
    "line queries of",
    "line encoding 'trade",
    "file encode-*/vectors-*",
    "line retrieval on",
    "file retrieve-*/partial-*",
    "line teacher on 'trade0': late",
    "line teacher on 'trade0': bm25",
    "line groups of",
    "line training on",
    "file train-*/checkpoint-0000000[3-6]*",
    "file train-*/best-*",
    "line with the adapted model",
    "line evaluation on",
]


def start(settings: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "jobs" / "adapt.py"), str(ROOT / "configs" / "cpu.yaml")]
    return subprocess.Popen([*command, *settings], stdout=log.open("ab"), stderr=subprocess.STDOUT, cwd=ROOT)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the job and everything it started, children first seen, none left."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in reversed(family):
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> bool:
    """False if the job ended first."""
    for _ in range(30_000):
        if condition():
            return True
        if process.poll() is not None:
            assert process.returncode == 0, log.read_text()[-3000:]
            return False
        time.sleep(0.02)
    raise AssertionError(log.read_text()[-3000:])


def contents(output: Path) -> dict[str, str]:
    """What every stage wrote, and the bytes of every model the run returned."""
    found = {}
    for manifest in (output / "store").glob("*/manifest.json"):
        found[manifest.parent.name] = json.loads(manifest.read_text())["content"]
    for weights in output.glob("*/model.safetensors"):
        found[str(weights.relative_to(output))] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return found


def test_killed_in_every_stage_ends_with_the_same_bytes(
    collection: Path, student_folder: str, tmp_path: Path
) -> None:
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    process = start(small_settings(collection, Path(student_folder), whole), log)
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]

    settings = small_settings(collection, Path(student_folder), broken)
    killed = []
    for moment in MOMENTS:
        before = log.stat().st_size
        process = start(settings, log)

        def is_there(moment: str = moment, before: int = before) -> bool:
            how, _, sign = moment.partition(" ")
            if how == "line":
                lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
                return any(sign in line and "done already" not in line for line in lines)
            return any(not (path.parent / "manifest.json").exists() for path in (broken / "store").glob(sign))

        if wait_until(is_there, process, log):
            kill_tree(process)
            killed.append(moment)
    process = start(settings, log)
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    assert len(killed) >= 9, killed  # a fast stage may be over before the hand falls
    assert contents(broken) == contents(whole)
    one, other = (json.loads((o / "metrics.json").read_text()) for o in (whole, broken))
    for document in (one, other):
        del document["seconds"]
    assert one == other
