"""Ray nodes as an operator starts them: `ray start`, a token, an image with a Python environment of its own.

Each runs in the foreground, so that it and all it started can be ended by their process ids: `ray stop`
would end every other cluster of this machine too.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .conftest import ROOT

OLDER = "0.0.1"
_TOLD = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR")  # of this process's environment


def image(folder: Path) -> Path:
    """A virtual environment with what is installed here, and with an older retrieval_ray; its python.

    That one holds a version and nothing else, so no job goes far that imports it.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "as-here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (packages / "retrieval_ray").mkdir()
    (packages / "retrieval_ray" / "__init__.py").write_text(f'__version__ = "{OLDER}"\n')
    return folder / "bin" / "python"


def environment(home: Path, python: Path, **more: str) -> dict[str, str]:
    """What a node has: a home, programs, and little of what this process has.

    A home with a token makes a head ask for it, by default.
    """
    told = {name: os.environ[name] for name in _TOLD if name in os.environ}
    return {
        **told,
        "PATH": f"{python.parent}{os.pathsep}{told['PATH']}",
        "HOME": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def ray(*words: str, python: Path | str = sys.executable) -> list[str]:
    """A command of Ray's own tool."""
    return [str(python), "-m", "ray.scripts.scripts", *words]


def make_token(home: Path) -> None:
    """As docs/cluster.md says: written to ``~/.ray/auth_token``."""
    told = {**os.environ, "HOME": str(home)}
    subprocess.run(ray("get-auth-token", "--generate"), env=told, check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process of this folder's checkout; what it says goes to the log."""
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and everything it started."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in reversed(family):
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 180) -> None:
    """Wait until it holds; what cannot be reached yet does not hold."""
    until = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.25)


def wait_for_node(condition: Callable[[], object], node: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for what a node does that is starting; says why where it ended instead."""

    def holds() -> object:
        assert node.poll() is None, log.read_text()[-3000:]
        return condition()

    wait_for(holds, log.stem)


@dataclass(frozen=True)
class Dashboard:
    """Where jobs are submitted, and as whom."""

    address: str
    user: Mapping[str, str]  # the environment of whoever submits; a token is not shown by default

    def submit(self, name: str, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Begin `ray job submit`, in this checkout, as docs/cluster.md says."""
        words = ("job", "submit", "--submission-id", name, "--working-dir", ".")
        head = ("--entrypoint-resources", '{"driver_node": 0.01}')
        told = {"RAY_AUTH_MODE": "token", **self.user, "RAY_API_SERVER_ADDRESS": self.address}
        return spawn(ray(*words, *head, "--", "python", *command), told, log)

    def run(self, name: str, *command: str, log: Path) -> tuple[int, list[str]]:
        """Submit and wait: the exit code of `ray job submit`, and the lines that the job said."""
        process = self.submit(name, *command, log=log)
        try:
            code = process.wait(timeout=900)
        finally:
            end(process)
        assert f"Job '{name}' submitted" in log.read_text(), log.read_text()
        return code, self.said(name)

    def stop(self, name: str) -> None:
        told = {"RAY_AUTH_MODE": "token", **self.user, "RAY_API_SERVER_ADDRESS": self.address}
        subprocess.run(ray("job", "stop", name), env=told, check=True, capture_output=True, timeout=120)

    def said(self, name: str) -> list[str]:
        """What a job printed, both streams."""
        lines = str(self.ask(f"jobs/{name}/logs")["logs"]).splitlines()
        begin = next((n for n, line in enumerate(lines) if line.startswith("Running entrypoint")), len(lines))
        return [line for line in lines[begin + 1 :] if line.strip()]

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive."""
        rows = self.ask("v0/nodes?limit=1000")["data"]["result"]["result"]
        return [row for row in rows if row["state"] == "ALIVE"]

    def actors(self) -> list[dict[str, Any]]:
        """The actors that are alive."""
        alive = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        rows: list[dict[str, Any]] = self.ask(f"v0/actors?limit=1000&{alive}")["data"]["result"]["result"]
        return rows

    def ask(self, path: str) -> Any:
        """The dashboard's own answer."""
        token = (Path(self.user["HOME"]) / ".ray" / "auth_token").read_text().strip()
        request = urllib.request.Request(f"{self.address}/api/{path}")
        request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)
