"""An OpenAI-compatible endpoint in a thread of the tests' own process."""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from aiohttp import web

KEY = "sk-not-to-be-seen-anywhere"


class Answering(Protocol):
    async def answer(self, request: web.Request) -> web.StreamResponse: ...


@contextmanager
def serving(served: Answering, address: str = "127.0.0.1") -> Iterator[str]:
    """Serve on a free port of an address of this machine; gives the URL that an endpoint is known by."""
    loop = asyncio.new_event_loop()

    async def begin() -> str:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", served.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, address, 0).start()
        return f"http://{address}:{runner.addresses[0][1]}/v1"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(begin(), loop).result(timeout=30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)


class Server:
    """An OpenAI-compatible endpoint that answers with words of the passage, or as it is told to."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.faults = 0.0  # the share of requests that meet one
        self.bad = ""  # requests whose messages hold this are refused for good
        self.delay = 0.0
        self.now = self.peak = 0  # requests in flight

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            return await self._answer(request)
        finally:
            self.now -= 1

    async def _fault(self, request: web.Request) -> web.StreamResponse:
        match random.randrange(5):
            case 0:
                return web.Response(status=429, text="slow down", headers={"Retry-After": "0.1"})
            case 1:
                return web.Response(status=500, text="oh no")
            case 2:
                return web.Response(text="<html>garbage</html>")
            case 3:  # half a reply, and the connection is gone
                half = web.StreamResponse(headers={"Content-Length": "500"})
                await half.prepare(request)
                await half.write(b'{"choices": [{"mess')
                assert request.transport
                request.transport.close()
                return half
            case _:  # nothing, until the client gives up
                self.now -= 1  # the client may be gone long before the server notices
                await asyncio.sleep(3)
                self.now += 1
                return web.Response(status=500)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.keys.add(request.headers.get("Authorization"))
        await asyncio.sleep(self.delay)
        if random.random() < self.faults:
            return await self._fault(request)
        self.asked.append(body)
        passage = body["messages"][-1]["content"].rpartition("Passage: ")[2]
        if self.bad and self.bad in passage:
            return web.json_response({"error": {"message": "content policy"}}, status=400)
        words = passage.split()
        random.Random(body["seed"]).shuffle(words)
        text = " ".join(words[:6])
        return web.json_response(
            {
                "choices": [{"message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 6},
            }
        )
