"""The client against a real server on this machine: what it sends, how many at once, what errors become.

A handler decides what the server answers. Waits are told by the order of events, not by a clock.
"""

import asyncio
import contextlib
import gc
import socket
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_ray import endpoint
from retrieval_ray.endpoint import Endpoint
from retrieval_ray.errors import UserError
from retrieval_ray.prompts import Request
from retrieval_ray.replies import Reply

KEY, VARIABLE = "sk-very-secret-0123456789", "TEST_LLM_KEY"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and no waiting between attempts, unless the server asks for it."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.0)


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server on a free port; yields the URL to configure."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def requests(number: int) -> list[Request]:
    """Requests whose seed is their number, so that a handler knows them."""
    turn = {"role": "user", "content": "Passage: é 花"}
    return [Request(f"q{n}", f"p{n}", "question", [turn], n) for n in range(number)]


def client(url: str, **options: Any) -> Endpoint:
    known: dict[str, Any] = {
        "key_variable": VARIABLE, "concurrency": 4, "timeout_seconds": 10.0, "retries": 2, **options,
    }  # fmt: skip
    return Endpoint(url, {"model": "tiny", "temperature": 0.5, "max_tokens": 9}, **known)


def completion(text: Any, usage: Any = None) -> web.Response:
    message = {"role": "assistant", "content": text}
    return web.json_response({"choices": [{"message": message}], **({"usage": usage} if usage else {})})


def ask(handler: Handler, wanted: Iterable[Request], **options: Any) -> list[Reply]:
    """All replies, by query_id."""

    async def run() -> list[Reply]:
        async with serving(handler) as url:
            return [reply async for reply in client(url, **options).replies(wanted)]

    return sorted(asyncio.run(run()), key=lambda reply: int(reply.query_id[1:]))


# --- what is sent and read --------------------------------------------------------------------


def test_a_request_says_the_body_the_messages_and_the_seed() -> None:
    seen: list[tuple[str, str | None, Any]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.path, request.headers.get("Authorization"), await request.json()))
        return completion("how is granite made", {"prompt_tokens": 11, "completion_tokens": 4})

    replies = ask(handler, requests(1))
    message = {"role": "user", "content": "Passage: é 花"}
    body = {"model": "tiny", "temperature": 0.5, "max_tokens": 9, "messages": [message], "seed": 0}
    assert seen == [("/v1/chat/completions", f"Bearer {KEY}", body)]
    assert replies == [Reply("q0", "how is granite made", None, 11, 4)]


def test_a_body_may_leave_the_seed_out_and_say_anything_else() -> None:
    seen: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(await request.json())
        return completion("x")

    async def run() -> None:
        body = {"model": "tiny", "seed": None, "max_tokens": None, "max_completion_tokens": 9, "user": {}}
        options: dict[str, Any] = {"concurrency": 1, "timeout_seconds": 9.0, "retries": 0}
        async with serving(handler) as url:
            async for _ in Endpoint(url, body, key_variable=VARIABLE, **options).replies(requests(1)):
                pass

    asyncio.run(run())
    message = {"role": "user", "content": "Passage: é 花"}
    assert seen == [{"model": "tiny", "max_completion_tokens": 9, "user": {}, "messages": [message]}]


@pytest.mark.parametrize(("reason", "cut"), [("length", True), ("stop", False), (None, False)])
def test_a_reply_at_the_limit_of_tokens_is_told(reason: str | None, cut: bool) -> None:
    async def handler(request: web.Request) -> web.Response:
        choice = {"message": {"content": "how is"}, "finish_reason": reason}
        return web.json_response({"choices": [choice]})

    assert ask(handler, requests(1)) == [Reply("q0", "how is", None, 0, 0, cut)]


@pytest.mark.parametrize("slashes", ["", "/", "//"])
def test_the_url_may_end_in_slashes(slashes: str) -> None:
    assert client(f"http://host/v1{slashes}").url == "http://host/v1/chat/completions"


