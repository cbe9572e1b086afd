"""Checkpoints of training: one safetensors file each, with the loop's state as JSON in its header.

Every rank calls these functions; rank 0 writes. Tensors that are sharded over ranks are written whole, so
that a run may go on with any number of workers.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from retrieval_ray.artifacts import Location
from retrieval_ray.step import world
from retrieval_ray.student import Student

_KEPT = 2


def save_checkpoint(
    student: Student, optimiser: torch.optim.Optimizer, state: Mapping[str, Any], folder: Location, name: str
) -> None:
    """Write the trained weights, the optimiser's state and ``state`` (JSON); keep the last two.

    name: sorts as the checkpoints were made.
    """
    moments = (
        (f"optimiser.{kind}.{name}", torch.as_tensor(value))
        for name, parameter in _named(student)
        for kind, value in optimiser.state.get(parameter, {}).items()
    )
    tensors = _gathered(itertools.chain(_weights(student), moments))
    if world()[0] != 0:
        return
    data = safetensors.torch.save(tensors, {"state": json.dumps(state)})
    (folder / f"checkpoint-{name}.safetensors").write(data)
    for old in _checkpoints(folder)[:-_KEPT]:
        (folder / old).remove()


def load_checkpoint(
    student: Student, optimiser: torch.optim.Optimizer, folder: Location
) -> dict[str, Any] | None:
    """Go back to the newest checkpoint of a folder; returns its state, None where there is none."""
    file = newest(folder)
    if file is None:
        return None
    data = file.read()
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    _put(student, tensors)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, kind, weight = key.split(".", 2)
            moments.setdefault(weight, {})[kind] = value
    for weight, parameter in _named(student):
        if weight in moments:
            optimiser.state[parameter] = {
                # a step count has no shape and no place; moments lie as the parameter does
                kind: _like(value, parameter) if value.shape else value.to(parameter.device)
                for kind, value in moments[weight].items()
            }
    state: dict[str, Any] = json.loads(header["state"])
    return state


def save_weights(student: Student, target: Location) -> None:
    """Write the trained weights alone."""
    tensors = _gathered(_weights(student))
    if world()[0] == 0:
        target.write(safetensors.torch.save(tensors))


def load_weights(student: Student, source: Location) -> None:
    """Put the weights of a file that was written here into a student, whether or not it is sharded."""
    _put(student, safetensors.torch.load(source.read()))


def newest(folder: Location) -> Location | None:
    """The file of the newest checkpoint; ``load_weights`` reads it."""
    there = _checkpoints(folder)
    return folder / there[-1] if there else None


def _checkpoints(folder: Location) -> list[str]:
    return [name for name in folder.names() if name.startswith("checkpoint-")]


def _named(student: Student) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in student.model.named_parameters() if p.requires_grad]


def _weights(student: Student) -> Iterator[tuple[str, Tensor]]:
    return ((f"model.{name}", parameter) for name, parameter in _named(student))


def _gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On rank 0 every tensor, whole, in the host's memory; on the others nothing, one by one."""
    found = {}
    for name, tensor in tensors:
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world()[0] == 0:
            found[name] = whole.cpu().contiguous()
    return found


def _put(student: Student, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in _named(student):
            parameter.copy_(_like(tensors[f"model.{name}"], parameter))


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of a parameter's shape, placed as the parameter is."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        # every rank has the whole, so nothing need be sent
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return whole
