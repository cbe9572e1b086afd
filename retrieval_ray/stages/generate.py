"""The generate stage: an LLM writes queries for a sample of passages.

A request is a function of passage, kind, drawn exemplars and seed, so a rerun asks the same. Replies are
kept by content as they come, in blocks, shared by every run of a store: a kill loses the blocks in
flight, and what was once answered is never asked again. When the engine has been through all requests,
each part (the replies for one bucket of passages) is written as it came; queries are read out of replies
in the queries stage, so another rule for dropping them costs no call.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, digest, each, part_name, stage
from retrieval_ray.config import LlmConfig
from retrieval_ray.errors import UserError
from retrieval_ray.model_files import Model, adapter_sha, by_revision
from retrieval_ray.progress import say
from retrieval_ray.prompts import KINDS, PROMPT_VERSION, Wanted, read_pool
from retrieval_ray.sampling import sample
from retrieval_ray.sources import Source
from retrieval_ray.stages import ask_endpoint, ask_vllm, cluster
from retrieval_ray.stages.asking import Asking, Block
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.ingest import duplicates, passages
from retrieval_ray.stages.parts import run_parts

VERSION = 2
Ask = Callable[[Context, Asking, Model, list[Block], str], dict[str, Any]]
ENGINES: dict[str, Ask] = {"vllm": ask_vllm.ask, "endpoint": ask_endpoint.ask}
# Arguments of vLLM that say how to compute, not what.
_EXECUTION = {
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization",
    "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "enable_prefix_caching",
    "distributed_executor_backend", "max_model_len", "swap_space", "cpu_offload_gb", "block_size",
    "disable_log_stats", "disable_log_requests", "download_dir", "load_format", "max_lora_rank", "max_loras",
}  # fmt: skip


def run(context: Context, source: Source, corpus: Stage) -> Stage | None:
    """Have the LLM write queries for a sample of a corpus's passages, where it is among the sources."""
    if "llm" not in (context.config.queries.sources or []):
        return None
    config = context.config.llm
    chosen = {"sample": [config.passages, config.sample], "seed": context.config.seed}
    return write(context, source.name, corpus, wanted_of(context), chosen, lambda: _sampled(context, corpus))


def run_for(context: Context, name: str, corpus: Stage, passages: set[str], kind: str) -> Stage:
    """Have the LLM write one query of a kind for each of these passages."""
    wanted = replace(wanted_of(context), kinds={kind: 1})
    chosen = {"passages": digest(sorted(passages))}
    return write(context, name, corpus, wanted, chosen, lambda: _by_part(corpus, passages))


def write(
    context: Context,
    name: str,
    corpus: Stage,
    wanted: Wanted,
    chosen: dict[str, Any],
    passages: Callable[[], list[Block]],
) -> Stage:
    """Ask for all that is wanted of some passages of a corpus, and keep the replies.

    passages: gives them by part of the corpus; chosen: what decides which they are.
    """
    config = context.config.llm
    model = model_of(config)
    generator_id = generator(config, model)
    identity = {
        "version": VERSION,
        "corpus": corpus.content(),
        "titles": corpus.identity["titles"],
        "generator": generator_id,
        "prompts": [PROMPT_VERSION, wanted.pool.sha, wanted.sets, wanted.language],
        "kinds": dict(wanted.kinds),
        "seed": wanted.seed,
        **chosen,
    }
    target = stage(context.store, "generate", identity)
    label = f"queries for '{name}' by {config.model}"
    if target.finished() and not context.dry_run:
        facts = target.manifest()
        if facts["failed"] > config.max_failed * facts["rows"]:
            say(f"{label}: {facts['failed']} requests had failed, more than llm.max_failed allows now")
            target.reopen()
    if not context.start(target, label):
        return target
    cluster.join(context.config.compute)
    buckets = int(corpus.manifest()["buckets"])
    asking = Asking(corpus, target, context.store, digest(generator_id), wanted, buckets, name)
    parts = passages()
    names = [part_name("replies", number, "parquet") for number in range(buckets)]
    missing = set(target.missing(names))
    todo = [part for part in parts if names[part["number"]] in missing]
    asking.forget_failures()
    facts = _ask(context, asking, model, todo, label)
    requests = sum(wanted.kinds.values()) * sum(len(part["passages"]) for part in parts)
    _refuse_failures(config, Counter(asking.failures().values()), requests)
    run_parts(context, f"{label}: parts", _Writer, {"asking": asking}, todo, gpus=False)
    errors = Counter(  # also those of parts that an earlier run wrote
        error for name in names for error in target.read(name, ["error"]).column(0).to_pylist() if error
    )
    seconds = max(facts["seconds"], 1e-9)
    context.finish(
        target,
        names,
        rows=requests,
        worked=facts["asked"],
        passages=sum(len(part["passages"]) for part in parts),
        replicas=config.replicas or context.config.compute.workers,
        failed=sum(errors.values()),
        errors=dict(errors.most_common(10)),
        tokens={
            "in": facts["tokens_in"],
            "out": facts["tokens_out"],
            "in_per_second": round(facts["tokens_in"] / seconds, 1),
            "out_per_second": round(facts["tokens_out"] / seconds, 1),
        },
        prefix_cache_hit_rate=facts.get("prefix_cache_hit_rate"),
    )
    asking.forget_failures()
    return target