@pytest.mark.parametrize(("key", "header"), [(None, None), ("", None), (" sk-1\n", "Bearer sk-1")])
def test_a_key_is_sent_where_there_is_one(
    key: str | None, header: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local server needs none; a key read from a file ends in a newline, which no header may hold."""
    monkeypatch.delenv(VARIABLE)
    if key is not None:
        monkeypatch.setenv(VARIABLE, key)
    seen: list[str | None] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return completion("x")

    assert [reply.error for reply in ask(handler, requests(1))] == [None]
    assert seen == [header]


@pytest.mark.parametrize(
    ("content", "usage", "text", "tokens"),
    [
        ("a", None, "a", (0, 0)),
        ("", None, "", (0, 0)),
        (None, None, "", (0, 0)),  # of a model that only thought
        ("two\nlines", {"prompt_tokens": 3}, "two\nlines", (3, 0)),
        ("a", {"prompt_tokens": None, "completion_tokens": 2}, "a", (0, 2)),
        ("花\ud83d", None, "花?", (0, 0)),  # half a surrogate pair, which no table can hold
    ],
)
def test_a_reply_holds_the_text_and_the_tokens(
    content: str | None, usage: Any, text: str, tokens: tuple[int, int]
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return completion(content, usage)

    assert ask(handler, requests(1)) == [Reply("q0", text, None, *tokens)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("<html>busy</html>", "unreadable reply"),
        ("", "no choices"),
        ("[]", "no choices"),
        ('"text"', "no choices"),
        ('{"error": {"message": "overloaded"}}', "overloaded"),
        ('{"choices": []}', "no choices"),
        ('{"choices": [{"text": "a"}]}', "no choices"),
        ('{"choices": [{"message": {"content": [{"type": "text"}]}}]}', "not a text"),
        ('{"choices": [{"message": {"content": "a"}}], "usage": [1]}', "no choices"),
        (b'{"choices": "\xff"}', "unreadable reply"),
    ],
)
def test_a_body_that_is_no_reply_is_asked_again_and_then_an_error(body: str | bytes, says: str) -> None:
    asked = Counter[int]()

    async def handler(request: web.Request) -> web.Response:
        seed = (await request.json())["seed"]
        asked[seed] += 1
        return completion("fine") if seed == 0 and asked[0] == 3 else _response(body)

    first, second = ask(handler, requests(2), retries=2)
    assert first == Reply("q0", "fine", None, 0, 0)
    assert second.text is None and second.error is not None and says in second.error
    assert asked == {0: 3, 1: 3}


def _response(body: str | bytes, status: int = 200) -> web.Response:
    content = body.encode() if isinstance(body, str) else body
    return web.Response(status=status, body=content, content_type="application/json")


# --- how many at once -------------------------------------------------------------------------


@pytest.mark.parametrize(("concurrency", "number"), [(1, 3), (4, 20), (7, 3)])
def test_as_many_requests_are_in_flight_as_allowed_and_never_more(concurrency: int, number: int) -> None:
    """Nobody is answered before as many are waiting as may wait: with fewer in flight this would hang."""
    expected = min(concurrency, number)
    now = peak = 0
    full = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        if now == expected:
            full.set()
        await full.wait()
        await asyncio.sleep(0.005)  # time for one too many to arrive
        now -= 1
        return completion("x")

    replies = ask(handler, requests(number), concurrency=concurrency, timeout_seconds=5, retries=0)
    assert [reply.query_id for reply in replies] == [f"q{n}" for n in range(number)]
    assert peak == expected


def test_requests_are_taken_when_there_is_room_for_them() -> None:
    """Of an endless list of requests no more than those in flight are built."""
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        for request in requests(1000):
            taken += 1
            yield request

    async def handler(request: web.Request) -> web.Response:
        return completion("x")

    async def run() -> None:
        async with serving(handler) as url:
            replies = client(url, concurrency=4).replies(endless())
            for number in range(1, 11):
                await anext(replies)
                assert number <= taken <= number + 3  # the one that came, and three others of four
            await replies.aclose()

    asyncio.run(run())


def test_replies_come_as_they_are_ready_and_a_slow_one_holds_up_nobody() -> None:
    slow = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        seed = (await request.json())["seed"]
        if seed == 0:
            await slow.wait()
        return completion("x")

    async def run() -> list[str]:
        async with serving(handler) as url:
            found = []
            async for reply in client(url, concurrency=2).replies(requests(5)):
                found.append(reply.query_id)
                if len(found) == 4:
                    slow.set()
            return found

    assert asyncio.run(run()) == ["q1", "q2", "q3", "q4", "q0"]


# --- errors that may pass ---------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from([200, 200, 400, 422, 429, 500, 503, 529]), max_size=4), max_size=6))
@settings(max_examples=25)
def test_every_request_ends_as_its_own_statuses_say(statuses: list[list[int]]) -> None:
    """What the server answers each request in turn; when it has no more to say, 200."""
    retries = 2
    left = {seed: [*answers, 200] for seed, answers in enumerate(statuses)}
    expected: dict[str, str | None] = {}
    for seed, answers in left.items():
        tried = answers[: retries + 1]
        final = next((status for status in tried if status in (200, 400, 422)), tried[-1])
        expected[f"q{seed}"] = None if final == 200 else f"HTTP {final}: no"

    async def handler(request: web.Request) -> web.Response:
        status = left[(await request.json())["seed"]].pop(0)
        return completion("x") if status == 200 else _response("no", status)

    replies = ask(handler, requests(len(statuses)), retries=retries, concurrency=3)
    assert {reply.query_id: reply.error for reply in replies} == expected
    assert all((reply.text is None) == (reply.error is not None) for reply in replies)


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_request_that_is_itself_wrong_is_asked_once(status: int) -> None:
    asked = Counter[int]()

    async def handler(request: web.Request) -> web.Response:
        seed = (await request.json())["seed"]
        asked[seed] += 1
        return _response("maximum context length", status) if seed == 1 else completion("x")

    replies = ask(handler, requests(3), retries=6)
    assert [reply.error for reply in replies] == [None, f"HTTP {status}: maximum context length", None]
    assert [reply.refused for reply in replies] == [False, True, False]
    assert asked == {0: 1, 1: 1, 2: 1}


def test_it_gives_up_when_nothing_is_answered_any_more() -> None:
    """Ten answers, then the server is down for good: 50 failures beside those in flight are enough."""
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return completion("x") if asked <= 10 else _response("down", 500)

    async def run() -> list[Reply]:
        found: list[Reply] = []
        async with serving(handler) as url:
            with pytest.raises(
                UserError, match=r"5\d requests in a row failed, the last with: HTTP 500: down"
            ):
                async for reply in client(url, concurrency=4, retries=0).replies(requests(1000)):
                    found.append(reply)
        return found

    found = asyncio.run(run())
    assert len([reply for reply in found if reply.text]) == 10 and asked < 80


@pytest.mark.parametrize("known", [True, False])
def test_refused_rows_end_nothing_where_the_server_is_known_to_answer(known: bool) -> None:
    """What is left after a kill may be nothing but rows that are refused for what is in them."""

    async def handler(request: web.Request) -> web.Response:
        return _response("content policy", 400)

    async def run() -> list[Reply]:
        async with serving(handler) as url:
            asking = client(url, concurrency=4)
            asking.answered = known
            return [reply async for reply in asking.replies(requests(200))]

    if known:
        assert [reply.error for reply in asyncio.run(run())] == ["HTTP 400: content policy"] * 200
    else:
        with pytest.raises(UserError, match=r"5\d requests in a row failed, the last with: HTTP 400"):
            asyncio.run(run())


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, 524, 529])
def test_what_may_pass_is_asked_again(status: int) -> None:
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return _response("later", status) if asked < 3 else completion("x")

    assert ask(handler, requests(1), retries=2) == [Reply("q0", "x", None, 0, 0)]
    assert asked == 3


def test_a_timeout_is_asked_again_and_then_an_error_of_its_row() -> None:
    asked = Counter[int]()

    async def handler(request: web.Request) -> web.Response:
        seed = (await request.json())["seed"]
        asked[seed] += 1
        if seed == 0 or (seed == 1 and asked[1] == 1):
            await asyncio.sleep(60)
        return completion("x")

    replies = ask(handler, requests(3), retries=1, timeout_seconds=0.5)
    assert [reply.text for reply in replies] == [None, "x", "x"]
    assert str(replies[0].error).startswith("TimeoutError")
    assert asked == {0: 2, 1: 2, 2: 1}


def test_a_lost_connection_is_asked_again() -> None:
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if asked < 3:
            assert request.transport is not None
            request.transport.abort()
        return completion("x")

    assert ask(handler, requests(1), retries=2) == [Reply("q0", "x", None, 0, 0)]
    assert asked == 3


def test_retry_after_is_obeyed() -> None:
    """The first request is told to wait; the second fails five times meanwhile, without being told."""
    events: list[int] = []

    async def handler(request: web.Request) -> web.Response:
        seed = (await request.json())["seed"]
        events.append(seed)
        if seed == 0 and events.count(0) == 1:
            return web.Response(status=429, headers={"Retry-After": "0.5"})
        return _response("no", 500) if seed == 1 and events.count(1) < 6 else completion("x")

    replies = ask(handler, requests(2), retries=5)
    assert [reply.error for reply in replies] == [None, None]
    assert events[-1] == 0 and Counter(events) == {0: 2, 1: 6}


def test_the_wait_doubles_is_jittered_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.5)
    waits = {attempt: [endpoint._wait(attempt, None) for _ in range(200)] for attempt in range(5)}
    for attempt, drawn in waits.items():
        assert 0.25 * 2**attempt <= min(drawn) < max(drawn) <= 0.5 * 2**attempt
    assert endpoint._wait(10_000, None) == 60


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0", 0.25, 0.5),
        ("-3", 0.25, 0.5),
        ("3600", 60, 60),  # a server that is down for an hour costs no more than the retries
        ("inf", 60, 60),
        ("nan", 0.25, 0.5),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.25, 0.5),
    ],
)
def test_what_retry_after_may_say(
    header: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.5)
    assert least <= endpoint._wait(0, header) <= most


# --- errors that do not -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, VARIABLE), (402, VARIABLE), (404, "llm.url and llm.model"), (405, "llm.url")],
)
def test_what_no_request_can_pass_is_the_users_error(status: int, says: str) -> None:
    """Said once, where several fail together; nothing of it comes up when they are collected."""
    asked = 0
    noticed: list[dict[str, Any]] = []
    full = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if asked == 4:
            full.set()
        await full.wait()
        return _response("no such key or model", status)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noticed.append(context))
        async with serving(handler) as url:
            with pytest.raises(UserError, match=says) as caught:
                async for _ in client(url, concurrency=4, retries=5).replies(requests(100)):
                    pass
            assert url in str(caught.value) and "no such key or model" in str(caught.value)
            assert "not set" not in str(caught.value)
            del caught
            gc.collect()

    asyncio.run(run())
    assert asked <= 8 and noticed == []


def test_many_short_calls_learn_of_a_dead_server_too() -> None:
    """Rounds of fewer requests than it takes to give up, one event loop after the other."""
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return _response("down", 503)

    dead: Endpoint | None = None

    async def round_of(number: int) -> list[Reply]:
        nonlocal dead
        async with serving(handler) as url:
            dead = dead or client(url, concurrency=4, retries=0)
            dead.url = f"{url}/chat/completions"
            return [reply async for reply in dead.replies(requests(number))]

    replies = asyncio.run(round_of(40))
    assert len(replies) == 40 and not any(reply.refused for reply in replies)
    with pytest.raises(UserError, match=r"5\d requests in a row failed, the last with: HTTP 503"):
        asyncio.run(round_of(40))
    assert asked < 70


def test_a_refused_request_without_a_key_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)

    async def handler(request: web.Request) -> web.Response:
        return _response("who are you", 401)

    with pytest.raises(UserError, match=rf"{VARIABLE} \(it is not set\)"):
        ask(handler, requests(1))


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
@pytest.mark.parametrize("before", ["", "x" * 290])
def test_the_key_stands_in_no_message_and_no_reply(
    status: int, before: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a server that quotes it; also where the message is cut off in the middle of the key."""

    async def handler(request: web.Request) -> web.Response:
        return _response(f'"{before} bad header {request.headers["Authorization"]}"', status)

    try:
        said = repr(ask(handler, requests(2), retries=1))
    except UserError as error:
        said = repr(error)
    assert "bad header" in said or before
    assert KEY[:8] not in said and KEY[:8] not in "".join(capsys.readouterr())


def test_the_key_is_not_kept_in_the_client() -> None:
    """Which is pickled, and described in messages."""
    assert KEY not in repr(vars(client("http://host/v1")))


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "host/v1", "http://", "ftp://host/v1", "http://h:99999/v1"]
)
def test_what_is_no_address_is_the_users_error(url: str) -> None:
    async def run() -> None:
        async for _ in client(url, retries=50).replies(requests(3)):
            pass

    with pytest.raises(UserError, match=r"llm\.url"):
        asyncio.run(run())


