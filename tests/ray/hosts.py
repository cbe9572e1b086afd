"""Hosts on one machine that share nothing but a network: Linux namespaces, as root, with iproute2.

Each has an address, a name, a /tmp and a /dev/shm of its own; all other files it can only read. They hang
on a bridge like machines on a switch; taking the port's link down is pulling the cable.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUBNET = "198.51.100"  # set aside for documentation (RFC 5737), so nobody's own
US = f"{SUBNET}.254"  # this machine, on the bridge
MOST = 30

# $1: the host's name. $2: every host's name and address. $3: a folder for this host alone. $4: one it must
# not see, or "". The rest: the command.
_ENTER = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
for folder in /dev/shm "$3" $4; do mount -t tmpfs -o size=4g tmpfs "$folder"; done
mkdir "$3/home" "$3/tmp"
for place in / $(stat -c %m "$2"); do mount -o remount,bind,ro "$place"; done
shift 4
exec "$@"
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    namespace: str
    port: str  # the bridge's end of its cable


class Network:
    """A bridge, and the hosts on it. ``folder``: for what they read, and where each has its own files."""

    def __init__(self, folder: Path) -> None:
        self.tag = f"rr{os.getpid()}"
        self.bridge = f"{self.tag}b"
        self.own, self.names = folder / "own", folder / "hosts"
        self.own.mkdir()
        lines = [f"{SUBNET}.{n} {_name(n)}\n" for n in range(1, MOST)]
        self.names.write_text("".join(["127.0.0.1 localhost\n", *lines]))
        self.hosts: list[Host] = []
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "address", "add", f"{US}/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")

    def add(self) -> Host:
        """A host that is up and runs nothing."""
        number = len(self.hosts) + 1
        here = f"{self.tag}-{number}"
        host = Host(_name(number), f"{SUBNET}.{number}", here, f"{self.tag}p{number}")
        _run("ip", "netns", "add", here)
        self.hosts.append(host)
        _run("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", here)
        _run("ip", "link", "set", host.port, "master", self.bridge, "up")
        _run("ip", "-n", here, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", here, "link", "set", device, "up")
        return host

    def on(self, host: Host, command: Sequence[str], *, hidden: Path | None = None) -> list[str]:
        """The command line that runs a command on a host. hidden: a folder that is empty there."""
        enter = [
            "ip",
            "netns",
            "exec",
            host.namespace,
            "unshare",
            "--mount",
            "--uts",
            "--ipc",
            "sh",
            "-c",
            _ENTER,
        ]
        return [*enter, "sh", host.name, str(self.names), str(self.own), str(hidden or ""), *command]

    def cut(self, host: Host) -> None:
        """Nothing reaches the host, or comes from it; nobody is told."""
        _run("ip", "link", "set", host.port, "down")

    def remove(self) -> None:
        """Whatever still runs in the hosts must have been ended."""
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)


def _name(number: int) -> str:
    return f"host{number}"


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
