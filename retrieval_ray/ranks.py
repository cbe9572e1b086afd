"""The processes of one training, its ranks, and what they must agree on or share."""

import os
import socket
import tempfile
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_rank_zero(value: _Value) -> _Value:
    """Rank 0's value on every rank, all of which ask.

    What decides how training goes on comes from here: clocks differ, sums differ in their last digits, and a
    shared folder may show one machine a file before the others.
    """
    if world()[1] == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def once_a_machine(make: Callable[[], _Value]) -> _Value:
    """What ``make`` returns on the first rank of this machine, on all of its ranks; every rank asks.

    For what is large and lies in the machine's own temporary folder: what is returned is sent to every rank
    of every machine, so it should be a path.
    """
    rank, ranks = world()
    if ranks == 1:
        return make()
    places: list[object] = [None] * ranks
    dist.all_gather_object(places, _machine())
    first = places.index(places[rank])
    made: list[_Value | None] = [None] * ranks
    dist.all_gather_object(made, make() if first == rank else None)
    found = made[first]
    assert found is not None
    return found


def _machine() -> tuple[str, int, int]:
    """Names the machine by its temporary folder: containers of one host each have their own."""
    folder = os.stat(tempfile.gettempdir())
    return socket.gethostname(), folder.st_dev, folder.st_ino


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if world()[1] > 1:
        dist.barrier()
