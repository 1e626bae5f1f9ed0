"""How far a request got when it failed: aiohttp's exceptions, and bodies that break (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import aiohttp
import pytest

from proxy.upstream.client import AiohttpTransport
from proxy.upstream.client_errors import transport_failure
from proxy.upstream.interfaces import ConnectionInfo
from proxy.upstream.retry.outcome import TransportFailure
from tests.server.kit import TEST_TIMEOUT, Raw, Say, raw_upstream
from tests.upstream.transport import OK, reset, says, send, whole

# The exception table: (what the upstream does) -> how far the request got.

TABLE: dict[str, tuple[Say, str, bool]] = {
    # -> kind, whether a byte of an answer came
    "closed without a word": (says(), "ambiguous", False),
    "reset without a word": (says(None), "ambiguous", False),
    "silent": (says(5.0), "timeout", False),
    "half a status line": (says(b"HTTP/1.1 2"), "invalid", True),
    "half a status line, then reset": (says(b"HTTP/1.1 2", 0.02, None), "invalid", True),
    "half a head": (says(b"HTTP/1.1 200 OK\r\nContent-Type: a"), "invalid", True),
    "half a head, then silence": (says(b"HTTP/1.1 200 OK\r\nContent-Type: a", 5.0), "timeout", True),
    "not HTTP": (says(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "invalid", True),
    "a bad header": (says(b"HTTP/1.1 200 OK\r\nA b: c\x00\r\n\r\n"), "invalid", True),
    "a header too long": (says(b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000 + b"\r\n\r\n"), "invalid", True),
}


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize(("turn", "kind", "answered"), TABLE.values(), ids=TABLE.keys())
async def test_failures_are_classified_by_progress(
    up: AiohttpTransport, turn: Say, kind: str, answered: bool, method: str
) -> None:
    async with raw_upstream(turn) as upstream:
        connection = ConnectionInfo()
        with pytest.raises(TransportFailure) as caught:
            await send(up, upstream, connection, first_byte=0.2 if kind == "timeout" else 3.0, method=method)
        assert (caught.value.kind, connection.connected, connection.answered) == (kind, True, answered)
        assert upstream.connections == 1  # aiohttp repeats nothing by itself
        assert str(upstream.port) not in caught.value.detail


@pytest.mark.parametrize("how", [(), (None,)], ids=["closed", "reset"])
async def test_a_reused_connection_closed_without_a_response_is_stale(
    up: AiohttpTransport, how: tuple[None, ...]
) -> None:
    """Also for the methods that aiohttp would otherwise send again by itself."""

    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.read_request(reader)
        writer.write(OK)
        await raw.read_request(reader)
        if how:
            reset(writer)

    for method in ("POST", "GET", "HEAD", "PUT", "DELETE"):
        async with raw_upstream(turn) as upstream:
            await whole(await send(up, upstream))
            connection = ConnectionInfo()
            with pytest.raises(TransportFailure) as caught:
                await send(up, upstream, connection, method=method)
            assert (caught.value.kind, connection.reused, connection.answered) == ("stale", True, False)
            assert upstream.connections == 1


async def test_a_reused_connection_that_answers_and_breaks_is_not_stale(up: AiohttpTransport) -> None:
    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await raw.read_request(reader)
        writer.write(OK)
        await raw.read_request(reader)
        writer.write(b"HTTP/1.1 ")

    async with raw_upstream(turn) as upstream:
        await whole(await send(up, upstream))
        with pytest.raises(TransportFailure) as caught:
            await send(up, upstream)
        assert caught.value.kind == "invalid"


async def test_idle_connections_that_were_closed_are_not_used(up: AiohttpTransport) -> None:
    async with raw_upstream(says(OK)) as upstream:
        for connections in (1, 2):
            connection = ConnectionInfo()
            await whole(await send(up, upstream, connection))
            await asyncio.sleep(0.02)
            assert (upstream.connections, connection.reused) == (connections, False)


async def test_a_refused_connection_is_unreached(up: AiohttpTransport) -> None:
    async with raw_upstream(says(OK)) as upstream:
        pass
    connection = ConnectionInfo()
    with pytest.raises(TransportFailure) as caught:
        await send(up, upstream, connection)
    assert (caught.value.kind, connection.connected) == ("unreached", False)
    assert "refused" in caught.value.detail.lower()


@pytest.mark.parametrize("url", ["http://no-such-host.invalid/v1", "http://[::1", "http://127.0.0.1:99999/v1"])
async def test_unresolvable_addresses_are_unreached(up: AiohttpTransport, url: str) -> None:
    connection = ConnectionInfo()
    with pytest.raises(TransportFailure) as caught:
        await up.send("POST", url, [], b"{}", first_byte=3.0, connection=connection)
    assert (caught.value.kind, connection.connected) == ("unreached", False)


async def test_a_server_without_tls_is_unreached(up: AiohttpTransport) -> None:
    async with raw_upstream(says(OK)) as upstream:
        connection = ConnectionInfo()
        with pytest.raises(TransportFailure) as caught:
            await up.send(
                "POST", f"https://127.0.0.1:{upstream.port}/v1", [], b"{}", first_byte=2.0, connection=connection
            )
        assert (caught.value.kind, connection.connected) == ("unreached", False)
        assert upstream.heads == []


async def test_an_untrusted_certificate_is_unreached() -> None:
    """No key is sent to it."""
    key = aiohttp.client_reqrep.ConnectionKey("h", 443, True, True, None, None, None)
    error = aiohttp.ClientConnectorCertificateError(key, ssl.SSLCertVerificationError("sk-secret"))
    failure = transport_failure(error, ConnectionInfo())
    assert failure.kind == "unreached"
    assert "secret" not in failure.detail


@pytest.mark.parametrize(
    ("error", "connection", "kind"),
    [
        (aiohttp.ConnectionTimeoutError("x"), ConnectionInfo(), "unreached"),
        (TimeoutError(), ConnectionInfo(), "unreached"),
        (TimeoutError(), ConnectionInfo(connected=True), "timeout"),
        (aiohttp.InvalidURL("x"), ConnectionInfo(), "unreached"),
        (ValueError("x"), ConnectionInfo(), "unreached"),
        (OSError(24, "Too many open files"), ConnectionInfo(), "unreached"),
        (aiohttp.ServerDisconnectedError(), ConnectionInfo(connected=True), "ambiguous"),
        (aiohttp.ClientOSError(104, "reset"), ConnectionInfo(connected=True), "ambiguous"),
        (aiohttp.ClientOSError(104, "reset"), ConnectionInfo(connected=True, reused=True), "stale"),
        (aiohttp.ClientOSError(104, "reset"), ConnectionInfo(connected=True, reused=True, answered=True), "invalid"),
        (aiohttp.ClientPayloadError(), ConnectionInfo(connected=True), "ambiguous"),
    ],
)
def test_the_table_of_exceptions(error: Exception, connection: ConnectionInfo, kind: str) -> None:
    assert transport_failure(error, connection).kind == kind


def test_every_aiohttp_exception_is_in_the_table() -> None:
    """Whatever its client raises is caught by one of the kinds that `send` names."""
    named = (TimeoutError, aiohttp.ClientError, OSError, ValueError)
    public = [getattr(aiohttp, name) for name in aiohttp.__all__]
    errors = [kind for kind in public if isinstance(kind, type) and issubclass(kind, BaseException)]
    unnamed = {kind for kind in errors if not issubclass(kind, named)}
    others = ("WebSocketError", "WSMessageTypeError", "EofStream", "BadContentDisposition")
    assert not {kind.__name__ for kind in unnamed if not kind.__name__.startswith(others)}


# Bodies that break.

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("turn", "kind", "got"),
    [
        (says(CHUNKED, b"2\r\nab\r\n", 0.02), "invalid", b"ab"),
        (says(CHUNKED, b"2\r\nab\r\n", 0.02, None), "invalid", b"ab"),
        (says(CHUNKED, b"2\r\nab\r\n5\r\nab", 0.02), "invalid", b"abab"),
        (says(CHUNKED, b"2\r\nab\r\n", 0.02, b"zz\r\n"), "invalid", b"ab"),
        (says(CHUNKED, b"2\r\nab\r\n", 5.0), "timeout", b"ab"),
        (says(OK[:-1], 0.02), "invalid", b"{"),
        (says(OK[:-1], 5.0), "timeout", b"{"),
    ],
    ids=["closed", "reset", "inside a chunk", "no chunk", "silent", "short", "short and silent"],
)
async def test_bodies_that_break_off(up: AiohttpTransport, turn: Say, kind: str, got: bytes) -> None:
    async with raw_upstream(turn) as upstream:
        answer = await send(up, upstream)
        seen: list[bytes] = []

        async def read() -> None:
            async with asyncio.timeout(TEST_TIMEOUT):
                async for chunk in answer.chunks():
                    seen.append(chunk)

        with pytest.raises(TransportFailure) as caught:
            await read()
        assert (caught.value.kind, b"".join(seen)) == (kind, got)
        answer.close()


async def test_each_read_has_its_own_timeout(up: AiohttpTransport) -> None:
    """0.2 s of silence are too much, a stream of any length is not."""
    pieces: list[Any] = [piece for _ in range(6) for piece in (0.1, b"1\r\na\r\n")]
    async with raw_upstream(says(CHUNKED, *pieces, b"0\r\n\r\n")) as upstream:
        assert await whole(await send(up, upstream)) == b"aaaaaa"


async def test_silence_before_the_head_is_bounded_by_first_byte_alone(up: AiohttpTransport) -> None:
    async with raw_upstream(says(0.4, OK)) as upstream:
        assert await whole(await send(up, upstream, first_byte=2.0)) == b"{}"


async def test_a_body_without_a_length_ends_with_its_connection(up: AiohttpTransport) -> None:
    """Nobody can see whether it is whole: what it says must tell (the audit)."""
    async with raw_upstream(says(b"HTTP/1.0 200 OK\r\n\r\n", b"abc")) as upstream:
        assert await whole(await send(up, upstream)) == b"abc"


async def test_a_slow_reader_holds_the_upstream_back(up: AiohttpTransport) -> None:
    sent = 0

    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await raw.read_request(reader)
        writer.write(CHUNKED)
        for _ in range(400):
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()
            sent += 65536
        writer.write(b"0\r\n\r\n")

    async with raw_upstream(turn) as upstream:
        answer = await send(up, upstream)
        for _ in range(20):
            before = sent
            await asyncio.sleep(0.02)
            if before == sent:
                break
        assert sent < 16 * 1024 * 1024
        size = 0
        async for chunk in answer.chunks():
            size += len(chunk)
        assert size == 400 * 65536
