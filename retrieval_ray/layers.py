"""A student's vectors of texts after each of its layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_ray.batching import cut_chunks
from retrieval_ray.student import Role, Student

FINAL = "final"  # the embedding itself


def layer_vectors(
    student: Student, texts: Sequence[str], role: Role, *, token_budget: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Vectors_ND of texts, in their order, by layer: ``embeddings`` (of tokens), ``1``, ..., ``final``.

    Every layer's tokens are pooled as the student pools its last one's, and normalised; ``final`` is what
    ``encode`` gives, and stands for the last layer. Where the backbone does not show its layers, or pools
    by itself, it is all there is.
    """
    rows = student.tokenize(texts, role)
    first, *rest = student.model
    chunks: list[list[Tensor]] = []

    def look(module: Any, inputs: Any, features: dict[str, Any]) -> None:
        states = features.pop("all_layer_embeddings", ())
        if "sentence_embedding" in features:
            states = ()
        chunks.append([_pooled(rest, features, each) for each in states[:-1]])

    config = first.auto_model.config
    before = config.output_hidden_states
    hook = first.register_forward_hook(look)
    config.output_hidden_states = True
    try:
        final_ND = student.encode_tokens(rows, role, token_budget=token_budget)
    finally:
        config.output_hidden_states = before
        hook.remove()
    # in the order in which ``encode_tokens`` computes
    order = [row for chunk in cut_chunks([len(row) for row in rows], token_budget) for row in chunk]
    found = {}
    for n, parts in enumerate(zip(*chunks, strict=True)):
        vectors_ND = np.empty((len(rows), parts[0].shape[1]), dtype=np.float32)
        vectors_ND[order] = torch.cat(parts).cpu().numpy()
        found[str(n) if n else "embeddings"] = vectors_ND
    return {**found, FINAL: final_ND}


def _pooled(modules: Sequence[Any], features: Mapping[str, Any], states_NTD: Tensor) -> Tensor:
    """One layer's vectors: what the modules behind the transformer first make of its tokens."""
    made: dict[str, Any] = {**features, "token_embeddings": states_NTD.float()}
    for module in modules:
        made = module(made)
        if "sentence_embedding" in made:
            break
    return torch.nn.functional.normalize(made["sentence_embedding"].float(), dim=-1)
