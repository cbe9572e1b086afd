"""What the generate stage would cost: requests, tokens, GPU hours; and what the prompts look like."""

import random
from dataclasses import dataclass
from typing import Any

from retrieval_ray.config import DatasetConfig, LlmConfig
from retrieval_ray.datasets import read_corpus
from retrieval_ray.prompts import Request
from retrieval_ray.sampling import sample
from retrieval_ray.sources import open_source
from retrieval_ray.stages.ask_vllm import Prompts, devices
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.generate import model_of, wanted_of
from retrieval_ray.stages.ingest import passage_text

_SAMPLE = 200  # requests that are tokenised
_CHARS_PER_TOKEN = 4.0  # where the tokenizer is not known


@dataclass(frozen=True)
class Cost:
    """What is foreseen for one corpus."""

    model: str
    passages: int
    requests: int
    tokens_in: int
    counted: str  # how the tokens were counted
    tokens_out: int  # at most, where no earlier run tells how long replies are
    gpu_hours: float | None
    rate: str  # where the rate comes from
    examples: list[Request]  # one of each kind

    def lines(self) -> list[str]:
        """For the plan."""
        found = []
        for request in self.examples:
            found.append(f"--- a prompt of the kind {request.kind}:")
            found += [f"    {turn['role']}: {turn['content']}" for turn in request.messages]
        found.append(
            f"LLM {self.model}: {self.passages:,} passages, {self.requests:,} requests, about "
            f"{self.tokens_in:,} tokens in ({self.counted}), {self.tokens_out:,} out"
        )
        hours = "" if self.gpu_hours is None else f"{self.gpu_hours:,.2f} GPU hours "
        return [*found, f"  {hours}({self.rate})"]


def of(context: Context, passages: list[tuple[str, str, str]], *, titles: bool) -> Cost:
    """Foresee the cost for a corpus. passages: (passage_id, title, text) of all of it."""
    config, seed, wanted = context.config.llm, context.config.seed, wanted_of(context)
    chosen = sample(passages, config.passages, way=config.sample, seed=seed)
    texts = {key: passage_text(title, text, titles=titles) for key, title, text in passages}
    per_passage = sum(wanted.kinds.values())
    looked_at = random.Random(seed).sample(chosen, min(max(1, _SAMPLE // per_passage), len(chosen)))
    asked = wanted.requests((key, texts[key]) for key in looked_at)
    counts, counted = _tokens(config, asked)
    requests = len(chosen) * per_passage
    tokens_in = round(requests * sum(counts) / max(1, len(counts)))
    known = _measured(context)
    tokens_out = round(requests * known.get("out_per_request", config.max_tokens))
    hours, source = None, "an endpoint: it knows its own rate"
    if config.engine == "vllm":
        rate, gpus = config.tokens_per_second or known.get("per_second"), devices(config.vllm)
        source = "given" if config.tokens_per_second else "measured in an earlier run of this store"
        source = (
            f"at {rate:,.0f} tokens/s for an engine of {gpus}, {source}"
            if rate
            else ("GPU hours: no rate is known yet; give one as llm.tokens_per_second")
        )
        hours = (tokens_in + tokens_out) / rate * gpus / 3600 if rate else None
    examples = [next(r for r in asked if r.kind == kind) for kind in wanted.kinds]
    return Cost(
        f"{config.model} ({config.engine})", len(chosen), requests, tokens_in, counted, tokens_out,
        hours, source, examples,
    )  # fmt: skip


def shown(context: Context, dataset: DatasetConfig, count: int) -> list[str]:
    """The prompts of ``count`` of the sampled passages, as lines."""
    table, _ = read_corpus(open_source(dataset.path))
    columns = (table.column(name).to_pylist() for name in ("passage_id", "title", "text"))
    passages = list(zip(*columns, strict=True))
    config = context.config.llm
    chosen = set(sample(passages, config.passages, way=config.sample, seed=context.config.seed))
    texts = [
        (key, passage_text(title, text, titles=dataset.titles))
        for key, title, text in passages
        if key in chosen
    ]
    lines = []
    for passage in texts[:count]:
        for request in wanted_of(context).requests([passage]):
            lines.append(f"--- {request.kind} for '{request.passage_id}' ({request.query_id}):")
            lines += [f"{turn['role']}: {turn['content']}" for turn in request.messages]
    return lines


def _tokens(config: LlmConfig, asked: list[Request]) -> tuple[list[float], str]:
    """Tokens of each prompt, and how they were counted."""
    if config.engine == "vllm":
        trust = bool(config.vllm.get("trust_remote_code", False))
        prompts = Prompts(str(config.model), config.chat_template, trust_remote_code=trust)
        return [float(len(prompts.ids(request))) for request in asked], f"counted on {len(asked)} prompts"
    characters = [sum(len(turn["content"]) for turn in request.messages) for request in asked]
    return [n / _CHARS_PER_TOKEN for n in characters], "guessed at 4 characters a token"


def _measured(context: Context) -> dict[str, float]:
    """Rate and length of replies of the same model in an earlier run of this store."""
    best: dict[str, Any] = {}
    model = model_of(context.config.llm).sha
    for name in context.store.names():
        manifest = context.store / name / "manifest.json"
        if name.startswith("generate-") and manifest.exists():
            facts = manifest.read_json()
            if facts["identity"]["generator"]["model"] == model and facts["rows_this_run"]:
                if facts["rows_this_run"] > best.get("rows_this_run", 0):
                    best = facts
    if not best:
        return {}
    tokens, replicas = best["tokens"], best["replicas"]
    return {
        "per_second": (tokens["in_per_second"] + tokens["out_per_second"]) / replicas,
        "out_per_request": tokens["out"] / best["rows_this_run"],
    }
