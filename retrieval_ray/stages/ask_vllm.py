"""Asks vLLM engines on this cluster, driven by ``ray.data.llm``.

Prompts are built and tokenised by our own actors, with the model's chat template and its generation
prompt, and reach the engine as token ids: the library's own stages would tokenise the template's text
once more (a second BOS), and one bad row would end the job. Replies are committed block by block.
"""

import importlib.util
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from retrieval_ray.artifacts import Stage
from retrieval_ray.config import LlmConfig, to_dict
from retrieval_ray.errors import UserError
from retrieval_ray.model_code import Source
from retrieval_ray.model_files import Model, hub_id, resolve_model
from retrieval_ray.progress import progress
from retrieval_ray.prompts import JSON_SCHEMA, Request
from retrieval_ray.replies import Reply
from retrieval_ray.stages import cluster
from retrieval_ray.stages.asking import Asking, Block, blocks_of
from retrieval_ray.stages.context import Context

_COMMIT = 256  # requests of a block: what a kill can lose is the blocks in flight
_BATCH, _BATCHES = 64, 16  # rows of a batch, batches in flight: together at least vLLM's max_num_seqs
_STARTS = 3  # of one engine without an answer, before the job gives up
_START, _HITS = ".engine-", ".hits-"
Row = dict[str, Any]


def ask(context: Context, asking: Asking, model: Model, parts: Sequence[Block], label: str) -> dict[str, Any]:
    """Put every open request of these parts to vLLM. Returns facts for the manifest."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config, on_gpu = context.config.llm, context.profile.device == "cuda"
    engine = engine_arguments(config, on_gpu=on_gpu)
    name, revision = hub_id(model.source) or (str(model.source), None)
    if revision:
        engine["revision"] = engine["tokenizer_revision"] = revision
    replicas = config.replicas or context.config.compute.workers
    bundle = {"CPU": 1, **({"GPU": 1} if on_gpu else {})}
    _check(engine, replicas, cluster.offered(context.config.compute), on_gpu=on_gpu)
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=name,
            engine_kwargs=engine,
            concurrency=(replicas, replicas),
            batch_size=_BATCH,
            max_concurrent_batches=_BATCHES,
            placement_group_config={"bundles": [bundle] * devices(engine)},
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            should_continue_on_error=True,
            log_engine_metrics=False,
        ),
        preprocess=_Preprocess(sampling(config), _adapter(config.lora), seeds=on_gpu),
        postprocess=_ReplyRow(config.max_tokens),
        preprocess_map_kwargs={"num_cpus": 0.1},
        postprocess_map_kwargs={"num_cpus": 0.1},
    )
    for stage in processor.stages.values():
        # Past the model's validation, which would compute the resources once more from what it has used up.
        object.__setattr__(stage, "fn", _watched(stage.fn, asking.target, most=_STARTS * replicas))
    per_passage = sum(asking.wanted.kinds.values())
    blocks = [block for part in parts for block in blocks_of(part, max(1, _COMMIT // per_passage))]
    arguments = {"asking": asking, "model": model.source, "config": to_dict(config)}
    rows = ray.data.from_items(
        [{"block": json.dumps(block)} for block in blocks], override_num_blocks=len(blocks)
    ).map_batches(
        _Tokenizer, fn_constructor_kwargs=arguments, batch_size=1, num_cpus=0.1,
        compute=ray.data.ActorPoolStrategy(size=min(2, len(blocks))),
    )  # fmt: skip
    kept = (
        processor(rows)
        .map(_normalised, num_cpus=0.1)
        .map_batches(_Keeper(asking), batch_size=None, batch_format="pyarrow", num_cpus=0.1)
    )
    start, done = time.monotonic(), Counter[str]()
    total = per_passage * sum(len(block["passages"]) for block in blocks)
    _forget(asking.target, _START, _HITS)
    with progress(label, total) as advance:
        for row in kept.iter_rows():
            done.update(row)
            seconds = max(time.monotonic() - start, 1e-9)
            advance(done["asked"], f"requests, {done['tokens_out'] / seconds:.0f} tokens/s written")
    facts = {key: done[key] for key in ("asked", "tokens_in", "tokens_out")}
    hits = _hit_rate(asking.target)
    _forget(asking.target, _START, _HITS)
    return facts | {"seconds": time.monotonic() - start, "prefix_cache_hit_rate": hits}


def engine_arguments(config: LlmConfig, *, on_gpu: bool) -> dict[str, Any]:
    """vLLM's engine arguments: the user's over our defaults."""
    defaults: dict[str, Any] = {"enable_prefix_caching": True, "seed": 0}
    if not on_gpu:
        defaults |= {"distributed_executor_backend": "mp", "enforce_eager": True, "dtype": "float32"}
    if devices(config.vllm) > 1:
        # Not Ray's executor: its placement group would hold the GPUs until the job ends (ray#64035).
        defaults["distributed_executor_backend"] = "mp"
    if config.lora:
        defaults["enable_lora"] = True
    return defaults | dict(config.vllm)


def sampling(config: LlmConfig) -> dict[str, Any]:
    """vLLM's sampling parameters, the same for every request; each has a seed of its own beside them."""
    found: dict[str, Any] = {
        "temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens,
    }  # fmt: skip
    if config.structured:
        # As text: a mapping would become an Arrow struct, and those of several rows be made alike.
        found["structured_outputs"] = {"json": json.dumps(JSON_SCHEMA)}
    return found


