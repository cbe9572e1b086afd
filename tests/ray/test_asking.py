"""The endpoint's worker, without Ray: what it keeps, and how much is in flight over many small parts."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, bucket_of, part_name, stage
from retrieval_ray.prompts import Wanted, read_pool
from retrieval_ray.stages.ask_endpoint import _Asker, _shares
from retrieval_ray.stages.asking import Asking

from .chat import serving

PARTS, PASSAGES = 16, 48


class Server:
    """Answers after a moment, and counts what is in flight."""

    def __init__(self) -> None:
        self.now = self.peak = self.asked = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.now, self.asked = self.now + 1, self.asked + 1
        self.peak = max(self.peak, self.now)
        await asyncio.sleep(0.05)
        self.now -= 1
        return web.json_response({"choices": [{"message": {"content": "a query"}}]})


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    served = Server()
    with serving(served) as url:
        yield served, url


def asking_of(folder: Path) -> tuple[Asking, list[dict[str, object]]]:
    """Requests of one kind for three passages of each of sixteen parts."""
    store = Location.of(str(folder))
    corpus = stage(store, "corpus", {"titles": False})
    texts = [f"Passage number {n} about nothing in particular." for n in range(PASSAGES)]
    parts: list[list[dict[str, object]]] = [[] for _ in range(PARTS)]
    for n, text in enumerate(texts):
        parts[bucket_of(text, PARTS)].append({"passage_id": f"p{n}", "title": "", "text": text})
    for number, rows in enumerate(parts):
        corpus.write(part_name("corpus", number, "arrow"), schema.from_rows("corpus", rows))
    wanted = Wanted({"question": 1}, read_pool(None, None), None, 4, 0)
    asking = Asking(corpus, stage(store, "generate", {}), store, "writer", wanted, PARTS, "here")
    return asking, [
        {"number": number, "passages": sorted(str(row["passage_id"]) for row in rows)}
        for number, rows in enumerate(parts)
    ]


def test_small_parts_are_asked_together(server: tuple[Server, str], tmp_path: Path) -> None:
    served, url = server
    asking, parts = asking_of(tmp_path)
    endpoint = {
        "url": url, "body": {}, "key_variable": "NO_KEY", "concurrency": 24, "timeout_seconds": 10.0,
        "retries": 0,
    }  # fmt: skip
    worker = _Asker(asking, endpoint)
    assert worker.run({"parts": parts}) == {"asked": PASSAGES, "tokens_in": 0, "tokens_out": 0}
    assert served.peak == 24 and served.asked == PASSAGES  # no part holds so many
    for part in parts:
        assert not asking.open(part)
        assert all(reply.text == "a query" for _, reply in asking.replies(part))
    assert worker.run({"parts": parts})["asked"] == 0 and served.asked == PASSAGES


@pytest.mark.parametrize("least", [1, 4, 7, 100])
def test_shares_hold_every_part_once_and_enough_passages(least: int) -> None:
    parts = [{"number": n, "passages": ["p"] * (n % 4)} for n in range(20)]
    shares = _shares(parts, least)
    assert [part for share in shares for part in share] == parts
    sizes = [sum(len(part["passages"]) for part in share) for share in shares]
    assert all(size >= least for size in sizes[:-1]) and all(size < least + 4 for size in sizes)
