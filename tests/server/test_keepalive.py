"""`server.keepalive`: comments in streams that wait, and errors that come after them (docs/clients.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from proxy.config.limits import Limits
from proxy.config.settings import RetrySettings, ServerSettings, ThrottleSettings
from proxy.server.keepalive import as_event
from tests.pipeline.fixture import ask, settings
from tests.pipeline.script import Responds, error, events, says, streams
from tests.server.kit import Answer, raw_connection, request, running_proxy, until

pytestmark = pytest.mark.slow

QUICK = settings(server=ServerSettings(keepalive=0.05), retry=RetrySettings(max_retries=1, base_delay=0.2, jitter=0.0))
STREAM = ask(stream=True)
WHOLE = b"".join(events())
PING = b": keep-alive\n"


def without_comments(answer: Answer) -> tuple[int, bytes]:
    """Return how many comments came, and the rest."""
    body = b"".join(answer.chunks)
    return body.count(PING), body.replace(PING, b"")


SLOW = {
    "for the head": [streams([*events()], wait=0.2)],
    "for the first event": [streams([0.2, *events()])],
    "between events": [streams([events()[0], 0.2, *events()[1:]])],
    "for a retry": [error(500), streams()],
}


@pytest.mark.parametrize("moves", SLOW.values(), ids=SLOW.keys())
async def test_a_stream_that_waits_gets_comments(moves: list[Responds]) -> None:
    async with running_proxy(*moves, config=QUICK) as server:
        answer = await server.ask(body=STREAM)
        comments, rest = without_comments(answer)
        assert (answer.status, answer.whole, rest) == (200, True, WHOLE)
        assert comments >= 2
        assert (answer.get("Content-Type") or "").startswith("text/event-stream")
        assert answer.get("X-Proxy-Request-Id") == server.receipts[-1].id
        hit = await server.ask(body=STREAM)
        assert (hit.get("X-Proxy-Cache"), hit.body) == ("hit", WHOLE)  # no comment is stored


async def test_a_stream_in_the_queue_gets_comments() -> None:
    config = replace(QUICK, throttle=ThrottleSettings(limits={"*": Limits(concurrency=1)}))
    async with running_proxy(says(wait=0.2), streams(), config=config) as server, raw_connection(server.port) as line:
        line.send(request(body=ask("first")))
        await until(lambda: len(server.transport.sent) == 1)
        comments, rest = without_comments(await server.ask(body=STREAM))
        assert (comments >= 1, rest) == (True, WHOLE)


@pytest.mark.parametrize(
    ("moves", "code"),
    [
        ([error(400, "no_such_thing", wait=0.2)], "no_such_thing"),
        ([Responds(302, wait=0.2)], "upstream_invalid_response"),
    ],
)
async def test_an_error_after_a_comment_is_an_event_and_a_cut(moves: list[Responds], code: str) -> None:
    async with running_proxy(*moves, config=QUICK) as server:
        answer = await server.ask(body=STREAM)
        comments, rest = without_comments(answer)
        assert (answer.status, answer.whole) == (200, False)
        assert comments >= 1
        assert orjson.loads(rest.removeprefix(b"data: "))["error"]["code"] == code


async def test_a_client_that_leaves_while_it_gets_comments_ends_the_request() -> None:
    async with running_proxy(streams(wait=30.0), config=QUICK) as server:
        async with raw_connection(server.port) as line:
            line.send(request(body=STREAM))
            await line.reader.readuntil(PING)
        await server.settled()
        assert [(receipt.status, receipt.error) for receipt in server.receipts] == [(499, "client_gone")]


async def test_without_the_setting_and_for_plain_requests_there_are_none() -> None:
    async with running_proxy(streams(wait=0.1)) as server:
        assert b"".join((await server.ask(body=STREAM)).chunks) == WHOLE
    async with running_proxy(says(wait=0.1), config=QUICK) as server:
        assert (await server.ask(body=ask())).json()["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b'{\n "error": {"message": "no"}\n}', {"error": {"message": "no"}}),
        (200, b'{"id":\n1}', {"id": 1}),
    ],
)
def test_a_whole_response_as_an_event(status: int, body: bytes, said: Any) -> None:
    event = as_event(status, body)
    assert event.startswith(b"data: ")
    assert event.endswith(b"}\n\n")
    assert orjson.loads(event[6:]) == said


def test_an_error_that_is_no_json_becomes_one() -> None:
    assert orjson.loads(as_event(403, b"<html>blocked</html>")[6:])["error"]["code"] == "403"
