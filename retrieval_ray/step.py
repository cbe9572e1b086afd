"""One training step without Ray: each different text encoded once, across workers.

Every text of the step has one owner rank. Chunks are cut over the whole batch and dealt to ranks,
so what is computed together does not depend on how many ranks there are. Embeddings are gathered,
every rank computes the same loss, takes the gradient of its own embeddings back through its own
chunks, and parameter gradients are summed once. Accumulating gradients over smaller steps is never
needed: a batch of any size fits, chunk by chunk, and its loss sees all of it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from retrieval_ray.balance import Balance
from retrieval_ray.batching import cut_chunks, deal, excluded_mask, judged_places, unique_passages
from retrieval_ray.gradcache import embed_cached, seeded
from retrieval_ray.objective import Batch, Objective, loss_and_gradient
from retrieval_ray.ranks import world
from retrieval_ray.student import WIDTH, Role, Student
from retrieval_ray.throughput import training_flops
from retrieval_ray.tokens import Tokens

Piece = tuple[int, Role, list[int]]  # a chunk: its number, the role of its texts and where they stand


@dataclass(frozen=True)
class Lists:
    """B queries with their lists of K passages, as ids; the first of a list is its positive.

    Lists that are held out, or that a step draws from, may be shorter: their scores are filled up with
    minus infinity.
    """

    query_ids: Sequence[str]
    passage_ids: Sequence[Sequence[str]]
    teacher_BK: npt.NDArray[np.floating]
    excluded_ids: Sequence[Sequence[str]]
    # the query that each negative does answer (K - 1 a list, None where unknown), for CLP
    negative_query_ids: Sequence[Sequence[str | None]] | None = None
    # where lists are drawn from longer ones: these, with the teacher's scores
    judged: Sequence[Mapping[str, float]] | None = None


class NotFinite(FloatingPointError):
    """A step's loss or gradient is not finite.

    query_ids: whose it is, or with ``known=False`` those of the whole batch; five are kept. what: in words.
    """

    def __init__(self, what: str, query_ids: Sequence[str], *, known: bool = True) -> None:
        whose = "queries" if known else f"one of {len(query_ids):,} queries, among them"
        self.what, self.query_ids = f"{what} of {whose}", list(query_ids[:5])
        super().__init__(f"not finite: the {self.what} {', '.join(self.query_ids)}")


class Clock:
    """Seconds by name: each lap gets what went by since the last. On a GPU its work is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def embed_shared(
    student: Student,
    queries: Sequence[Tokens],
    passages: Sequence[Tokens],
    *,
    chunk_tokens: int,
    keep_bytes: int = 0,
    dropout_seed: Sequence[int] | None = None,
    balance: Balance | None = None,
    clock: Clock | None = None,
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Embeddings of all queries, then all passages, computed by all ranks together.

    keep_bytes: see ``embed_cached``; 0 for a sharded student. dropout_seed: None switches the student's
    dropout off; else each chunk draws its masks from this and its number, in both passes and on whichever
    rank. balance: of a student with experts; settled when this returns.
    Returns (embeddings_MD, backward); ``backward(gradient_MD)`` adds this rank's share to the
    parameters' gradients and then sums them over ranks.
    """
    rank, ranks = world()
    clock = clock or Clock(student.device)
    rows = [*queries, *passages]
    pieces: list[Piece] = []
    for role, texts, offset in (("query", queries, 0), ("passage", passages, len(queries))):
        for chunk in cut_chunks([len(row) for row in texts], chunk_tokens, multiple=WIDTH):
            pieces.append((len(pieces), role, (chunk + offset).tolist()))  # type: ignore[arg-type]
    width = [max(len(rows[i]) for i in piece) for _, _, piece in pieces]
    owner = deal([len(piece) * w for (_, _, piece), w in zip(pieces, width, strict=True)], ranks)
    # the widest first: per byte of a graph, attention makes them the dearest to compute again
    dealt = [
        sorted((piece for piece in pieces if owner[piece[0]] == r), key=lambda piece: -width[piece[0]])
        for r in range(ranks)
    ]

    order = [[i for _, _, positions in chunks for i in positions] for chunks in dealt]
    sharded, fill = isinstance(student.model, FSDPModule), 0
    if sharded:  # a rank's weights are with all others: all must go forward and backward alike
        keep_bytes = 0
        _, role, positions = pieces[-1]
        spare = (len(pieces), role, positions[-1:])
        fill = max(map(len, dealt)) - len(dealt[rank])
        dealt[rank] += [spare] * fill

    def embed(piece: Piece) -> Tensor:
        number, role, positions = piece
        with _dropout(student, None if dropout_seed is None else [*dropout_seed, number]):
            texts = [rows[i] for i in positions]
            if balance is None or number == len(pieces):  # a spare one: its tokens count nowhere
                return student.embed(texts, role)
            return balance.embed(number, lambda: student.embed(texts, role))

    clock.lap("data")
    if dealt[rank]:
        with student.autocast():
            own_ND, back = embed_cached(dealt[rank], embed, keep_bytes=keep_bytes)
    else:
        own_ND, back = torch.zeros(0, student.dimension, device=student.device), lambda _: None
    if balance is not None:
        balance.settle(_total)
    clock.lap("forward")
    gathered = _all_gather(own_ND[: len(order[rank])], [len(positions) for positions in order])
    embeddings_MD = torch.empty(len(rows), student.dimension, device=student.device)
    for positions, part in zip(order, gathered, strict=True):
        embeddings_MD[positions] = part
    clock.lap("communication")

    def backward(gradient_MD: Tensor) -> None:
        own = gradient_MD[order[rank]]
        with student.autocast():
            back(torch.cat([own, own.new_zeros(fill, own.shape[1])]))
        clock.lap("backward")
        if not sharded:  # else summed already
            sum_gradients(student)
        clock.lap("communication")

    return embeddings_MD, backward


@contextmanager
def _dropout(student: Student, seed: Sequence[int] | None) -> Iterator[None]:
    """The student's dropout on, its masks drawn from a seed; the outer streams are left where they are."""
    if seed is None:
        yield
        return
    with seeded(seed, student.device):
        student.model.train()
        try:
            yield
        finally:
            student.model.eval()


def training_step(
    student: Student,
    lists: Lists,
    tokens: Callable[[str], Tokens],
    query_tokens: Callable[[str], Tokens],
    objective: Objective,
    *,
    chunk_tokens: int,
    keep_bytes: int = 0,
    dropout_seed: Sequence[int] | None = None,
    balance: Balance | None = None,
    clock: Clock | None = None,
) -> dict[str, float]:
    """Forward and backward of one batch; gradients end in ``.grad``, summed over ranks.

    keep_bytes, dropout_seed, balance: see ``embed_shared``. clock: gets this rank's seconds in data, forward,
    communication, loss and backward.
    Returns the loss's terms, how many passages were referred to and encoded, the tokens encoded and the
    floating-point operations (in tera) that these take, of all ranks together. Raises on every rank alike
    ``NotFinite`` where the loss is not finite, naming the queries whose embedding or list is not, and
    ``ValueError`` where CLP has a weight and the lists have no queries of their negatives.
    """
    clock = clock or Clock(student.device)
    unique = unique_passages(lists.passage_ids)
    own = lists.negative_query_ids if objective.weights.get("clp") else None
    if own is None and objective.weights.get("clp"):
        raise ValueError("CLP needs the queries that the negatives answer: Lists.negative_query_ids")
    query_at: dict[str, int] = {}  # a negative's query may be a query of the batch too
    for query_id in [*lists.query_ids, *(q for row in own or () for q in row if q is not None)]:
        query_at.setdefault(query_id, len(query_at))
    queries = [query_tokens(query_id) for query_id in query_at]
    passages = [tokens(passage_id) for passage_id in unique.passage_ids]
    embeddings_MD, backward = embed_shared(
        student,
        queries,
        passages,
        chunk_tokens=chunk_tokens,
        keep_bytes=keep_bytes,
        dropout_seed=dropout_seed,
        balance=balance,
        clock=clock,
    )
    device = embeddings_MD.device

    def excluded(part: slice) -> Tensor:
        return torch.from_numpy(excluded_mask(unique, lists.excluded_ids[part])).to(device)

    index_BK = torch.from_numpy(unique.index_BK).to(device)
    teacher_BK = torch.from_numpy(np.asarray(lists.teacher_BK, dtype=np.float64)).to(device)

    def judged(part: slice) -> tuple[Tensor, Tensor]:
        if lists.judged is None:
            return index_BK[part], teacher_BK[part]
        places_BW, scores_BW = judged_places(unique, lists.judged[part])
        return torch.from_numpy(places_BW).to(device), torch.from_numpy(scores_BW).to(device)

    own = own or [[None] * (unique.index_BK.shape[1] - 1)] * len(lists.query_ids)
    values, gradient_MD = loss_and_gradient(
        objective,
        torch.split(embeddings_MD, [len(queries), len(passages)]),
        Batch(
            query_B=torch.tensor([query_at[q] for q in lists.query_ids], device=device),
            index_BK=index_BK,
            teacher_BK=teacher_BK,
            judged=judged,
            excluded=excluded,
            counts_N=torch.from_numpy(unique.counts_N).to(device),
            own_BJ=torch.tensor(
                [[-1 if q is None else query_at[q] for q in row] for row in own],
                dtype=torch.int64,
                device=device,
            ),
        ),
    )
    if balance is not None and balance.weight:
        values["balance"] = balance.value
        values["loss"] += balance.weight * balance.value
    clock.lap("loss")
    lengths = [len(row) for row in (*queries, *passages)]
    for what, fine, rows_MD in (
        ("loss", bool(np.isfinite(values["loss"])), embeddings_MD),
        ("gradient", bool(gradient_MD.isfinite().all()), gradient_MD),
    ):
        if not fine:
            broken_M = ~rows_MD.isfinite().all(dim=1).cpu().numpy()
            broken_B = broken_M[[query_at[query_id] for query_id in lists.query_ids]]
            broken_B |= broken_M[len(queries) :][unique.index_BK].any(axis=1)
            broken_B |= [any(broken_M[query_at[q]] for q in row if q is not None) for row in own]
            broken_B |= np.isnan(lists.teacher_BK).any(axis=1) | np.isposinf(lists.teacher_BK).any(axis=1)
            at_fault = [lists.query_ids[b] for b in np.flatnonzero(broken_B)]
            raise NotFinite(what, at_fault or lists.query_ids, known=bool(at_fault))
    backward(gradient_MD.to(embeddings_MD.dtype))
    return {
        **values,
        "passages": float(unique.index_BK.size),
        "encoded": float(len(passages)),
        "tokens": float(sum(lengths)),
        "tflop": training_flops(student.model, lengths) / 1e12,
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


def _total(mine: Tensor) -> Tensor:
    """The sum of every rank's tensor."""
    if world()[1] == 1:
        return mine
    total = mine.clone()
    dist.all_reduce(total)
    return total


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
