"""The listening side: slow clients, bytes that are not HTTP, and clients that disconnect (docs/security.md)."""

from __future__ import annotations

import asyncio
import gzip
import logging

import pytest
from aiohttp.web import BaseRequest, ServerRunner, SockSite

import proxy.server.connections
from proxy.server.connections import ListeningServer
from proxy.server.listeners import bind
from proxy.server.request_body import read_body
from proxy.server.responses import FullResponse, status_line
from tests.server.kit import TEST_TIMEOUT, chunked, raw_connection, request, served, until

pytestmark = pytest.mark.slow

OK = status_line(200)


async def echo(request: BaseRequest) -> FullResponse:
    body = await read_body(request, 10**6)
    return FullResponse(request, OK, request.raw_path.encode() + b" " + body, status=200)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the header timeout to 0.1 s."""
    monkeypatch.setattr(proxy.server.connections, "HEADER_TIMEOUT", 0.1)


# --- slow headers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"P", b"POST / HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nHost: x\r\n\r"])
@pytest.mark.usefixtures("hurried")
async def test_a_header_not_complete_in_time_closes_the_connection(sent: bytes) -> None:
    async with served(echo) as port, raw_connection(port) as line:
        line.send(sent)
        assert await line.ended() == b""


@pytest.mark.usefixtures("hurried")
async def test_a_dripping_header_does_not_extend_the_header_timeout() -> None:
    async with served(echo) as port, raw_connection(port) as line:
        for byte in b"GET /" + b"x" * 500:
            line.send(bytes([byte]))
            await asyncio.sleep(0.01)
            if line.reader.at_eof() or line.reader.exception() is not None:  # what is sent after the end may reset it
                break
        else:
            pytest.fail("it may drip as long as it likes")
        assert await line.ended() == b""


async def test_a_header_in_pieces_is_read_if_in_time() -> None:
    async with served(echo) as port, raw_connection(port) as line:
        for byte in request("GET", "/a"):
            line.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await line.answer()).body == b"/a "


@pytest.mark.usefixtures("hurried")
async def test_the_header_timeout_begins_with_the_first_byte() -> None:
    """An idle connection is kept; the timeout of the next header starts with its first byte."""
    async with served(echo) as port, raw_connection(port) as line:
        for _ in range(2):
            line.send(request("GET", "/a"))
            assert (await line.answer()).status == 200
            assert await line.silent(0.2)
        line.send(b"GET /b HTT")
        assert await line.ended() == b""


@pytest.mark.usefixtures("hurried")
async def test_the_header_timeout_does_not_apply_to_bodies_and_responses() -> None:
    async def slow(request: BaseRequest) -> FullResponse:
        await asyncio.sleep(0.2)
        return await echo(request)

    async with served(slow) as port, raw_connection(port) as line:
        line.send(request(headers=[("Content-Length", "4")]) + b"ab")
        await asyncio.sleep(0.25)
        line.send(b"cd")
        assert (await line.answer()).body.endswith(b"abcd")


async def test_slow_clients_delay_no_other() -> None:
    async with served(echo) as port:
        idlers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in idlers:
            writer.write(b"GET / HT")
        async with raw_connection(port) as line:
            line.send(request("GET", "/a"))
            assert (await line.answer()).status == 200
        for _, writer in idlers:
            writer.close()
            await writer.wait_closed()


# --- invalid HTTP -----------------------------------------------------------------------------------------------------

BAD = {
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "HTTP/3": b"GET / HTTP/3.0\r\nHost: x\r\n\r\n",
    "a bad method": b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "an unknown method": b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a null byte": b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00sk-secret\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a signed length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na",
    "a negative length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\na",
    "length and chunks": b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, sk-secret\r\n\r\n0\r\n\r\n",
    "a long line": b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 80_000 + b"\r\n\r\n",
    "very many headers": b"GET / HTTP/1.1\r\nHost: x\r\n"
    + b"".join(b"A%d: b\r\n" % n for n in range(100_000))
    + b"\r\n",
}


@pytest.mark.parametrize("sent", BAD.values(), ids=BAD.keys())
async def test_invalid_http_is_a_400_in_openais_shape(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The response is 400 without a traceback and without bytes of the request, and the connection closes."""
    caplog.set_level(logging.DEBUG)
    async with served(echo) as port, raw_connection(port) as line:
        line.send(sent)
        answer = await line.answer()
        assert (answer.status, answer.error, answer.get("Connection")) == (400, "bad_request", "close")
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.get("X-Should-Retry") == "false"
        assert answer.get("X-Proxy-Request-Id")
        assert b"secret" not in answer.body
        assert await line.ended() == b""
        async with raw_connection(port) as other:
            other.send(request("GET", "/a"))
            assert (await other.answer()).status == 200
    assert "Traceback" not in caplog.text
    assert "secret" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]


