"""The processes of one training, its ranks, and what they must agree on."""

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


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if world()[1] > 1:
        dist.barrier()