def _ask(context: Context, asking: Asking, model: Model, parts: list[Block], label: str) -> dict[str, Any]:
    """Put what has no reply yet to the engine; where all has one, no engine is started."""
    counted = run_parts(context, f"{label}: what is open", _Counter, {"asking": asking}, parts, gpus=False)
    waiting = {count["number"] for count in counted if count["open"]}
    todo = [part for part in parts if part["number"] in waiting]
    if not todo:
        return {"asked": 0, "tokens_in": 0, "tokens_out": 0, "seconds": 0.0}
    return ENGINES[context.config.llm.engine](context, asking, model, todo, label)


def replies_of(generated: Stage) -> list[dict[str, Any]]:
    """Every row of the replies table, in the order of its parts."""
    table = schema.check(generated.read_all("replies-"), "replies", generated.folder.path)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def wanted_of(context: Context) -> Wanted:
    """What the config asks to be written."""
    config = context.config.llm
    kinds = {kind: count for kind, count in (config.kinds or dict.fromkeys(KINDS, 1)).items() if count}
    pool = read_pool(config.exemplars, config.language)
    return Wanted(kinds, pool, config.language, config.exemplar_sets, context.config.seed, config.structured)


def model_of(config: LlmConfig) -> Model:
    """The LLM: its files' hash or its commit; of an endpoint only the name is known."""
    if config.engine == "endpoint":
        return Model(str(config.model), str(config.model))
    return by_revision(str(config.model), "llm.model")


def generator(config: LlmConfig, model: Model) -> dict[str, Any]:
    """Everything that decides a reply beside the messages and the seed."""
    engine: dict[str, Any] = {}
    if config.engine == "vllm":
        engine = {key: value for key, value in sorted(config.vllm.items()) if key not in _EXECUTION}
        engine["lora"] = adapter_sha(config.lora, "llm.lora") if config.lora else None
    else:
        engine = {"body": dict(config.body)}
    return {
        "engine": config.engine,
        "model": model.sha,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": config.max_tokens,
        "structured": config.structured,
        "chat_template": dict(config.chat_template),
        **engine,
    }


def _sampled(context: Context, corpus: Stage) -> list[Block]:
    """The passages to write for, near-duplicates left out."""
    config, left_out = context.config.llm, duplicates(corpus)
    usable = (row for row in passages(corpus) if row[0] not in left_out)
    chosen = sample(usable, config.passages, way=config.sample, seed=context.config.seed)
    return _by_part(corpus, set(chosen))


def _by_part(corpus: Stage, passages: set[str]) -> list[Block]:
    """These passages by part of the corpus; also the parts that hold none of them."""

    def read(number: int) -> Block:
        ids = corpus.read(part_name("corpus", number, "arrow"), ["passage_id"]).column("passage_id")
        return {"number": number, "passages": sorted(passages.intersection(ids.to_pylist()))}

    return list(each(read, range(int(corpus.manifest()["buckets"]))))


def _refuse_failures(config: LlmConfig, errors: Counter[str], requests: int) -> None:
    failed = sum(errors.values())
    if failed > config.max_failed * requests:
        text, count = errors.most_common(1)[0]
        raise UserError(
            f"llm: {failed} of {requests} requests have no reply (llm.max_failed={config.max_failed:g}); "
            f"the most frequent error, {count} times: {text}. What was answered is kept: run the same "
            "command again and only the rest is asked"
        )
    if failed:
        say(
            f"  warning: {failed} of {requests} requests have no reply; they stand in rejects "
            "(llm.max_failed=0 asks them again)"
        )


class _Counter:
    """Counts the requests of a part that have no reply yet."""

    def __init__(self, asking: Asking) -> None:
        self.asking = asking

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"number": part["number"], "open": len(self.asking.open(part))}


class _Writer:
    """Writes one part of the replies table from what is kept."""

    def __init__(self, asking: Asking) -> None:
        self.asking = asking

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        rows: list[dict[str, object]] = [
            {
                "query_id": request.query_id,
                "passage_id": request.passage_id,
                "kind": request.kind,
                "text": reply.text,
                "error": reply.error,
                "tokens_in": reply.tokens_in,
                "tokens_out": reply.tokens_out,
                "cut": reply.cut,
            }
            for request, reply in self.asking.replies(part)
        ]
        rows.sort(key=lambda row: str(row["query_id"]))
        self.asking.target.write(
            part_name("replies", int(part["number"]), "parquet"), schema.from_rows("replies", rows)
        )
        return {"rows": len(rows)}
