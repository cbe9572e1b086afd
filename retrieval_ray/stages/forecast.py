"""What the generate stage would cost: requests, tokens, GPU hours; and what the prompts look like."""

import random
from dataclasses import dataclass
from typing import Any

from retrieval_ray.artifacts import bucket_count, bucket_of, digest
from retrieval_ray.config import DatasetConfig, LlmConfig
from retrieval_ray.contentcache import REPLY, ContentCache
from retrieval_ray.datasets import passages_of, survey
from retrieval_ray.filters import near_duplicates
from retrieval_ray.prompts import Request
from retrieval_ray.sampling import sample
from retrieval_ray.sources import open_source
from retrieval_ray.stages.ask_vllm import Prompts, devices
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.generate import generator, model_of, wanted_of
from retrieval_ray.stages.ingest import passage_text

_SAMPLE = 200  # requests that are tokenised
_CHARS_PER_TOKEN = 4.0  # where the tokenizer is not known


@dataclass(frozen=True)
class Cost:
    """What is foreseen for one corpus."""

    model: str
    passages: int
    requests: int  # in all
    kept: float  # the share of them that has a reply in this store already
    tokens_in: int  # of the others
    counted: str  # how the tokens were counted
    tokens_out: int  # at most, where no earlier run tells how long replies are
    gpu_hours: float | None
    rate: str  # where the rate comes from
    negatives: int  # further requests at most, known only when the lists are built
    examples: list[Request]  # one of each kind

    def lines(self) -> list[str]:
        """For the plan."""
        found = []
        for request in self.examples:
            found.append(f"--- a prompt of the kind {request.kind}:")
            found += [f"    {turn['role']}: {turn['content']}" for turn in request.messages]
        found.append(
            f"LLM {self.model}: {self.passages:,} passages, {self.requests:,} requests"
            + (f", {self.kept:.0%} of them answered already" if self.kept else "")
            + f", about {self.tokens_in:,} tokens in ({self.counted}), {self.tokens_out:,} out"
        )
        hours = "" if self.gpu_hours is None else f"{self.gpu_hours:,.2f} GPU hours "
        found.append(f"  {hours}({self.rate})")
        if self.negatives:
            found.append(
                "  and for queries.negatives one request for each passage that becomes a negative and has "
                f"no query: at most {self.negatives:,}"
            )
        return found


def of(context: Context, passages: list[tuple[str, str, str]], *, titles: bool) -> Cost:
    """Foresee the cost for a corpus. passages: (passage_id, title, text) of all of it."""
    config, seed, wanted = context.config.llm, context.config.seed, wanted_of(context)
    chosen = _chosen(context, passages)
    texts = {key: passage_text(title, text, titles=titles) for key, title, text in passages}
    per_passage = sum(wanted.kinds.values())
    looked_at = random.Random(seed).sample(chosen, min(max(1, _SAMPLE // per_passage), len(chosen)))
    asked = wanted.requests((key, texts[key]) for key in looked_at)
    counts, counted = _tokens(config, asked)
    requests = len(chosen) * per_passage
    kept = _kept(context, asked, texts, bucket_count(len(passages)))
    tokens_in = round(requests * (1 - kept) * sum(counts) / max(1, len(counts)))
    known = _measured(context)
    tokens_out = round(requests * (1 - kept) * known.get("out_per_request", config.max_tokens))
    hours, source = None, "an endpoint: it knows its own rate"
    if config.engine == "vllm":
        rate, gpus = config.tokens_per_second or known.get("per_second"), devices(config.vllm)
        source = "given" if config.tokens_per_second else "measured in an earlier run of this store"
        source = (
            f"at {rate:,.0f} tokens/s, in and out together, for an engine of {gpus}, {source}"
            if rate
            else ("GPU hours: no rate is known yet; give one as llm.tokens_per_second")
        )
        hours = (tokens_in + tokens_out) / rate * gpus / 3600 if rate else None
    examples = [next(r for r in asked if r.kind == kind) for kind in wanted.kinds]
    negatives = len(passages) if context.config.queries.negatives else 0
    return Cost(
        f"{config.model} ({config.engine})", len(chosen), requests, kept, tokens_in, counted, tokens_out,
        hours, source, negatives, examples,
    )  # fmt: skip


def shown(context: Context, dataset: DatasetConfig, count: int) -> list[str]:
    """The prompts of ``count`` of the sampled passages, as lines."""
    source = open_source(dataset.path)
    survey(source)
    passages = sorted(passages_of(source))
    chosen = set(_chosen(context, passages))
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


def _chosen(context: Context, passages: list[tuple[str, str, str]]) -> list[str]:
    """The passages that queries would be written for, as the generate stage chooses them."""
    config = context.config.llm
    left_out = {key for key, _, _ in near_duplicates((key, text or title) for key, title, text in passages)}
    usable = [row for row in passages if row[0] not in left_out]
    return sample(usable, config.passages, way=config.sample, seed=context.config.seed)


def _kept(context: Context, asked: list[Request], texts: dict[str, str], buckets: int) -> float:
    """The share of these requests that has a reply in the store."""
    config = context.config.llm
    cache = ContentCache(context.store / "replies", digest(generator(config, model_of(config))), REPLY)
    bucket = {r.passage_id: bucket_of(texts[r.passage_id], buckets) for r in asked}
    known = {b: cache.read(b, buckets) for b in sorted(set(bucket.values()))}
    found = [cache.key(r.question(), "") in known[bucket[r.passage_id]] for r in asked]
    return sum(found) / max(1, len(found))


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
