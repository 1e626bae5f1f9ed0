"""The scripted upstream itself: it must be right before it may judge."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests import upstream_answers
from tests.client import Client, Server, ask, raw, raw_request, status_of
from tests.ledger import Request, complaints_about
from tests.scripted_upstream import ScriptedUpstream, Step, cut, drip, hold, reset, send, sleep, stall


@pytest.fixture
def target(upstream: ScriptedUpstream) -> Server:
    return Server(f"http://127.0.0.1:{upstream.port}", upstream.port)


async def test_ledger_keeps_wire_spelling_body_and_order(
    upstream: ScriptedUpstream, target: Server, client: Client
) -> None:
    body = b'{"model": "gpt-4o",\t"messages":[{"content":"h\xc3\xa9"}]}'
    answer = await client.send(
        target, body, {"x-ODD-Name": "1", "Content-Type": "application/json"}, "/v1/chat/completions?a=%20b"
    )
    assert answer.status == 200
    got = upstream.last
    assert (got.method, got.target, got.body) == ("POST", "/v1/chat/completions?a=%20b", body)
    assert ("x-ODD-Name", "1") in got.headers
    assert got.complete_at is not None


async def test_chunked_uploads_are_joined_and_connections_reused(
    upstream: ScriptedUpstream, target: Server, client: Client
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    first = await client.send(target, pieces(), {"Content-Type": "text/plain"}, "/v1/files")
    await client.get(target, "/v1/models")
    assert first.json()["size"] == 7
    assert upstream.requests[0].body == b"one two"
    assert [(r.connection, r.nth) for r in upstream.requests][1][1] == 2


async def test_streams_come_as_separate_reads(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    gate = upstream.gate()
    events = upstream_answers.chat_events(include_usage=True)
    upstream.always(
        *upstream_answers.stream(events[:1], end=False), hold(gate), *upstream_answers.stream(events[1:])[1:]
    )
    async with client.open(target, ask(stream=True)) as answer:
        first = await answer.content.readany()
        assert first == events[0]
        gate.open()
        assert first + await answer.content.read() == b"".join(events)


@pytest.mark.parametrize("end", [cut(), reset()])
async def test_a_cut_stream_is_an_error_to_the_client(
    upstream: ScriptedUpstream, target: Server, client: Client, end: Step
) -> None:
    upstream.always(*upstream_answers.stream(upstream_answers.chat_events()[:2], end=False), end)
    with pytest.raises(aiohttp.ClientError):
        await client.send(target, ask(stream=True))


async def test_a_connection_closed_before_the_head(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    upstream.always(cut())
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await client.send(target, ask())


async def test_reset_on_accept_and_refusal(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    upstream.reset_on_accept = 1
    with pytest.raises(aiohttp.ClientError):
        await client.send(target, ask())
    with upstream.refusing(), pytest.raises(aiohttp.ClientConnectorError):
        await client.send(target, ask())
    assert (await client.send(target, ask())).status == 200
    assert upstream.count == 1


async def test_a_client_that_leaves_is_noticed(upstream: ScriptedUpstream, target: Server) -> None:
    upstream.always(stall())
    async with Client() as client:
        task = asyncio.create_task(client.send(target, ask()))
        await upstream.until(lambda: upstream.count == 1)
        assert not upstream.last.peer_gone
        left = time.monotonic()
        task.cancel()
        await upstream.until(lambda: upstream.last.peer_gone)
    assert upstream.last.peer_closed_at is not None
    assert upstream.last.peer_closed_at > left


async def test_its_own_close_is_not_the_clients(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    upstream.always(sleep(0.01), reset())
    with pytest.raises(aiohttp.ClientError):
        await client.send(target, ask())
    assert upstream.last.peer_closed_at is None


async def test_queue_comes_before_script(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    upstream.queue("/v1/chat/completions", upstream_answers.rate_limited("2"), upstream_answers.unauthorized())
    statuses = [(await client.send(target, ask())).status for _ in range(3)]
    assert statuses == [429, 401, 200]


async def test_dripping_and_raw_bytes(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    upstream.always(drip(upstream_answers.response(200, b'{"a": 1}'), 7))
    assert (await client.send(target, ask())).json() == {"a": 1}
    upstream.always(send(b"nonsense\r\n\r\n"), cut())
    with pytest.raises(aiohttp.ClientError):
        await client.send(target, ask())


async def test_a_response_before_the_request_body(upstream: ScriptedUpstream, target: Server) -> None:
    upstream.on_head = lambda _: [upstream_answers.reply(413, {"error": "early"}), cut()]
    answer = await raw(target, raw_request("POST", "/v1/files", {"Content-Length": "1000000"}))
    assert status_of(answer) == 413
    assert upstream.last.complete_at is None


async def test_idle_connections_can_be_closed(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    await client.send(target, ask())
    upstream.close_connections()
    await upstream.until(lambda: not upstream.open_connections)


async def test_forbidden_headers_are_complaints() -> None:
    headers = [
        ("Host", "a"),
        ("Cookie", "1"),
        ("Sec-Fetch-Mode", "cors"),
        ("X-Proxy-Tag", "a:b"),
        ("Connection", "x-a"),
    ]
    lines = list(complaints_about(Request(1, 1, 1, "GET", "/", "HTTP/1.1", headers, 0.0)))
    assert len(lines) == 4


async def test_a_broken_script_is_reported(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    upstream.script = lambda request: request.json()["absent"]
    with pytest.raises(aiohttp.ClientError):
        await client.send(target, ask())
    assert upstream.complaints
    upstream.complaints.clear()


async def test_default_behaviour(upstream: ScriptedUpstream, target: Server, client: Client) -> None:
    answer = await client.send(target, {"model": "text-embedding-3-small", "input": ["a", "bb"]}, path="/v1/embeddings")
    assert [item["index"] for item in answer.json()["data"]] == [0, 1]
    answer = await client.send(target, ask("nonce", stream=True, stream_options={"include_usage": True}))
    assert answer.body.endswith(upstream_answers.DONE)
    payloads = [json.loads(part[6:]) for part in answer.body.split(b"\n\n")[:-2]]
    assert payloads[-1]["usage"]["total_tokens"] == 300
    assert "".join(c["delta"].get("content", "") for p in payloads for c in p["choices"]) == "echo: nonce"
