"""Asks an OpenAI-compatible endpoint: one asynchronous client per worker."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retrieval_ray.config import LlmConfig
from retrieval_ray.endpoint import Endpoint
from retrieval_ray.model_files import Model
from retrieval_ray.prompts import JSON_SCHEMA, Request
from retrieval_ray.replies import Reply
from retrieval_ray.stages.asking import Asking, Block
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.parts import run_parts

_COMMIT = 64  # replies for a part that are committed together
_COMMIT_SECONDS = 20.0  # and all that wait, this often: what a kill can lose
_DEEP = 16  # times as many requests as are in flight: then the end of a share costs little


def ask(context: Context, asking: Asking, model: Model, parts: Sequence[Block], label: str) -> dict[str, Any]:
    """Put every open request of these parts to the endpoint. Returns facts for the manifest."""
    config = context.config.llm
    start = time.monotonic()
    per_passage = sum(asking.wanted.kinds.values())
    shares = _shares(parts, -(-_DEEP * config.concurrency // per_passage))
    facts = run_parts(
        context,
        label,
        _Asker,
        {"asking": asking, "endpoint": _arguments(config)},
        [{"parts": share} for share in shares],
        gpus=False,
    )
    counts = {key: sum(f[key] for f in facts) for key in ("asked", "tokens_in", "tokens_out")}
    return counts | {"seconds": time.monotonic() - start}


def _arguments(config: LlmConfig) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": config.model,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": config.max_tokens,
    }
    if config.chat_template:
        body["chat_template_kwargs"] = dict(config.chat_template)
    if config.structured:
        schema = {"name": "query", "schema": JSON_SCHEMA, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {
        "url": str(config.url),
        "body": body | dict(config.body),
        "key_variable": config.key_variable,
        "concurrency": config.concurrency,
        "timeout_seconds": config.timeout_seconds,
        "retries": config.retries,
    }


class _Asker:
    """Asks what is open in some parts, one after the other, with as much in flight as is allowed."""

    def __init__(self, asking: Asking, endpoint: Mapping[str, Any]) -> None:
        self.asking, self.endpoint = asking, Endpoint(**endpoint)

    def run(self, share: dict[str, Any]) -> dict[str, Any]:
        return asyncio.run(self._ask(share["parts"]))

    async def _ask(self, parts: Sequence[Block]) -> dict[str, Any]:
        part_of: dict[str, tuple[int, bytes]] = {}  # of the requests in flight, by query_id
        waiting: dict[int, list[tuple[bytes, Reply]]] = defaultdict(list)
        counts = Counter[str]()

        def requests() -> Iterator[Request]:
            for part in parts:
                self.endpoint.answered = self.endpoint.answered or self.asking.answered(part)
                for key, request in self.asking.open(part):
                    part_of[request.query_id] = int(part["number"]), key
                    yield request

        def keep(numbers: Sequence[int]) -> None:
            for number in numbers:
                self.asking.keep(number, waiting.pop(number))

        kept_at = time.monotonic()
        try:
            async for reply in self.endpoint.replies(requests()):
                number, key = part_of.pop(reply.query_id)
                waiting[number].append((key, reply))
                counts.update(asked=1, tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
                if len(waiting[number]) == _COMMIT:
                    keep([number])
                if time.monotonic() - kept_at > _COMMIT_SECONDS:
                    keep(list(waiting))
                    kept_at = time.monotonic()
        finally:  # also where the endpoint gives up: what was answered is kept
            keep(list(waiting))
        return {key: counts[key] for key in ("asked", "tokens_in", "tokens_out")}


def _shares(parts: Sequence[Block], least: int) -> list[list[Block]]:
    """Neighbouring parts put together until they hold so many passages: what one worker asks at a time."""
    shares: list[list[Block]] = []
    room = 0
    for part in parts:
        if room <= 0:
            shares.append([])
            room = least
        shares[-1].append(part)
        room -= len(part["passages"])
    return shares
