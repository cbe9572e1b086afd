"""Training a cross-encoder, for places without a model hub: judged pairs, mined negatives, resumable.

The trainer is sentence-transformers' own; the loss is ListNet over lists of one relevant passage and its
negatives. Binary cross-entropy over single pairs does not do: from a sentence encoder it learns the share of
relevant pairs, and for thousands of pairs nothing else.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_ray.errors import UserError
from retrieval_ray.model_files import resolve_model
from retrieval_ray.runs import top_k

_CERTAIN = 10.0  # the label of a relevant passage, of which ListNet takes the softmax; the others have 0


@dataclass(frozen=True)
class Lesson:
    """A query, a passage that answers it, and some that do not."""

    query_id: str
    relevant_id: str
    negative_ids: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    base: Any  # what model_files.resolve_model takes
    epochs: int
    batch_lists: int
    learning_rate: float
    warmup_share: float
    max_tokens: int
    checkpoint_seconds: float
    seed: int
    bfloat16: bool
    device: str
    trust_remote_code: bool


def lessons(
    qrels: Mapping[str, Mapping[str, int]],
    rankings: Mapping[str, Sequence[str]],
    *,
    relevance_threshold: int,
    negatives: int,
    skip: int,
    seed: int,
) -> list[Lesson]:
    """One for every relevant passage, with up to ``negatives`` others.

    These are what was judged as no answer, and for the rest drawn from the query's ranking, without its
    first ``skip``, where unjudged answers hide. A draw depends on the seed and the query alone. The
    negatives of one query are all different, so a short ranking gives fewer; without any there is no lesson.
    """
    found: list[Lesson] = []
    for query_id in sorted(qrels):
        judged = qrels[query_id]
        relevant = sorted(p for p, grade in judged.items() if grade >= relevance_threshold)
        wanted = negatives * len(relevant)
        chance = random.Random(f"{seed} {query_id}")
        known = sorted(judged.keys() - set(relevant))
        known = chance.sample(known, min(wanted, len(known)))
        pool = [p for p in rankings.get(query_id, ())[skip:] if p not in judged]
        known += chance.sample(pool, min(wanted - len(known), len(pool)))
        each = [tuple(known[n :: len(relevant)]) for n in range(len(relevant))]
        found += [Lesson(query_id, p, other) for p, other in zip(relevant, each, strict=True) if other]
    return found


def train(
    lists: Sequence[tuple[str, Sequence[str]]],
    settings: Settings,
    checkpoints: Path,
    *,
    on_step: Callable[[int, int], None] = lambda step, total: None,
) -> Any:
    """Train on lists of (query, passages), of which the first answers; returns the CrossEncoder.

    Goes on from the newest of ``checkpoints``, where there is one, and ends as without the interruption.
    on_step: told of (step, all steps). Raises ``UserError`` where the trainer's libraries are missing.
    """
    try:
        import accelerate  # noqa: F401  the trainer needs it, and says so late
        import datasets
    except ImportError as error:
        raise UserError("training a cross-encoder needs: pip install 'retrieval-ray[teacher]'") from error
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import ListNetLoss
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]  # the trainer takes nothing but a subclass
        saved = time.monotonic()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            on_step(state.global_step, state.max_steps)
            if time.monotonic() - self.saved >= settings.checkpoint_seconds:
                control.should_save, self.saved = True, time.monotonic()

    torch.manual_seed(settings.seed)  # the new output layer is drawn here
    model = CrossEncoder(
        resolve_model(settings.base, "reranker.base", trust_remote_code=settings.trust_remote_code),
        num_labels=1,
        max_length=settings.max_tokens,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        local_files_only=True,
    )
    dataset = datasets.Dataset.from_dict(
        {
            "query": [query for query, _ in lists],
            "passages": [list(passages) for _, passages in lists],
            "labels": [[_CERTAIN] + [0.0] * (len(passages) - 1) for _, passages in lists],
        }
    )
    checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_lists,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_share,
            seed=settings.seed,
            bf16=settings.bfloat16,
            use_cpu=settings.device == "cpu",
            save_strategy="no",
            save_total_limit=1,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        loss=ListNetLoss(model, mini_batch_size=-1),  # the batch at once
        callbacks=[Watch()],
    )
    trainer.train(resume_from_checkpoint=_newest(checkpoints))
    return model


def _newest(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written whole: its state is written last. Broken ones are deleted."""
    whole = {}
    for path in checkpoints.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            whole[int(path.name.rpartition("-")[2])] = str(path)
    return whole[max(whole)] if whole else None


def rerank(model: Any, query: str, passage_ids: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The passages in a cross-encoder's order."""
    import torch

    scores = model.predict(
        [(query, text) for text in texts], activation_fn=torch.nn.Identity(), show_progress_bar=False
    )
    return [p for p, _ in top_k(passage_ids, scores.tolist(), len(passage_ids))]
