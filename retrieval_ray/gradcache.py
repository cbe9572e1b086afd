"""GradCache (arXiv 2101.06983) as a closure: the loss sees every embedding, memory holds few chunks.

The first pass embeds chunk by chunk, and keeps the graphs of the first chunks as long as they fit; after
the loss these go backward at once, and each of the others is embedded again. Kept or computed again, a
chunk gives the same gradient, as long as ``embed`` is a function of the chunk alone (nothing is drawn, or
``seeded`` by the chunk).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


def embed_cached(
    chunks: Sequence[Chunk], embed: Callable[[Chunk], Tensor], *, keep_bytes: int = 0
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Embeddings of all chunks, in order, and the function that back-propagates through them, once.

    chunks: the dearest first; they save the most and, going backward first, make room for the others.
    keep_bytes: what graphs may take between the passes. The first chunk's is always kept (computing it
    again would take as much), a further one's if a graph like the last one still fits.
    Returns (embeddings_ND without graph, backward). ``backward(gradient_ND)`` adds to the ``.grad`` of
    whatever parameters ``embed`` uses.
    """
    graphs: list[Tensor] = []
    pieces: list[Tensor] = []
    with _saved_bytes() as saved:
        used = last = 0
        for chunk in chunks:
            if used + last > keep_bytes and graphs:
                break
            graphs.append(embed(chunk))
            pieces.append(graphs[-1].detach())
            used, last = saved(), saved() - used
    with torch.no_grad():
        pieces += [embed(chunk) for chunk in chunks[len(graphs) :]]

    def backward(gradient_ND: Tensor) -> None:
        gradients = torch.split(gradient_ND, [len(piece) for piece in pieces])
        for chunk, gradient in zip(chunks, gradients, strict=True):
            output = graphs.pop(0) if graphs else embed(chunk)
            with torch.autocast(output.device.type, enabled=False):  # where the caller has one around this
                output.backward(gradient.to(output.dtype))  # type: ignore[no-untyped-call]

    return torch.cat(pieces), backward


@contextmanager
def seeded(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """What is drawn inside comes from this seed alone; the streams outside are left where they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        yield


@contextmanager
def _saved_bytes() -> Iterator[Callable[[], int]]:
    """Counts the memory that graphs made inside hold on to, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())
