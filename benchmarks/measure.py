"""What every benchmark shares: interleaved rounds, peak memory, the machine's facts, the JSON line.

A script is run as ``python benchmarks/NAME.py [--quick]``. Its last line is one JSON object; without
``--quick`` the same object is written to ``benchmarks/results/NAME.json``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "sentence-transformers", "ray", "numpy")


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that knows ``--quick``."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="smaller and under five minutes; writes no file")
    return made


def seconds_of(run: Callable[[], object]) -> float:
    """Wall seconds of one call, the device's work included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run. The runs take turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script in a process of its own; what its last line says, as JSON."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class PeakMemory:
    """Peak memory of this process and its children above what they held on entry, in MiB.

    Sampled every few milliseconds: private memory alone (``megabytes``), and with the pages of mapped
    files and shared memory that are resident (``with_mapped``). ``before``: private memory on entry.
    """

    def __enter__(self) -> "PeakMemory":
        self._stop = threading.Event()
        self._start = _resident()
        self._peak = self._start
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        private, whole = ((peak - start) / 2**20 for peak, start in zip(self._peak, self._start, strict=True))
        self.megabytes, self.with_mapped = round(private, 1), round(whole, 1)
        self.before = round(self._start[0] / 2**20, 1)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._sample()

    def _sample(self) -> None:
        now = _resident()
        self._peak = (max(self._peak[0], now[0]), max(self._peak[1], now[1]))


def _resident() -> tuple[int, int]:
    """Bytes of private and of all resident memory, of this process and all its children."""
    private = whole = 0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        private += memory.rss - getattr(memory, "shared", 0)
        whole += memory.rss
    return private, whole


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2] for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0].strip() if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str | None:
    """None where it is not installed: the core's benchmarks need no Ray."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def report(
    benchmark: str,
    *,
    quick: bool,
    ratio: float,
    ours: float,
    peer: float,
    unit: str,
    equal: bool,
    **more: Any,
) -> None:
    """Print the benchmark's JSON object as the last line; without ``quick`` also write its file.

    ratio: ours over the peer, more is better, whatever the unit. equal: whether both did the same.
    """
    result = {
        "benchmark": benchmark,
        "ratio": round(ratio, 3),
        "ours": _short(ours),
        "peer": _short(peer),
        "unit": unit,
        "equal": equal,
        **{name: _short(value) for name, value in more.items()},
        "quick": quick,
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python", *map(_portable, sys.argv)]),
    }
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


def _portable(argument: str) -> str:
    """A path of this machine by its last part: where it lies elsewhere, nobody knows."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    return value


def commit(of: str = "HEAD") -> str:
    """The commit that is checked out; or the hash of a folder in it (``HEAD:folder``)."""
    done = subprocess.run(["git", "rev-parse", "--short", of], capture_output=True, text=True)
    return done.stdout.strip()
