"""Asks an OpenAI-compatible endpoint: one asynchronous client per worker."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from retrieval_ray.config import LlmConfig
from retrieval_ray.endpoint import Endpoint
from retrieval_ray.model_files import Model
from retrieval_ray.prompts import JSON_SCHEMA
from retrieval_ray.replies import Reply
from retrieval_ray.stages.asking import Asking, Block
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.parts import run_parts

_COMMIT = 64  # replies that are committed together: what a kill can lose of each worker


def ask(context: Context, asking: Asking, model: Model, parts: Sequence[Block], label: str) -> dict[str, Any]:
    """Put every open request of these parts to the endpoint. Returns facts for the manifest."""
    config = context.config.llm
    start = time.monotonic()
    facts = run_parts(
        context, label, _Asker, {"asking": asking, "endpoint": _arguments(config)}, parts, gpus=False
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
        "body": body,
        "key_variable": config.key_variable,
        "concurrency": config.concurrency,
        "timeout_seconds": config.timeout_seconds,
        "retries": config.retries,
    }


class _Asker:
    def __init__(self, asking: Asking, endpoint: Mapping[str, Any]) -> None:
        self.asking, self.endpoint = asking, Endpoint(**endpoint)

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        return asyncio.run(self._ask(part))

    async def _ask(self, part: dict[str, Any]) -> dict[str, Any]:
        """The whole part is in flight at once, so the endpoint never idles at the end of a block."""
        open_requests = self.asking.open(part)
        keys = {request.query_id: key for key, request in open_requests}
        waiting: list[tuple[bytes, Reply]] = []
        tokens_in = tokens_out = 0
        try:
            async for reply in self.endpoint.replies(request for _, request in open_requests):
                waiting.append((keys[reply.query_id], reply))
                tokens_in, tokens_out = tokens_in + reply.tokens_in, tokens_out + reply.tokens_out
                if len(waiting) == _COMMIT:
                    self.asking.keep(int(part["number"]), waiting)
                    waiting = []
        finally:  # also where the endpoint gives up: what was answered is kept
            self.asking.keep(int(part["number"]), waiting)
        return {"asked": len(open_requests), "tokens_in": tokens_in, "tokens_out": tokens_out}
