"""One training step without Ray: each different passage encoded once, across workers.

Every text of the step has one owner rank. Chunks are cut over the whole batch and dealt to ranks,
so what is computed together does not depend on how many ranks there are. Embeddings are gathered,
every rank computes the same loss, takes the gradient of its own embeddings back through its own
chunks, and parameter gradients are summed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from retrieval_ray import losses
from retrieval_ray.batching import cut_chunks, deal, excluded_mask, unique_passages
from retrieval_ray.gradcache import embed_cached
from retrieval_ray.student import Role, Student, Tokens

Piece = tuple[Role, list[int]]  # a chunk: the role of its texts and where they stand


@dataclass(frozen=True)
class Lists:
    """B queries with their lists of K passages, as ids."""

    query_ids: Sequence[str]
    passage_ids: Sequence[Sequence[str]]
    teacher_BK: npt.NDArray[np.floating]
    excluded_ids: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Objective:
    """The combined loss: listwise KL + infonce_weight x InfoNCE, with their temperatures."""

    student_temperature: float
    teacher_temperature: float
    infonce_temperature: float
    infonce_weight: float

    def __call__(
        self,
        scores_BN: Tensor,
        index_BK: Tensor,
        teacher_BK: Tensor,
        excluded_BN: Tensor,
        counts_N: Tensor,
    ) -> dict[str, Tensor]:
        """Named terms and their weighted sum ``loss``. The positive is each list's first."""
        kl = losses.listwise_kl(
            scores_BN.gather(1, index_BK),
            teacher_BK,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
        )
        infonce = losses.infonce(
            scores_BN,
            index_BK[:, 0],
            excluded_BN=excluded_BN,
            counts_N=counts_N,
            temperature=self.infonce_temperature,
        )
        return {"kl": kl, "infonce": infonce, "loss": kl + self.infonce_weight * infonce}


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def embed_shared(
    student: Student, queries: Sequence[Tokens], passages: Sequence[Tokens], *, chunk_tokens: int
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Embeddings of all queries, then all passages, computed by all ranks together.

    Returns (embeddings_MD, backward); ``backward(gradient_MD)`` adds this rank's share to the
    parameters' gradients and then sums them over ranks.
    """
    rank, ranks = world()
    rows = [*queries, *passages]
    pieces: list[Piece] = []
    for role, texts, offset in (("query", queries, 0), ("passage", passages, len(queries))):
        for chunk in cut_chunks([len(row) for row in texts], chunk_tokens):
            pieces.append((role, (chunk + offset).tolist()))  # type: ignore[arg-type]
    cost = [len(piece) * max(len(rows[i]) for i in piece) for _, piece in pieces]
    owner = deal(cost, ranks)
    mine = [piece for piece, o in zip(pieces, owner, strict=True) if o == rank]

    def embed(piece: Piece) -> Tensor:
        role, positions = piece
        return student.embed([rows[i] for i in positions], role)

    if mine:
        own_ND, back = embed_cached(mine, embed)
    else:
        own_ND, back = torch.zeros(0, student.dimension, device=student.device), lambda _: None
    order = [
        [i for (_, piece), o in zip(pieces, owner, strict=True) if o == r for i in piece]
        for r in range(ranks)
    ]
    gathered = _all_gather(own_ND, [len(positions) for positions in order])
    embeddings_MD = torch.empty(len(rows), student.dimension, device=student.device)
    for positions, part in zip(order, gathered, strict=True):
        embeddings_MD[positions] = part

    def backward(gradient_MD: Tensor) -> None:
        back(gradient_MD[order[rank]])
        sum_gradients(student)

    return embeddings_MD, backward


def training_step(
    student: Student,
    lists: Lists,
    tokens: Callable[[str], Tokens],
    query_tokens: Callable[[str], Tokens],
    objective: Objective,
    *,
    chunk_tokens: int,
) -> dict[str, float]:
    """Forward and backward of one batch; gradients end in ``.grad``, summed over ranks.

    Returns the loss's terms and how many passages were referred to and encoded. Raises
    ``FloatingPointError`` naming the queries where the loss is not finite.
    """
    unique = unique_passages(lists.passage_ids)
    embeddings_MD, backward = embed_shared(
        student,
        [query_tokens(query_id) for query_id in lists.query_ids],
        [tokens(passage_id) for passage_id in unique.passage_ids],
        chunk_tokens=chunk_tokens,
    )
    leaf_MD = embeddings_MD.detach().requires_grad_(True)
    split = len(lists.query_ids)
    # float64, as in the papers: InfoNCE's temperature magnifies what float32 would round off
    scores_BN = leaf_MD[:split].double() @ leaf_MD[split:].double().T
    device = leaf_MD.device
    terms = objective(
        scores_BN,
        torch.from_numpy(unique.index_BK).to(device),
        torch.from_numpy(np.asarray(lists.teacher_BK, dtype=np.float64)).to(device),
        torch.from_numpy(excluded_mask(unique, lists.excluded_ids)).to(device),
        torch.from_numpy(unique.counts_N).to(device),
    )
    if not torch.isfinite(terms["loss"]):
        raise FloatingPointError(f"the loss is not finite; queries {list(lists.query_ids)[:5]}")
    terms["loss"].backward()  # type: ignore[no-untyped-call]
    assert leaf_MD.grad is not None
    backward(leaf_MD.grad)
    return {
        **{name: float(value.detach()) for name, value in terms.items()},
        "passages": float(unique.index_BK.size),
        "encoded": float(len(unique.passage_ids)),
    }


def _all_gather(own_ND: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Every rank's rows; ``sizes`` says how many each rank has."""
    _, ranks = world()
    if ranks == 1:
        return [own_ND]
    padded = own_ND.new_zeros(max(sizes), own_ND.shape[1])
    padded[: len(own_ND)] = own_ND
    received = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(received, padded)
    return [part[:size] for part, size in zip(received, sizes, strict=True)]


def sum_gradients(student: Student) -> None:
    """Sum parameter gradients over ranks, in one message.

    A parameter that no rank has a gradient for keeps none, so that weight decay leaves it alone as it
    does on a single rank: behind the gradients travels one flag per parameter.
    """
    _, ranks = world()
    if ranks == 1:
        return
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    flags = torch.tensor([float(p.grad is not None) for p in parameters], device=student.device)
    gradients = [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters]
    flat = torch.cat([*gradients, flags])
    dist.all_reduce(flat)
    present = flat[-len(parameters) :].tolist()
    start = 0
    for p, has_gradient in zip(parameters, present, strict=True):
        p.grad = flat[start : start + p.numel()].view_as(p) if has_gradient else None
        start += p.numel()