class Prompts:
    """Messages -> the token ids that the model is given, its chat template applied once."""

    def __init__(self, model: Source, chat_template: Mapping[str, Any], *, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        # Of a model on a hub the tokenizer alone is fetched: the weights go to the engines.
        name, revision = hub_id(model) or (resolve_model(model, "llm.model"), None)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"llm.model: no tokenizer for '{model}': {error}") from error
        if not self.tokenizer.chat_template:
            raise UserError(f"llm.model: '{model}' has no chat template; take an instruction-tuned model")
        self.arguments = dict(chat_template)

    def ids(self, request: Request) -> list[int]:
        """The token ids of a request's conversation, ending with the assistant's header."""
        found: list[int] = self.tokenizer.apply_chat_template(
            request.messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.arguments,
        )
        return found


def _adapter(name: str | None) -> str | None:
    """What vLLM is told of an adapter: an absolute path, or a hub id."""
    if name is None or Path(name).is_dir():
        return name and str(Path(name).resolve())
    return (hub_id(name) or (name, None))[0]


def devices(engine: Mapping[str, Any]) -> int:
    """How many GPUs one engine takes."""
    return int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))


def _check(engine: Mapping[str, Any], replicas: int, there: Mapping[str, float], *, on_gpu: bool) -> None:
    """What the cluster can never give is said at once; Ray would wait for it for ever.

    there: what it offers, by resource.
    """
    if not cluster.given() and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "llm.engine=vllm: vLLM is not installed here; install the 'gpu' extra, or name an "
            "OpenAI-compatible server (llm.engine=endpoint llm.url=...)"
        )
    each = devices(engine)
    needed = {"GPU": replicas * each if on_gpu else 0, "CPU": replicas * each + 2}
    for name, amount in needed.items():
        if amount > there.get(name, 0):
            raise UserError(
                f"llm.replicas={replicas} engines of {each} device{'s' if each > 1 else ''} need {amount} "
                f"{name}, and the cluster has {there.get(name, 0):g}; lower llm.replicas or "
                "llm.vllm.tensor_parallel_size, or give the cluster more (CPUs of a local one: "
                "compute.logical_cpus)"
            )


