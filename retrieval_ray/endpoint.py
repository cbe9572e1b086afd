"""Replies from any OpenAI-compatible endpoint: bounded concurrency, retries with backoff, errors per row."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import aiohttp

from retrieval_ray.errors import UserError
from retrieval_ray.prompts import Request
from retrieval_ray.replies import Reply

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_HOPELESS = {401, 403, 404, 405}  # every other request would fare alike
_LONGEST_WAIT = 60.0  # seconds between two attempts


class Endpoint:
    """``POST {url}/chat/completions``.

    url: the base, like ``http://localhost:8000/v1``. body: what every request says beside its messages
    and seed (model, temperature, max_tokens ...). key_variable: the environment variable that holds the
    key; the key goes into no message. concurrency: requests in flight. retries: further attempts after a
    status that may pass (429, 5xx, ...), a timeout or a lost connection; the wait doubles from half a
    second, is jittered, and obeys ``Retry-After``.
    """

    def __init__(
        self,
        url: str,
        body: Mapping[str, Any],
        *,
        key_variable: str,
        concurrency: int,
        timeout_seconds: float,
        retries: int,
    ) -> None:
        self.url, self.body = f"{url.rstrip('/')}/chat/completions", dict(body)
        self.key_variable, self.concurrency = key_variable, concurrency
        self.timeout, self.retries = aiohttp.ClientTimeout(total=timeout_seconds), retries

    async def replies(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        """A reply for each request, in the order in which they come.

        Raises ``UserError`` where no request can succeed: a wrong address, a key that is refused.
        """
        key = os.environ.get(self.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        queue = iter(requests)
        connector = aiohttp.TCPConnector(limit=self.concurrency)
        async with aiohttp.ClientSession(
            headers=headers, timeout=self.timeout, connector=connector
        ) as session:
            running: set[asyncio.Task[Reply]] = set()
            try:
                while True:
                    while len(running) < self.concurrency and (request := next(queue, None)) is not None:
                        running.add(asyncio.create_task(self._reply(session, request)))
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()

    async def _reply(self, session: aiohttp.ClientSession, request: Request) -> Reply:
        problem = ""
        for attempt in range(self.retries + 1):
            wait = min(_LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                body = {**self.body, "messages": request.messages, "seed": request.seed}
                async with session.post(self.url, json=body) as response:
                    if response.status == 200:
                        return _read(request, await response.json(content_type=None))
                    problem = f"HTTP {response.status}: {(await response.text())[:300]}"
                    if response.status in _HOPELESS:
                        raise UserError(self._hopeless(response.status, problem))
                    if response.status not in _AGAIN:
                        break
                    wait = max(wait, _seconds(response.headers.get("Retry-After")))
            except (TimeoutError, aiohttp.ClientError) as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
            except ValueError as error:  # a body that is not JSON
                problem = f"unreadable reply: {error}"
            if attempt < self.retries:
                await asyncio.sleep(min(wait, _LONGEST_WAIT))
        return Reply(request.query_id, None, problem, 0, 0)

    def _hopeless(self, status: int, problem: str) -> str:
        key = f"the key in the environment variable {self.key_variable}"
        if not os.environ.get(self.key_variable):
            key += " (it is not set)"
        what = f"check {key}" if status in (401, 403) else "check llm.url and llm.model"
        return f"{self.url}: {problem}; {what}"


def _read(request: Request, document: Any) -> Reply:
    try:
        text = document["choices"][0]["message"]["content"] or ""
        usage = document.get("usage") or {}
        return Reply(
            request.query_id,
            str(text),
            None,
            int(usage.get("prompt_tokens", 0)),
            int(usage.get("completion_tokens", 0)),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no choices[0].message.content ({error!r})") from error


def _seconds(header: str | None) -> float:
    """``Retry-After`` in seconds; its other form, a date, is left to the backoff."""
    try:
        return float(header or 0)
    except ValueError:
        return 0.0
