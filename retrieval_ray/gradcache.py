"""GradCache (arXiv 2101.06983) as a closure: the loss sees every embedding, memory holds one chunk.

The first pass embeds chunk by chunk without a graph; after the loss the second pass embeds each
chunk again and sends the cached gradient of its embeddings through it. Exact as long as both passes
compute the same function (dropout off).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


def embed_cached(
    chunks: Sequence[Chunk], embed: Callable[[Chunk], Tensor]
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Embeddings of all chunks, in order, and the function that back-propagates through them.

    Returns (embeddings_ND without graph, backward). ``backward(gradient_ND)`` adds to the ``.grad``
    of whatever parameters ``embed`` uses.
    """
    with torch.no_grad():
        pieces = [embed(chunk) for chunk in chunks]

    def backward(gradient_ND: Tensor) -> None:
        start = 0
        for chunk, piece in zip(chunks, pieces, strict=True):
            gradient = gradient_ND[start : start + len(piece)]
            start += len(piece)
            again = embed(chunk)
            again.backward(gradient.to(again.dtype))  # type: ignore[no-untyped-call]

    return torch.cat(pieces), backward
