"""What is sent upstream, what comes back, on which connection; nothing of aiohttp's own (docs/headers.md)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from proxy.upstream.client import AiohttpTransport
from proxy.upstream.interfaces import ConnectionInfo
from proxy.upstream.retry.outcome import TransportFailure
from tests.server.kit import TEST_TIMEOUT, Raw, raw_upstream
from tests.upstream.transport import OK, says, send, whole

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


# What goes up and what comes back.


async def test_a_request_and_its_response(up: AiohttpTransport) -> None:
    async with raw_upstream(says(OK)) as upstream:
        connection = ConnectionInfo()
        answer = await send(up, upstream, connection)
        assert (answer.status, answer.reason) == (200, "Fine")
        assert answer.raw_headers[1:3] == ((b"X-A", b"1"), (b"x-a", b"2"))
        assert answer.headers["content-type"] == "application/json"
        assert await whole(answer) == b"{}"
        assert (connection.connected, connection.answered, connection.reused) == (True, True, False)
        # Nothing of aiohttp's own: no User-Agent, no Accept, no Accept-Encoding.
        port = upstream.port
        assert upstream.heads == [
            b"POST /v1/x?a=%%2F&b=c HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
            b"Content-Length: 2\r\n\r\n" % port
        ]


async def test_headers_are_sent_repeated_and_unchanged(up: AiohttpTransport) -> None:
    headers = (("X-Twice", "1"), ("X-Twice", "2"), ("x-lower", "ä".encode().decode("utf-8", "surrogateescape")))
    async with raw_upstream(says(OK)) as upstream:
        await whole(await send(up, upstream, headers=headers))
        assert b"X-Twice: 1\r\nX-Twice: 2\r\nx-lower: \xc3\xa4\r\n" in upstream.heads[0]


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 3_000_000])
async def test_bodies_of_any_size_have_a_content_length(up: AiohttpTransport, size: int) -> None:
    got: list[bytes] = []

    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await raw.read_request(reader))
        writer.write(OK)

    body = bytes(range(256)) * (size // 256 + 1)
    async with raw_upstream(turn) as upstream:
        await whole(await send(up, upstream, body=body[:size]))
        assert got == [body[:size]]
        assert b"transfer-encoding" not in upstream.heads[0].lower()


async def test_a_streamed_body_is_chunked_or_has_its_given_length(up: AiohttpTransport) -> None:
    got: list[bytes] = []

    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            got.append(await raw.read_request(reader))
            writer.write(OK)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"cd"

    async with raw_upstream(turn) as upstream:
        await whole(await send(up, upstream, body=pieces()))
        await whole(await send(up, upstream, body=pieces(), headers=(("Content-Length", "4"),)))
        assert got == [b"abcd", b"abcd"]
        assert b"Transfer-Encoding: chunked" in upstream.heads[0]
        assert b"Transfer-Encoding" not in upstream.heads[1]
        assert b"Content-Length: 4\r\n" in upstream.heads[1]


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
async def test_requests_without_a_body(up: AiohttpTransport, method: str) -> None:
    async with raw_upstream(says(OK[:-2] if method == "HEAD" else OK)) as upstream:
        assert await whole(await send(up, upstream, body=None, headers=(), method=method)) in (b"", b"{}")
        assert b"content-" not in upstream.heads[0].lower().replace(b"content-length: 0\r\n", b"")


async def test_redirects_are_not_followed_and_cookies_not_kept(up: AiohttpTransport) -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: /v1/y\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 0\r\n\r\n"
    async with raw_upstream(says(moved, times=2)) as upstream:
        for _ in range(2):
            answer = await send(up, upstream)
            assert (answer.status, await whole(answer)) == (302, b"")
        assert len(upstream.heads) == 2
        assert all(b"cookie" not in head.lower() for head in upstream.heads)


async def test_proxies_of_the_environment_are_not_used(up: AiohttpTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with raw_upstream(says(OK)) as upstream:
        assert (await send(up, upstream)).status == 200


async def test_compressed_bodies_are_not_decoded(up: AiohttpTransport) -> None:
    packed = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope"
    async with raw_upstream(says(packed)) as upstream:
        assert await whole(await send(up, upstream)) == b"nope"


async def test_a_body_arrives_read_by_read(up: AiohttpTransport) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with raw_upstream(says(head, b"2\r\nab\r\n", 0.05, b"1\r\nc\r\n", 0.05, b"0\r\n\r\n")) as upstream:
        answer = await send(up, upstream)
        assert [chunk async for chunk in answer.chunks()] == [b"ab", b"c"]


async def test_data_received_with_the_head_is_ready(up: AiohttpTransport) -> None:
    async with raw_upstream(says(OK, times=2, then="wait")) as upstream:
        answer = await send(up, upstream)
        assert answer.ready() == b"{}"
        answer.close()
        assert (await send(up, upstream)).ready() == b"{}"
        assert upstream.connections == 1  # it was read to its end, so the connection could be used again
    for rest in (b"", b"{"):
        async with raw_upstream(says(OK[:-2] + rest, 0.05, b"{}"[len(rest) :])) as upstream:
            answer = await send(up, upstream)
            assert answer.ready() is None
            assert await whole(answer) == b"{}"
    async with raw_upstream(says(OK[:-1])) as upstream:  # cut
        answer = await send(up, upstream)
        await asyncio.sleep(0.02)
        assert answer.ready() is None
        with pytest.raises(TransportFailure):
            await whole(answer)
        answer.close()


# Connections.


async def test_a_connection_is_reused_after_its_response_was_read(up: AiohttpTransport) -> None:
    async with raw_upstream(says(OK, times=3)) as upstream:
        reused = []
        for _ in range(3):
            connection = ConnectionInfo()
            await whole(await send(up, upstream, connection))
            reused.append(connection.reused)
        assert (upstream.connections, reused) == (1, [False, True, True])


async def test_a_fresh_connection_is_new_despite_idle_ones(up: AiohttpTransport) -> None:
    async with raw_upstream(says(OK, times=3, then="wait")) as upstream:
        await whole(await send(up, upstream))
        connection = ConnectionInfo(fresh=True)
        await whole(await send(up, upstream, connection))
        assert (upstream.connections, connection.reused) == (2, False)


async def test_closing_an_unread_response_closes_the_connection(up: AiohttpTransport) -> None:
    ended = asyncio.Event()

    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
        assert await reader.read() == b""
        ended.set()

    async with raw_upstream(turn) as upstream:
        answer = await send(up, upstream)
        async for _ in answer.chunks():
            break
        answer.close()
        answer.close()
        async with asyncio.timeout(TEST_TIMEOUT):
            await ended.wait()


@pytest.mark.parametrize("answering", [False, True])
async def test_cancelling_ends_the_connection_at_once(up: AiohttpTransport, answering: bool) -> None:
    ended, began = asyncio.Event(), asyncio.Event()

    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.read_request(reader)
        if answering:
            writer.write(b"HTTP/1.1 200 OK\r\n")
        began.set()
        assert await reader.read() == b""
        ended.set()

    async with raw_upstream(turn) as upstream:
        task = asyncio.create_task(send(up, upstream))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(TEST_TIMEOUT):
            await ended.wait()