class _Tokenizer:
    """Blocks of requests -> rows for the engine. What cannot be a prompt is noted as failed at once."""

    def __init__(self, asking: Asking, model: Source, config: dict[str, Any]) -> None:
        self.asking, engine = asking, config["vllm"]
        trust = bool(engine.get("trust_remote_code", False))
        self.prompts = Prompts(model, config["chat_template"], trust_remote_code=trust)
        longest = engine.get("max_model_len") or self.prompts.tokenizer.model_max_length
        self.longest = int(longest) - int(config["max_tokens"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        block = json.loads(batch["block"][0])
        number = int(block["number"])
        rows: list[tuple[str, str, int, int, list[int]]] = []
        failed: list[tuple[bytes, Reply]] = []
        for key, request in self.asking.open(block):
            ids = self.prompts.ids(request)
            if len(ids) > self.longest:
                error = f"prompt of {len(ids)} tokens is longer than the model takes ({self.longest})"
                failed.append((key, Reply(request.query_id, None, error, 0, 0)))
            else:
                rows.append((key.hex(), request.query_id, number, request.seed, ids))
        self.asking.keep(number, failed)
        names = ("key", "query_id", "number", "seed", "tokenized_prompt")
        return {name: [row[at] for row in rows] for at, name in enumerate(names)}


class _Preprocess:
    """Gives each row its sampling parameters; vLLM's CPU build cannot seed single requests."""

    def __init__(self, params: dict[str, Any], lora: str | None, *, seeds: bool) -> None:
        self.params, self.lora, self.seeds = params, lora, seeds

    def __call__(self, row: Row) -> Row:
        seed = {"seed": int(row["seed"])} if self.seeds else {}
        found = {**row, "sampling_params": {**self.params, **seed}}
        return found | ({"model": self.lora} if self.lora else {})


_KEPT = ("key", "query_id", "number")


class _ReplyRow:
    """An engine's row -> a reply. Why it ended is not told, so a full one counts as cut."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def __call__(self, row: Row) -> Row:
        written = int(row["num_generated_tokens"])
        return {
            **{name: row[name] for name in _KEPT},
            "text": row["generated_text"],
            "tokens_in": int(row["num_input_tokens"]),
            "tokens_out": written,
            "cut": written >= self.max_tokens,
        }


def _normalised(row: Row) -> Row:
    """One shape for rows that were answered and rows that failed, which bypass the postprocess."""
    error = row.get("__inference_error__") or None
    return {
        **{name: row[name] for name in _KEPT},
        "text": None if error else row["text"],
        "error": error,
        "tokens_in": 0 if error else row["tokens_in"],
        "tokens_out": 0 if error else row["tokens_out"],
        "cut": False if error else row["cut"],
    }


class _Keeper:
    """Commits the replies of one block of rows."""

    def __init__(self, asking: Asking) -> None:
        self.asking = asking

    def __call__(self, batch: pa.Table) -> pa.Table:
        by_part: dict[int, list[tuple[bytes, Reply]]] = {}
        for row in batch.to_pylist():
            key = bytes.fromhex(row.pop("key"))
            by_part.setdefault(row.pop("number"), []).append((key, Reply(**row)))
        for number, replies in by_part.items():
            self.asking.keep(number, replies)
        _forget(self.asking.target, _START)  # an answer came: the starts before it were not in vain
        sums = {key: [int(pc.sum(batch.column(key)).as_py() or 0)] for key in ("tokens_in", "tokens_out")}
        return pa.table({"asked": [batch.num_rows], **sums})


def _watched(engine: type, target: Stage, *, most: int) -> type:
    """The library's engine actor, which also gives up in the end and counts what its prefix cache saved.

    Ray Data starts a dead engine anew and retries its rows for ever. That is right for an engine that
    died once, and a job without end where every start or every request kills it.
    """

    class WatchedEngine(engine):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            starts = [name for name in target.folder.names() if name.startswith(_START)]
            if len(starts) >= most:
                raise UserError(
                    f"llm: vLLM engines were started {len(starts)} times and died without answering a "
                    "request; the reason stands in the worker logs of this Ray session. Try another model "
                    "or less llm.vllm.gpu_memory_utilization; what was answered is kept"
                )
            name = uuid.uuid4().hex
            (target.folder / f"{_START}{name}").write(b"started")
            try:
                super().__init__(*args, **kwargs)
            except Exception as error:  # whatever vLLM finds: too little memory, a model it does not know ...
                raise UserError(
                    f"llm: vLLM could not start: {type(error).__name__}: {error}. What it found stands above "
                    "that in the worker logs of this Ray session. Where memory is short, lower "
                    "llm.vllm.max_model_len, or spread the model: llm.vllm.tensor_parallel_size"
                ) from error
            self._hits, self._seen = target.folder / f"{_HITS}{name}", [0, 0]
            ask = self.llm._generate_async

            async def counted(request: Any) -> Any:
                output = await ask(request)
                self._seen[0] += output.num_cached_tokens or 0
                self._seen[1] += len(output.prompt_token_ids)
                return output

            self.llm._generate_async = counted

        async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:
            async for row in super().udf(batch):
                yield row
            self._hits.write_json(self._seen)

    return WatchedEngine


def _hit_rate(target: Stage) -> float | None:
    """The share of prompt tokens that the engines of this run found in their prefix cache."""
    seen = [(target.folder / n).read_json() for n in target.folder.names() if n.startswith(_HITS)]
    total = sum(tokens for _, tokens in seen)
    return round(sum(cached for cached, _ in seen) / total, 4) if total else None


def _forget(target: Stage, *prefixes: str) -> None:
    for name in target.folder.names():
        if name.startswith(prefixes):
            (target.folder / name).remove()
