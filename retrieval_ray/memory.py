"""How much memory a process may still take: on a GPU, or on a machine or in its container."""

import ctypes
import os
import time
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_SHARE = {"cuda": 0.8, "cpu": 0.25}  # of what is free; other programs live on a machine too
_given_back = -1.0  # when


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that is free now: the GPU's with what the allocator holds unused, or the machine's.

    A machine's is the least of what the kernel calls available and what every enclosing cgroup (of
    containers and batch systems, version 1 or 2) leaves, page cache that it can drop counted as free.
    root: where ``proc`` and ``sys`` lie.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return min([1024 * int(available.split()[1]), *_left_in_cgroups(root)])


def activation_bytes(device: torch.device, parameters: int, *, runs: int = 1) -> int:
    """What graphs may take between the passes of a training step, measured before the first one.

    A share of the free memory (a quarter of a machine's, split among its workers, or four fifths of a GPU's),
    less the gradients and AdamW's two moments that are still to come. parameters: trained numbers. runs: how
    many trainings there may be on this machine at the same time.
    """
    # a GPU is one worker's alone
    sharers = runs * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return max(0, int(free_bytes(device) * _SHARE[device.type] / sharers) - 3 * 4 * parameters)


def keep_freed() -> None:
    """Let freed memory stay with this process, until ``give_back``.

    glibc gives the end of its heap back after every chunk of a step, and the kernel clears each page of it
    for the next one: a tenth of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back() -> None:
    """Give freed memory back to the machine; glibc keeps it, more and more as sizes of batches differ."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def give_back_seldom() -> None:
    """``give_back``, but once a second at most: between two short parts it would be asked for again."""
    global _given_back
    if time.monotonic() - _given_back > 1:
        give_back()
        _given_back = time.monotonic()


def _left_in_cgroups(root: Path) -> list[int]:
    """What each enclosing cgroup with a limit leaves."""
    left = []
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if number == "0" else "memory")
        names = ("memory.max", "memory.current") if number == "0" else (
            "memory.limit_in_bytes", "memory.usage_in_bytes"
        )  # fmt: skip
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if (place / names[0]).exists():
                limit = (place / names[0]).read_text().strip()
                if limit != "max":
                    used = int((place / names[1]).read_text()) - _droppable(place / "memory.stat")
                    left.append(max(0, int(limit) - used))
            if place == top:
                break
    return left


def _droppable(stat: Path) -> int:
    """Page cache that goes when memory is needed."""
    facts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(facts.get("inactive_file", 0))