@pytest.mark.parametrize("after", [b"zz\r\n", b"5\r\nhelloXX", b"-1\r\n", b"5 5\r\nhello\r\n"])
async def test_invalid_chunks_end_the_connection(after: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """An invalid first chunk is invalid HTTP; after a valid one the connection closes without waiting for the rest."""
    caplog.set_level(logging.DEBUG)
    head = request(headers=[("Transfer-Encoding", "chunked")])
    async with served(echo) as port, raw_connection(port) as line, raw_connection(port) as other:
        line.send(head + after)
        assert (await line.answer()).error == "bad_request"
        other.send(head + b"3\r\nabc\r\n")
        await asyncio.sleep(0.01)
        other.send(after)
        assert await other.ended() == b""
    assert "Traceback" not in caplog.text


async def test_valid_requests_before_an_invalid_one_are_answered() -> None:
    async with served(echo) as port, raw_connection(port) as line:
        line.send(request("GET", "/a"))
        assert (await line.answer()).body == b"/a "
        line.send(b"\x00\x01\r\n\r\n")
        assert (await line.answer()).error == "bad_request"


async def test_an_exception_in_the_handler_is_a_500() -> None:
    async def fails(request: BaseRequest) -> FullResponse:
        raise RuntimeError("sk-secret")

    async with served(fails) as port, raw_connection(port) as line:
        line.send(request("GET", "/"))
        answer = await line.answer()
        assert (answer.status, answer.error, answer.get("Connection")) == (500, "internal_error", "close")
        assert b"secret" not in answer.body


async def test_request_bodies_are_not_decompressed() -> None:
    """A compressed body is refused by its header before it is decoded, so it cannot be a compression bomb."""
    packed = gzip.compress(b"hello")
    async with served(echo) as port, raw_connection(port) as line:
        line.send(request(body=packed, headers=[("Content-Encoding", "gzip")]))
        assert (await line.answer()).body.endswith(packed)


async def test_a_client_that_leaves_cancels_its_handler() -> None:
    result = asyncio.Event()
    began = asyncio.Event()

    async def waits(request: BaseRequest) -> FullResponse:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            result.set()
            raise
        raise AssertionError

    async with served(waits) as port:
        async with raw_connection(port) as line:
            line.send(request("GET", "/"))
            await began.wait()
            await line.gone()
        async with asyncio.timeout(TEST_TIMEOUT):
            await result.wait()


async def test_a_thousand_pipelined_requests_are_answered_in_order() -> None:
    """A client sends a thousand requests at once and reads late; all are answered in order."""
    async with served(echo) as port, raw_connection(port) as line:
        line.send(b"".join(request("GET", f"/{n}") for n in range(1000)))
        await asyncio.sleep(0.05)
        for n in range(1000):
            assert (await line.answer()).body == b"/%d " % n


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_that_is_on_its_way_is_read_while_the_proxy_stops(framing: str) -> None:
    pieces = [b"a" * 100_000, b"b" * 100_000]
    runner = ServerRunner(ListeningServer(echo), handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    listener = bind("127.0.0.1", 0)
    await SockSite(runner, listener).start()
    async with raw_connection(listener.getsockname()[1]) as line:
        if framing == "length":
            sent, header = pieces, ("Content-Length", "200000")
        else:
            whole = chunked(*pieces)
            sent, header = [whole[:100_005], whole[100_005:]], ("Transfer-Encoding", "chunked")
        line.send(request(target="/a", headers=[header]) + sent[0])
        server = runner.server
        assert server is not None
        await until(lambda: any(one._current_request is not None for one in server.connections))
        await line.writer.drain()
        server.pre_shutdown()
        line.send(sent[1])
        answer = await line.answer()
        assert answer.body == b"/a " + b"".join(pieces)
        assert await line.ended() == b""
    await runner.cleanup()
