"""The training loop without Ray: schedule, selection, checkpoints that resume to the same bits.

Runs alike on one process or on every rank of a process group; only rank 0 writes.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from retrieval_ray.artifacts import Location
from retrieval_ray.batching import epoch_batches, unique_passages
from retrieval_ray.losses import listwise_kl
from retrieval_ray.memory import activation_bytes
from retrieval_ray.metrics import Qrels, per_query
from retrieval_ray.objective import Objective
from retrieval_ray.runs import top_k
from retrieval_ray.step import Clock, Lists, embed_shared, training_step, world
from retrieval_ray.student import Role, Student
from retrieval_ray.throughput import matmul_limit
from retrieval_ray.tokens import TokenRows, Tokens

_KL_GUARD = 1.5  # times the untouched student's
OnStep = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class CorpusData:
    """What training needs of one corpus: lists, texts, and judged dev queries where there are some."""

    name: str
    train: Lists
    dev: Lists
    passages: Mapping[str, str]
    queries: Mapping[str, str]
    dev_qrels: Qrels
    dev_pools: Mapping[str, Sequence[str]]  # passages that a judged dev query's order is made of


@dataclass(frozen=True)
class Settings:
    """How to train; the numbers of config.TrainConfig with temperatures resolved."""

    objective: Objective
    batch_queries: int
    max_epochs: int
    patience: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    min_warmup_steps: int
    lr_floor: float
    passage_tokens: int | None  # training reads passages only so far; dev measures read them whole
    chunk_tokens: int
    activation_bytes: int | None  # that kept graphs may take; None: measured
    dropout: bool
    checkpoint_seconds: float
    seed: int


@dataclass
class Progress:
    """Where training stands; a checkpoint holds exactly this, the weights and the optimiser."""

    epoch: int = 0  # the epoch being trained; 0 until the untouched student is evaluated
    position: int = 0  # batches of this epoch that are done
    step: int = 0
    stale: int = 0  # epochs since the last improvement
    best_epoch: int | None = None  # the best trained epoch, kept as the candidate
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch
    steps: list[dict[str, float]] = field(default_factory=list)  # one row a step
    speed: list[dict[str, float]] = field(default_factory=list)  # likewise; no two runs have it alike
    done: bool = False


def fit(
    student: Student,
    corpora: Sequence[CorpusData],
    settings: Settings,
    folder: Location,
    *,
    on_step: OnStep = lambda step, total, terms: None,
    on_epoch: Callable[[Mapping[str, float]], None] = lambda row: None,
) -> Progress:
    """Train, and leave the best trained weights in rank 0's student and in ``folder``.

    Continues from the newest checkpoint in ``folder``. Whether the best trained epoch beats the
    untouched student is ``chosen(progress.history) > 0``.
    """
    torch.manual_seed(settings.seed)
    student.prepare_training()
    token_rows = [_tokenised(student, corpus) for corpus in corpora]
    short_rows = [_shortened(student, corpus, settings.passage_tokens) for corpus in corpora]
    batch = settings.batch_queries
    sizes = [len(corpus.train.query_ids) for corpus in corpora]
    per_epoch = len(epoch_batches(sizes, batch, seed=settings.seed, epoch=1))
    total = per_epoch * settings.max_epochs
    parameters = [p for p in student.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    keep_bytes = settings.activation_bytes
    if keep_bytes is None:
        keep_bytes = activation_bytes(student.device, sum(p.numel() for p in parameters))
    limit = matmul_limit(student.device, student.precision)
    progress = _resume(student, optimiser, folder)
    saved_at = time.monotonic()

    def lr_scale(step: int) -> float:
        """Linear warm-up, then linear decay to ``lr_floor`` (CADET's schedule)."""
        warmup = max(settings.min_warmup_steps, per_epoch // 2)
        if step < warmup:
            return (step + 1) / warmup
        return max(settings.lr_floor, 1 - (step - warmup) / max(1, total - warmup))

    def finish_epoch() -> None:
        row = {"epoch": float(progress.epoch), "step": float(progress.step)}
        row |= evaluate(student, corpora, token_rows, settings)
        progress.history.append(row)
        on_epoch(row)
        if progress.epoch > 0:
            if candidate(progress.history) == progress.epoch:
                progress.best_epoch = progress.epoch
                _save_weights(student, folder / "best.safetensors")
            improved = chosen(progress.history) == progress.epoch
            progress.stale = 0 if improved else progress.stale + 1
        progress.done = progress.stale >= settings.patience or progress.epoch >= settings.max_epochs
        progress.epoch, progress.position = progress.epoch + 1, 0
        _checkpoint(student, optimiser, progress, folder)

    if progress.epoch == 0:
        finish_epoch()
    while not progress.done:
        batches = epoch_batches(sizes, batch, seed=settings.seed, epoch=progress.epoch)
        for which, indices in batches[progress.position :]:
            started = time.monotonic()
            scale = lr_scale(progress.step)
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * scale
            clock = Clock(student.device)
            terms = training_step(
                student,
                _take(corpora[which].train, indices),
                short_rows[which].__getitem__,
                token_rows[which]["query"].__getitem__,
                settings.objective,
                chunk_tokens=settings.chunk_tokens,
                keep_bytes=keep_bytes,
                dropout_seed=(settings.seed, progress.step) if settings.dropout else None,
                clock=clock,
            )
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            progress.step += 1
            progress.position += 1
            progress.steps.append({"step": float(progress.step), "lr": scale, **terms})
            seconds = time.monotonic() - started
            progress.speed.append(
                {
                    "step": float(progress.step),
                    "seconds": seconds,
                    **clock.seconds,
                    "tokens_per_second": terms["tokens"] / seconds,
                    "matmul_share": terms["tflop"] * 1e12 / seconds / limit / world()[1],
                }
            )
            on_step(progress.step, total, {**terms, "norm": float(norm), "seconds": seconds})
            if time.monotonic() - saved_at > settings.checkpoint_seconds:
                _checkpoint(student, optimiser, progress, folder)
                saved_at = time.monotonic()
        finish_epoch()
    if progress.best_epoch is not None and world()[0] == 0:  # others need not wait for its file
        _load_weights(student, folder / "best.safetensors")
    return progress


def chosen(history: Sequence[Mapping[str, float]]) -> int:
    """The epoch to return, 0 being the untouched student.

    With judged dev queries the highest nDCG@10. Without, the highest nDCG@10 against the teacher's
    order, the dev KL being a guard: an epoch far from the teacher's distribution is not taken. The KL
    itself does not choose: it fell while quality fell, and rose while quality rose (LOG.md).
    """
    base = history[0]
    best, best_value = 0, _value(base)
    for row in history[1:]:
        if "dev_ndcg@10" not in row and row["dev_kl"] > _KL_GUARD * base["dev_kl"]:
            continue
        if _value(row) > best_value:
            best, best_value = int(row["epoch"]), _value(row)
    return best


def candidate(history: Sequence[Mapping[str, float]]) -> int:
    """The best trained epoch, whether or not it beats the untouched student."""
    picked = chosen(history)
    if picked:
        return picked
    return int(max(history[1:], key=lambda row: (_value(row), -row["epoch"]))["epoch"])


def _value(row: Mapping[str, float]) -> float:
    return row["dev_ndcg@10"] if "dev_ndcg@10" in row else row["teacher_ndcg@10"]


def evaluate(
    student: Student,
    corpora: Sequence[CorpusData],
    token_rows: Sequence[Mapping[Role, Mapping[str, Tokens]]],
    settings: Settings,
) -> dict[str, float]:
    """Dev measures, averaged over corpora by their number of dev queries.

    ``dev_ndcg@10`` on judged queries over their pools where any corpus has them; ``dev_kl`` and
    ``teacher_ndcg@10`` (the teacher's favourites as relevant) on the lists held out.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}

    def add(name: str, value: float, weight: int) -> None:
        sums[name] = sums.get(name, 0.0) + value * weight
        weights[name] = weights.get(name, 0.0) + weight

    for corpus, rows in zip(corpora, token_rows, strict=True):
        if len(corpus.dev.query_ids):
            student_BK = scores_of_lists(student, corpus.dev, rows, settings.chunk_tokens)
            teacher_BK = torch.from_numpy(np.asarray(corpus.dev.teacher_BK, dtype=np.float64))
            kl = listwise_kl(
                student_BK,
                teacher_BK,
                student_temperature=settings.objective.student_temperature,
                teacher_temperature=settings.objective.teacher_temperature,
            )
            count = len(corpus.dev.query_ids)
            add("dev_kl", float(kl), count)
            add("teacher_ndcg@10", _ndcg_against(student_BK.numpy(), teacher_BK.numpy()), count)
        if corpus.dev_qrels:
            queries = sorted(corpus.dev_qrels)
            pools = [list(corpus.dev_pools.get(query, ())) for query in queries]
            run = _rank_pools(student, queries, pools, rows, settings.chunk_tokens)
            values = per_query(corpus.dev_qrels, run)
            mean = sum(row["ndcg@10"] for row in values.values()) / len(values)
            add("dev_ndcg@10", mean, len(values))
    return {name: sums[name] / weights[name] for name in sums}


def scores_of_lists(
    student: Student, lists: Lists, rows: Mapping[Role, Mapping[str, Tokens]], chunk_tokens: int
) -> Tensor:
    """student_BK: cosines of each query with its own list, float64, no graph."""
    unique = unique_passages(lists.passage_ids)
    queries_BD, passages_ND = _embed(student, list(lists.query_ids), unique.passage_ids, rows, chunk_tokens)
    index_BK = torch.from_numpy(unique.index_BK)
    return torch.einsum("bd,bkd->bk", queries_BD, passages_ND[index_BK])


def _rank_pools(
    student: Student,
    queries: list[str],
    pools: list[list[str]],
    rows: Mapping[Role, Mapping[str, Tokens]],
    chunk_tokens: int,
) -> dict[str, list[str]]:
    passages = list(dict.fromkeys(passage for pool in pools for passage in pool))
    position = {passage: n for n, passage in enumerate(passages)}
    queries_BD, passages_ND = _embed(student, queries, passages, rows, chunk_tokens)
    run = {}
    for b, (query, pool) in enumerate(zip(queries, pools, strict=True)):
        scores = passages_ND[[position[p] for p in pool]] @ queries_BD[b]
        run[query] = [p for p, _ in top_k(pool, scores.tolist(), len(pool))]
    return run


def _embed(
    student: Student,
    queries: list[str],
    passages: list[str],
    rows: Mapping[Role, Mapping[str, Tokens]],
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeddings_MD, _ = embed_shared(
            student,
            [rows["query"][query] for query in queries],
            [rows["passage"][passage] for passage in passages],
            chunk_tokens=2 * chunk_tokens,  # no graph is made
        )
    doubles = embeddings_MD.double().cpu()
    return doubles[: len(queries)], doubles[len(queries) :]


def _ndcg_against(student_BK: Any, teacher_BK: Any) -> float:
    """Mean nDCG@10 of the student's order, with exp(z / 0.5) of the teacher's scores as gains.

    z: the teacher's scores standardised per list, so that its few favourites carry the measure. Of six
    kinds of gains this one followed judged nDCG best on two collections (LOG.md).
    """
    deviation_B1 = np.maximum(teacher_BK.std(axis=1, keepdims=True), 1e-9)
    gains_BK = np.exp((teacher_BK - teacher_BK.max(axis=1, keepdims=True)) / deviation_B1 / 0.5)
    by_student_BK = np.take_along_axis(gains_BK, np.argsort(-student_BK, axis=1, kind="stable"), 1)
    ideal_BK = -np.sort(-gains_BK, axis=1)
    discount = 1 / np.log2(np.arange(2, 12))[: student_BK.shape[1]]
    width = len(discount)
    return float(np.mean((by_student_BK[:, :width] @ discount) / (ideal_BK[:, :width] @ discount)))


def _take(lists: Lists, indices: Any) -> Lists:
    return Lists(
        [lists.query_ids[i] for i in indices],
        [lists.passage_ids[i] for i in indices],
        np.asarray(lists.teacher_BK)[indices],
        [lists.excluded_ids[i] for i in indices],
    )


def _tokenised(student: Student, corpus: CorpusData) -> dict[Role, TokenRows]:
    """Tokens of every query, and of the passages that dev measures read."""
    passages = [p for row in corpus.dev.passage_ids for p in row]
    passages += [p for query in corpus.dev_qrels for p in corpus.dev_pools.get(query, ())]
    queries = [*corpus.train.query_ids, *corpus.dev.query_ids, *corpus.dev_qrels]
    return {
        "passage": _rows(student, corpus.passages, passages, "passage"),
        "query": _rows(student, corpus.queries, queries, "query"),
    }


def _shortened(student: Student, corpus: CorpusData, limit: int | None) -> TokenRows:
    """Tokens of the passages that training reads."""
    passages = [p for row in corpus.train.passage_ids for p in row]
    return _rows(student, corpus.passages, passages, "passage", limit)


def _rows(
    student: Student, texts: Mapping[str, str], ids: Iterable[str], role: Role, limit: int | None = None
) -> TokenRows:
    return TokenRows(ids, lambda some: student.tokenize([texts[i] for i in some], role, limit=limit))


# --- checkpoints: one safetensors file with the progress as JSON in its header -----------------


def _checkpoint(
    student: Student, optimiser: torch.optim.Optimizer, progress: Progress, folder: Location
) -> None:
    rank, _ = world()
    if rank != 0:
        return
    tensors = {f"model.{name}": value for name, value in _trainable(student).items()}
    for name, parameter in _named(student):
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{key}.{name}"] = torch.as_tensor(value)
    header = {"progress": json.dumps(vars(progress))}
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = safetensors.torch.save(contiguous, header)
    (folder / f"checkpoint-{progress.step:08d}-{progress.epoch:03d}.safetensors").write(data)
    for old in _checkpoints(folder)[:-2]:
        (folder / old).remove()


def _checkpoints(folder: Location) -> list[str]:
    return [name for name in folder.names() if name.startswith("checkpoint-")]


def _resume(student: Student, optimiser: torch.optim.Optimizer, folder: Location) -> Progress:
    there = _checkpoints(folder)
    if not there:
        return Progress()
    data = (folder / there[-1]).read()
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    with torch.no_grad():
        for name, parameter in _named(student):
            parameter.copy_(tensors[f"model.{name}"])
            state = {
                key.split(".", 2)[1]: value
                for key, value in tensors.items()
                if key.startswith("optimiser.") and key.split(".", 2)[2] == name
            }
            if state:
                optimiser.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return Progress(**json.loads(header["progress"]))


def _named(student: Student) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in student.model.named_parameters() if p.requires_grad]


def _trainable(student: Student) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in _named(student)}


def _save_weights(student: Student, target: Location) -> None:
    rank, _ = world()
    if rank == 0:
        tensors = {n: t.cpu().contiguous() for n, t in _trainable(student).items()}
        target.write(safetensors.torch.save(tensors))


def _load_weights(student: Student, source: Location) -> None:
    tensors = safetensors.torch.load(source.read())
    with torch.no_grad():
        for name, parameter in _named(student):
            parameter.copy_(tensors[name])
