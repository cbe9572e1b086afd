"""Ways to take one training step: ours, and other libraries' way to its loss. Each leaves gradients."""

import sys
import time
from dataclasses import replace
from typing import Any

import torch
from lists import MODEL, Task

from retrieval_ray.memory import activation_bytes
from retrieval_ray.objective import Objective
from retrieval_ray.step import training_step
from retrieval_ray.student import Student, default_chunk_tokens

PASSAGES_PER_CALL = 32  # of the peers
LISTS_PER_CALL = 4  # of sentence-transformers' KL
OBJECTIVE = Objective({"kl": 1.0, "infonce": 0.1}, 0.05, 0.3, 0.02)


class Ours:
    """keep_bytes: what kept graphs may take; None: measured, as in training. chunk_tokens: None: likewise."""

    def __init__(
        self, device: str, precision: str, keep_bytes: int | None = None, chunk_tokens: int | None = None
    ) -> None:
        self.student = Student(MODEL, precision=precision, device=device)
        self.student.prepare_training()
        self.model = self.student.model
        self.terms = OBJECTIVE.weights
        self.facts: dict[str, float] = {}  # of the last step
        self.chunk_tokens = chunk_tokens or default_chunk_tokens(device)
        count = sum(p.numel() for p in self.model.parameters())
        self.keep_bytes = activation_bytes(self.student.device, count) if keep_bytes is None else keep_bytes

    def loss(self, task: Task) -> float:
        found = training_step(
            self.student,
            task.lists,
            task.rows.__getitem__,
            task.rows.__getitem__,
            replace(OBJECTIVE, weights=self.terms),
            chunk_tokens=self.chunk_tokens,
            keep_bytes=self.keep_bytes,
        )
        self.facts = {what: found[what] for what in ("tokens", "tflop")}
        return found["loss"]


class _Peer:
    def __init__(self, device: str, precision: str) -> None:
        self.student = Student(MODEL, precision=precision, device=device)  # its weights and padding
        self.model = self.student.model
        self.facts: dict[str, float] = {}

    def columns(self, task: Task, part: slice = slice(None)) -> list[dict[str, Any]]:
        """The queries, and the passages of each place of the lists."""
        lists, embed = task.lists, self.student._features
        columns = zip(*lists.passage_ids[part], strict=True)
        queries = embed([task.rows[q] for q in lists.query_ids[part]], "query")
        return [queries, *(embed([task.rows[p] for p in column], "passage") for column in columns)]


class SentenceTransformers(_Peer):
    """Two losses as it ships them: the cached contrastive one, and the KL over micro-batches of lists.

    Its facts say how many seconds the contrastive one took, which many train with alone.
    """

    terms = OBJECTIVE.weights

    def loss(self, task: Task) -> float:
        from sentence_transformers.sentence_transformer import losses

        start = time.perf_counter()
        cached = losses.CachedMultipleNegativesRankingLoss(
            self.model, scale=1 / OBJECTIVE.infonce_temperature, mini_batch_size=PASSAGES_PER_CALL
        )
        with self.student.autocast():
            loss = 0.1 * cached(self.columns(task), None)
            loss.backward()
        total = float(loss.detach())
        self.facts = {"contrastive_seconds": time.perf_counter() - start}
        tau = OBJECTIVE.student_temperature
        kl = losses.DistillKLDivLoss(
            self.model, student_temperature=tau, teacher_temperature=OBJECTIVE.teacher_temperature
        )
        size = len(task.lists.query_ids)
        teacher = torch.from_numpy(task.lists.teacher_BK).float().to(self.student.device)
        for start_at in range(0, size, LISTS_PER_CALL):
            part = slice(start_at, start_at + LISTS_PER_CALL)
            with self.student.autocast():
                loss = kl(self.columns(task, part), teacher[part])
            loss = loss / tau**2 * len(teacher[part]) / size  # it multiplies by the temperature squared
            loss.backward()
            total += float(loss.detach())
        return total


class GradCachePackage(_Peer):
    """luyug/GradCache as Tevatron calls it, one model for queries and passages: InfoNCE alone."""

    terms = {"infonce": 0.1}

    def __init__(self, device: str, precision: str) -> None:
        import gradcache

        sys.modules["grad_cache"] = gradcache  # the name that its own modules import each other by
        from gradcache.grad_cache import GradCache

        super().__init__(device, precision)
        self.cache = GradCache(
            models=[self.model, self.model],
            chunk_sizes=PASSAGES_PER_CALL,
            loss_fn=self.infonce,
            split_input_fn=self.split,
            get_rep_fn=lambda output: output["sentence_embedding"].float(),
        )

    def split(self, features: dict[str, Any], size: int) -> list[dict[str, Any]]:
        parts = zip(features["input_ids"].split(size), features["attention_mask"].split(size), strict=True)
        # the model is called as model(features): one argument
        return [{"input": {"input_ids": ids, "attention_mask": mask}} for ids, mask in parts]

    def infonce(self, queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
        scores = queries @ passages.T / OBJECTIVE.infonce_temperature
        target = torch.arange(len(queries), device=scores.device) * (len(passages) // len(queries))
        return 0.1 * torch.nn.functional.cross_entropy(scores, target)

    def loss(self, task: Task) -> float:
        lists, embed = task.lists, self.student._features
        queries = embed([task.rows[q] for q in lists.query_ids], "query")
        passages = embed([task.rows[p] for row in lists.passage_ids for p in row], "passage")
        with self.student.autocast():
            return float(self.cache(queries, passages))


PEERS = {"sentence_transformers": SentenceTransformers, "gradcache": GradCachePackage}
