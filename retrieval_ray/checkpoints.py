"""Checkpoints of training: a safetensors file each, and the loop's state as JSON beside it.

Every rank calls these functions; rank 0 writes. Tensors that are sharded over ranks are written whole, so
that a run may go on with any number of workers; they are gathered, written and read one by one, so that no
machine ever holds them all.
"""

import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from retrieval_ray.artifacts import Location
from retrieval_ray.ranks import from_rank_zero, world
from retrieval_ray.student import Student

_KEPT = 2
_SEEN_SECONDS = 120.0  # that a shared folder may take to show a file to another machine; NFS: 60
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


def save_checkpoint(
    student: Student, optimiser: torch.optim.Optimizer, state: Mapping[str, Any], folder: Location, name: str
) -> None:
    """Write the trained weights, the optimiser's state and ``state`` (JSON); keep the last two.

    name: STEP-EPOCH with leading zeros, so that names sort as checkpoints were made. The state comes last, in
    one piece: without it there is no checkpoint.
    """
    moments = {
        f"optimiser.{kind}.{name}": torch.as_tensor(value)
        for name, parameter in _named(student)
        for kind, value in optimiser.state.get(parameter, {}).items()
    }
    _write(_weights(student) | moments, folder / f"checkpoint-{name}.safetensors")
    if world()[0] == 0:
        (folder / f"checkpoint-{name}.json").write(json.dumps(state).encode())  # compact: a row a step
        for old in _names(folder)[:-_KEPT]:
            (folder / f"{old}.json").remove()
            (folder / f"{old}.safetensors").remove()


def load_checkpoint(
    student: Student, optimiser: torch.optim.Optimizer, folder: Location
) -> dict[str, Any] | None:
    """Go back to the newest checkpoint of a folder; returns its state, None where there is none."""
    name = from_rank_zero(next(reversed(_names(folder)), None))
    if name is None:
        return None
    for kind in ("safetensors", "json"):
        _wait_for(folder / f"{name}.{kind}")
    tensors = _Tensors(folder / f"{name}.safetensors")
    _put(student, tensors)
    kinds: dict[str, list[str]] = {}
    for key in tensors.entries:
        if key.startswith("optimiser."):
            _, kind, weight = key.split(".", 2)
            kinds.setdefault(weight, []).append(kind)
    for weight, parameter in _named(student):
        if weight in kinds:
            moments = {kind: tensors[f"optimiser.{kind}.{weight}"] for kind in kinds[weight]}
            optimiser.state[parameter] = {
                # a step count has no shape and no place; moments lie as the parameter does
                kind: _like(value, parameter) if value.shape else value.to(parameter.device)
                for kind, value in moments.items()
            }
    state: dict[str, Any] = (folder / f"{name}.json").read_json()
    return state


def save_weights(student: Student, target: Location) -> None:
    """Write the trained weights alone."""
    _write(_weights(student), target)


def load_weights(student: Student, source: Location) -> None:
    """Put the weights of a file that was written here into a student, whether or not it is sharded."""
    _wait_for(source)
    _put(student, _Tensors(source))


def newest(folder: Location) -> Location | None:
    """The file of the newest checkpoint; ``load_weights`` reads it."""
    names = _names(folder)
    return folder / f"{names[-1]}.safetensors" if names else None


def step_of(folder: Location) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    names = _names(folder)
    return int(names[-1].split("-")[1]) if names else 0


def _wait_for(file: Location) -> None:
    """Until this machine sees what rank 0 does; raises ``OSError`` where it never does."""
    until = time.monotonic() + _SEEN_SECONDS
    while world()[0] != 0 and not file.exists():
        if time.monotonic() > until:
            raise OSError(f"{file.url}: rank 0 sees this file, rank {world()[0]} does not")
        time.sleep(0.5)


def _names(folder: Location) -> list[str]:
    """Of the checkpoints that are whole, the oldest first."""
    there = [name.removesuffix(".json") for name in folder.names() if name.endswith(".json")]
    return [name for name in there if name.startswith("checkpoint-")]


def _named(student: Student) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in student.model.named_parameters() if p.requires_grad]


def _weights(student: Student) -> dict[str, Tensor]:
    return {f"model.{name}": parameter for name, parameter in _named(student)}


def _write(tensors: Mapping[str, Tensor], target: Location) -> None:
    """Rank 0 writes the tensors as safetensors (a header with their places, then their bytes)."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    pieces = itertools.chain(
        [len(header).to_bytes(8, "little") + header], (_bytes(tensor) for tensor in tensors.values())
    )
    if world()[0] == 0:
        target.write_pieces(pieces)
    else:
        for _ in pieces:  # a shard is gathered by all ranks together
            pass


def _bytes(tensor: Tensor) -> bytes:
    """A tensor, whole; of a sharded one only rank 0 needs more than to take part."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if world()[0] != 0:
        return b""
    return whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class _Tensors:
    """A safetensors file on any filesystem, of which a tensor is read when it is asked for."""

    def __init__(self, source: Location) -> None:
        self._file = source.filesystem.open_input_file(source.path)
        size = int.from_bytes(self._file.read(8), "little")
        self.entries: dict[str, dict[str, Any]] = json.loads(self._file.read(size))
        self._start = 8 + size

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        start, end = entry["data_offsets"]
        self._file.seek(self._start + start)
        data = bytearray(self._file.read(end - start))
        return torch.frombuffer(data, dtype=_TYPES[entry["dtype"]]).reshape(entry["shape"])


def _put(student: Student, tensors: _Tensors) -> None:
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
