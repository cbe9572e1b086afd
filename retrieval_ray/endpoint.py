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

_AGAIN = {408, 409, 425, 429}  # and every 5xx
_HOPELESS = {401, 402, 404, 405}  # every other request would fare alike; 403 may be one row's matter
_IN_VAIN = 50  # failures without an answer between them, beside what is in flight: then it gives up
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds between two attempts


class Endpoint:
    """``POST {url}/chat/completions``.

    url: the base, like ``http://localhost:8000/v1``. body: what every request says beside its messages
    (model, temperature, max_tokens ...), over a seed of its own; None leaves a field out. key_variable: the
    environment variable that holds the key; the key goes into no message. concurrency: requests in flight.
    retries: further attempts after a status that may pass (429, 5xx, ...), a timeout or a lost connection;
    the wait doubles from half a second, is jittered, and obeys ``Retry-After`` (up to a minute). section:
    the part of the config that messages name.
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
        section: str = "llm",
    ) -> None:
        self.url, self.body = f"{url.rstrip('/')}/chat/completions", dict(body)
        self.key_variable, self.concurrency = key_variable, concurrency
        self.timeout, self.retries = aiohttp.ClientTimeout(total=timeout_seconds), retries
        self.section = section
        self.reached = False  # whether anything ever answered at this address
        self.answered = False  # whether a request ever got a reply; also a caller may know
        self._in_vain = 0  # requests in a row that no server dealt with

    async def replies(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        """A reply for each request, in the order in which they come.

        Raises ``UserError`` where no request can succeed: a wrong address, a key that is refused, so many
        failures in a row that the server must be down. A server that refuses one request for what is in it
        is up, so refusals count only as long as nothing was ever answered. Failures are counted on from one
        call to the next: many short ones learn of a dead server too.
        """
        key = self._key()
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
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        running.discard(task)
                        reply = task.result()
                        yield reply
                        if self._in_vain >= _IN_VAIN + self.concurrency:
                            raise UserError(
                                f"{self.url}: {self._in_vain} requests in a row failed, the last with: "
                                f"{reply.error}. What was answered is kept: run the same command again "
                                "when it is mended"
                            )
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _reply(self, session: aiohttp.ClientSession, request: Request) -> Reply:
        said = {"seed": request.seed, **self.body, "messages": request.messages}
        body = {name: value for name, value in said.items() if value is not None}
        problem, refused = "", False
        for attempt in range(self.retries + 1):
            last, retry_after = attempt == self.retries, None
            try:
                async with session.post(self.url, json=body) as response:
                    self.reached = True
                    if response.status == 200:
                        reply = _read(request, await response.json(content_type=None))
                        self.answered, self._in_vain = True, 0
                        return reply
                    answer = self._without_key(await response.text(errors="replace"))
                    problem = f"HTTP {response.status}: {answer[:300]}"
                    if response.status in _HOPELESS:
                        raise UserError(self._hopeless(response.status, problem))
                    refused = response.status < 500 and response.status not in _AGAIN
                    if refused:
                        break
                    retry_after = response.headers.get("Retry-After")
            except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
                raise UserError(f"{self.section}.url: not an address: {self.url} ({error})") from None
            except (TimeoutError, aiohttp.ClientError) as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                if last and not self.reached and isinstance(error, aiohttp.ClientConnectorError):
                    raise UserError(
                        f"{self.url}: {problem}; check {self.section}.url, and that it is up"
                    ) from None
            except (ValueError, OverflowError, RecursionError) as error:  # not JSON, or not that of a reply
                problem = self._without_key(f"unreadable reply: {error}")[:300]
            if not last:
                await asyncio.sleep(_wait(attempt, retry_after))
        self._in_vain = 0 if refused and self.answered else self._in_vain + 1
        return Reply(request.query_id, None, problem, 0, 0, refused=refused)

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def _without_key(self, text: str) -> str:
        """What a server says may quote the key that it was sent."""
        key = self._key()
        return text.replace(key, f"${self.key_variable}") if key else text

    def _hopeless(self, status: int, problem: str) -> str:
        key = f"the key in the environment variable {self.key_variable}"
        if not self._key():
            key += " (it is not set)"
        what = (
            f"check {key}"
            if status in (401, 402, 403)
            else f"check {self.section}.url and {self.section}.model"
        )
        return f"{self.url}: {problem}; {what}"


def _read(request: Request, document: Any) -> Reply:
    try:
        choice = document["choices"][0]
        text = choice["message"]["content"] or ""
        usage = document.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError("content is not a text")
        return Reply(
            request.query_id,
            text.encode(errors="replace").decode(),  # half a surrogate pair can be written nowhere
            None,
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            cut=choice.get("finish_reason") == "length",
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no choices[0].message.content ({error!r}) in {document}") from error


def _wait(attempt: int, retry_after: str | None) -> float:
    """Seconds before the next attempt. The other form of ``Retry-After``, a date, is left to the backoff."""
    wait = _FIRST_WAIT * 2.0 ** min(attempt, 10) * random.uniform(0.5, 1.0)
    try:
        wait = max(wait, float(retry_after or 0))
    except ValueError:
        pass
    return min(wait, _LONGEST_WAIT)