def test_where_nobody_ever_answered_the_address_is_wrong() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def run() -> None:
        async for _ in client(f"http://127.0.0.1:{port}/v1", retries=2).replies(requests(3)):
            pass

    with pytest.raises(UserError, match=rf":{port}/v1/chat/completions.*check llm\.url"):
        asyncio.run(run())


def test_a_server_that_goes_away_leaves_errors_of_rows() -> None:
    async def handler(request: web.Request) -> web.Response:
        return completion("x")

    async def run() -> list[str | None]:
        async with contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(serving(handler))
            replies = client(url, concurrency=1, retries=1).replies(requests(3))
            found = [(await anext(replies)).error]
            await stack.aclose()
            return found + [reply.error async for reply in replies]

    first, *others = asyncio.run(run())
    assert first is None and len(others) == 2
    assert all(error and "Client" in error for error in others)


# --- the end ----------------------------------------------------------------------------------


def test_closed_early_it_cancels_what_is_in_flight() -> None:
    ends: dict[str, int] = defaultdict(int)
    waiting = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if (await request.json())["seed"] == 0:
            return completion("x")
        try:
            ends["begun"] += 1
            if ends["begun"] == 3:
                waiting.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ends["cancelled"] += 1
            raise
        return completion("x")

    async def run() -> None:
        before = asyncio.all_tasks()
        async with serving(handler) as url:
            replies = client(url, concurrency=4).replies(requests(4))
            assert (await anext(replies)).query_id == "q0"
            await waiting.wait()
            server = asyncio.all_tasks() - before
            await replies.aclose()
            assert [task for task in server if "_reply" in repr(task) and not task.done()] == []
            async with asyncio.timeout(5):
                while ends["cancelled"] < 3:  # the server notices when its connections are closed
                    await asyncio.sleep(0.001)

    asyncio.run(run())
    assert ends == {"begun": 3, "cancelled": 3}


def test_no_requests_no_replies() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("nobody asked")

    assert ask(handler, []) == []
