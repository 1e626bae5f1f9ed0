"""Responses and bodies on the wire: framing, persistence, slow clients (RFC 9112; docs/security.md)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.web import BaseRequest

import proxy.server.request_body
from proxy.protocol.errors import ProxyError
from proxy.server.request_body import read_body
from proxy.server.responses import (
    DateHeader,
    FullResponse,
    StreamingResponse,
    connection_line,
    error_response,
    status_line,
)
from tests.server.kit import Answer, RawConnection, chunked, raw_connection, request, served, until

pytestmark = pytest.mark.slow

HEAD = status_line(200, "Fine") + b"Content-Type: text/plain\r\n"


async def get(line: RawConnection, method: str = "GET", version: str = "1.1", connection: str = "") -> Answer:
    headers = [("Connection", connection)] if connection else []
    line.send(request(method, "/", headers=headers, version=version))
    return await line.answer(head=method == "HEAD")


def whole(body: bytes = b"hello", status: int = 200, **more: Any) -> Any:
    async def handler(request: BaseRequest) -> FullResponse:
        return FullResponse(request, status_line(status) + b"X-Ours: 1\r\n", body, status=status, **more)

    return handler


# --- full responses ---------------------------------------------------------------------------------------------------


async def test_a_full_response_has_a_length_and_keeps_the_connection() -> None:
    async with served(whole()) as port, raw_connection(port) as line:
        for _ in range(2):
            answer = await get(line)
            assert (answer.version, answer.status, answer.reason) == ("HTTP/1.1", 200, "OK")
            assert answer.headers == [("X-Ours", "1"), ("Content-Length", "5")]
            assert (answer.body, answer.whole) == (b"hello", True)


async def test_a_response_to_head_has_the_length_and_no_body() -> None:
    async with served(whole()) as port, raw_connection(port) as line:
        answer = await get(line, "HEAD")
        assert answer.get("Content-Length") == "5"
        assert (await get(line)).body == b"hello"  # nothing was left in between


@pytest.mark.parametrize("status", [204, 304])
async def test_a_204_has_no_framing(status: int) -> None:
    """A length is an error here, and a body would be read as the next response (RFC 9110 section 8.6, RFC 9112 6.3)."""
    async with served(whole(b"must not be seen", status)) as port, raw_connection(port) as line:
        for _ in range(2):
            answer = await get(line)
            assert (answer.status, answer.headers) == (status, [("X-Ours", "1")])


@pytest.mark.parametrize(
    ("version", "connection", "said", "kept"),
    [
        ("1.1", "", None, True),
        ("1.1", "keep-alive", None, True),
        ("1.1", "close", "close", False),
        ("1.0", "", None, False),
        ("1.0", "close", None, False),
        ("1.0", "keep-alive", "keep-alive", True),
    ],
)
async def test_the_client_decides_whether_the_connection_persists(
    version: str, connection: str, said: str | None, kept: bool
) -> None:
    async with served(whole()) as port, raw_connection(port) as line:
        answer = await get(line, version=version, connection=connection)
        assert answer.body == b"hello"
        assert answer.get("Connection") == said
        if kept:
            assert (await get(line)).status == 200
        else:
            assert await line.ended() == b""


async def test_a_response_that_ends_the_connection_has_connection_close() -> None:
    async with served(whole(close=True)) as port, raw_connection(port) as line:
        assert (await get(line)).get("Connection") == "close"
        assert await line.ended() == b""


async def test_a_large_response_arrives_complete() -> None:
    body = bytes(range(256)) * 20_000
    async with served(whole(body)) as port, raw_connection(port) as line:
        assert (await get(line)).body == body
        assert (await get(line)).body == body


async def test_pipelined_requests_are_answered_in_order() -> None:
    async def echo(request: BaseRequest) -> FullResponse:
        return FullResponse(request, HEAD, request.raw_path.encode(), status=200)

    async with served(echo) as port, raw_connection(port) as line:
        line.send(b"".join(request("GET", f"/{n}") for n in range(5)))
        assert [(await line.answer()).body for _ in range(5)] == [b"/0", b"/1", b"/2", b"/3", b"/4"]


async def test_nothing_is_written_to_a_client_that_is_gone() -> None:
    seen: list[str] = []

    async def handler(request: BaseRequest) -> FullResponse:
        assert request.transport is not None
        request.transport.abort()
        answer = FullResponse(request, HEAD, b"x", status=200)
        for write in (answer.write_eof(), StreamingResponse(request, HEAD, 200).write(b"x")):
            with pytest.raises(ConnectionResetError):
                await write
            seen.append("refused")
        return answer

    async with served(handler) as port, raw_connection(port) as line:
        line.send(request("GET", "/"))
        assert await line.ended() == b""
    assert seen == ["refused", "refused"]


# --- streams ----------------------------------------------------------------------------------------------------------


def stream(*pieces: bytes, length: int | None = None, status: int = 200, clean: bool = True) -> Any:
    async def handler(request: BaseRequest) -> Any:
        out = StreamingResponse(request, status_line(status) + b"X-Ours: 1\r\n", status, length)
        for piece in pieces:
            await out.write(piece)
        return await out.finish() if clean else out.abort()

    return handler


async def test_a_stream_is_chunked_piece_by_piece() -> None:
    async with served(stream(b"a", b"", b"bc", b"x" * 100_000)) as port, raw_connection(port) as line:
        for _ in range(2):
            answer = await get(line)
            assert answer.chunks == [b"a", b"bc", b"x" * 100_000]
            assert (answer.framing, answer.whole, answer.get("Connection")) == ("chunked", True, None)


async def test_a_stream_of_known_length_is_not_chunked() -> None:
    async with served(stream(b"ab", b"cd", length=4)) as port, raw_connection(port) as line:
        for _ in range(2):
            answer = await get(line)
            assert (answer.framing, answer.body) == ("length", b"abcd")


async def test_an_empty_stream() -> None:
    async with served(stream()) as port, raw_connection(port) as line:
        for _ in range(2):
            answer = await get(line)
            assert (answer.framing, answer.body, answer.whole) == ("chunked", b"", True)
    async with served(stream(length=0)) as port, raw_connection(port) as line:
        assert (await get(line)).get("Content-Length") == "0"


@pytest.mark.parametrize("connection", ["", "keep-alive"])
async def test_a_stream_to_http_1_0_is_not_chunked(connection: str) -> None:
    """The end of the connection is the end of the response, so it closes even if the client asks to keep it."""
    async with served(stream(b"ab", b"cd")) as port, raw_connection(port) as line:
        answer = await get(line, version="1.0", connection=connection)
        assert (answer.framing, answer.body) == ("close", b"abcd")
        assert answer.get("Connection") is None
    async with served(stream(b"ab", b"cd", length=4)) as port, raw_connection(port) as line:
        answer = await get(line, version="1.0", connection="keep-alive")
        assert (answer.framing, answer.get("Connection")) == ("length", "keep-alive")
        assert (await get(line)).status == 200


@pytest.mark.parametrize("length", [None, 4])
async def test_a_stream_to_head_sends_the_head_only(length: int | None) -> None:
    async with served(stream(length=length)) as port, raw_connection(port) as line:
        answer = await get(line, "HEAD")
        assert answer.get("Content-Length") == (None if length is None else "4")
        assert (await get(line, "HEAD")).status == 200


@pytest.mark.parametrize("length", [None, 0])
async def test_a_204_stream_has_no_framing(length: int | None) -> None:
    async with served(stream(status=204, length=length)) as port, raw_connection(port) as line:
        for _ in range(2):
            assert (await get(line)).headers == [("X-Ours", "1")]


@pytest.mark.parametrize(("length", "framing"), [(None, "chunked"), (9, "length")])
async def test_an_aborted_stream_has_no_clean_end(length: int | None, framing: str) -> None:
    """The client gets what was written, but neither the last chunk nor the rest of the length.

    There is no `Connection: close`, because Node's fetch would then take the cut for the end of the response.
    """
    async with served(stream(b"ab", b"cd", length=length, clean=False)) as port, raw_connection(port) as line:
        answer = await get(line)
        assert (answer.framing, answer.whole, answer.body) == (framing, False, b"abcd")
        assert answer.get("Connection") is None
        assert await line.ended() == b""


async def test_connection_close_on_a_stream_only_where_the_client_asked() -> None:
    async with served(stream(b"ab")) as port, raw_connection(port) as line:
        answer = await get(line, connection="close")
        assert (answer.get("Connection"), answer.body, answer.whole) == ("close", b"ab", True)
        assert await line.ended() == b""


async def test_a_slow_reader_holds_the_writer_back() -> None:
    written = 0

    async def handler(request: BaseRequest) -> Any:
        nonlocal written
        out = StreamingResponse(request, HEAD, 200)
        for _ in range(600):
            await out.write(b"x" * 65_536)
            written += 65_536
        return await out.finish()

    async with served(handler) as port, raw_connection(port) as line:
        line.send(request("GET", "/"))
        for _ in range(20):
            before = written
            await asyncio.sleep(0.02)
            if before == written:
                break
        assert 0 < written < 20 * 1024 * 1024  # what the system's buffers take, and no more
        answer = await line.answer()
        assert (len(answer.body), answer.whole) == (600 * 65_536, True)


# --- request bodies ---------------------------------------------------------------------------------------------------


def reading(limit: int = 1000) -> Any:
    async def handler(request: BaseRequest) -> FullResponse:
        try:
            body = await read_body(request, limit)
        except ProxyError as refusal:
            return error_response(request, refusal, "id-1", b"", close=True)
        return FullResponse(request, HEAD, body, status=200)

    return handler


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
async def test_a_body_up_to_the_limit_is_read(size: int) -> None:
    async with served(reading()) as port, raw_connection(port) as line:
        for framed in (request(body=b"x" * size), request(headers=[("Transfer-Encoding", "chunked")])):
            line.send(framed if b"chunked" not in framed else framed + chunked(*[b"x"] * size))
            assert (await line.answer()).body == b"x" * size


@pytest.mark.parametrize("delay", [0.0, 0.01])
async def test_a_body_beyond_the_limit_is_refused(delay: float) -> None:
    async with served(reading()) as port:
        for framed in (
            request(headers=[("Content-Length", "1001")]),
            request(headers=[("Transfer-Encoding", "chunked")]),
        ):
            async with raw_connection(port) as line:
                line.send(framed)
                await asyncio.sleep(delay)
                line.send(chunked(b"x" * 1002) if b"chunked" in framed else b"x" * 1001)
                answer = await line.answer()
                assert (answer.status, answer.error, answer.get("Connection")) == (413, "request_too_large", "close")
                assert await line.ended() == b""


async def test_a_buffered_body_beyond_the_limit_is_refused() -> None:
    async with served(reading(10)) as port, raw_connection(port) as line:
        line.send(request(body=b"x" * 11))
        assert (await line.answer()).error == "request_too_large"


async def test_an_announced_body_too_large_is_refused_before_it_is_sent() -> None:
    async with served(reading()) as port, raw_connection(port) as line:
        line.send(request(headers=[("Content-Length", str(10**12)), ("Expect", "100-continue")]))
        assert (await line.answer()).status == 413  # and not 100


async def test_expect_100_continue_is_answered() -> None:
    async with served(reading()) as port, raw_connection(port) as line:
        line.send(request(headers=[("Content-Length", "5"), ("Expect", "100-Continue")]))
        answer = await line.answer()
        assert (answer.version, answer.status, answer.headers) == ("HTTP/1.1", 100, [])
        line.send(b"hello")
        assert (await line.answer()).body == b"hello"


async def test_no_100_continue_if_the_body_has_arrived() -> None:
    async with served(reading()) as port, raw_connection(port) as line:
        line.send(request(body=b"hello", headers=[("Expect", "100-continue")]))
        answer = await line.answer()
        assert (answer.status, answer.body) == (200, b"hello")


async def test_a_body_sent_too_slowly_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.server.request_body, "BODY_TIMEOUT", 0.5)
    async with served(reading()) as port, raw_connection(port) as line:
        line.send(request(headers=[("Content-Length", "100")]) + b"x" * 50)
        assert await line.silent(0.05)
        assert await line.ended() == b""  # no answer: the client does not keep to the protocol


async def test_each_64_kib_received_extends_the_body_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.server.request_body, "BODY_TIMEOUT", 0.05)
    async with served(reading(10**6)) as port, raw_connection(port) as line:
        line.send(request(headers=[("Content-Length", "65537")]) + b"x" * 65_536)
        await asyncio.sleep(0.2)
        line.send(b"x")
        assert len((await line.answer()).body) == 65_537


async def test_a_client_that_leaves_while_sending_ends_the_read() -> None:
    errors: list[BaseException] = []

    async def handler(request: BaseRequest) -> FullResponse:
        try:
            body = await read_body(request, 1000)
        except BaseException as error:
            errors.append(error)
            raise
        return FullResponse(request, HEAD, body, status=200)

    async with served(handler) as port:
        async with raw_connection(port) as line:
            line.send(request(headers=[("Content-Length", "100")]) + b"x" * 50)
            await asyncio.sleep(0.02)
            await line.gone()
        await until(lambda: errors)
    assert len(errors) == 1
    assert not isinstance(errors[0], ProxyError)


# --- other ------------------------------------------------------------------------------------------------------------


def test_the_date_header_is_rendered_once_a_second() -> None:
    now = 1_790_000_000.2
    dates = DateHeader(lambda: now)
    first = dates.line()
    assert first == b"Date: Mon, 21 Sep 2026 14:13:20 GMT\r\n"
    assert dates.line() is first
    now += 1
    assert dates.line() == b"Date: Mon, 21 Sep 2026 14:13:21 GMT\r\n"


@pytest.mark.parametrize(
    ("status", "reason", "line"),
    [
        (200, "", b"HTTP/1.1 200 OK\r\n"),
        (200, "Très bien", "HTTP/1.1 200 Très bien\r\n".encode("latin-1")),
        (529, "", b"HTTP/1.1 529 \r\n"),
        (200, "好", b"HTTP/1.1 200 ?\r\n"),
    ],
)
def test_status_lines(status: int, reason: str, line: bytes) -> None:
    assert status_line(status, reason) == line


async def test_an_error_response_on_the_wire() -> None:
    async def handler(request: BaseRequest) -> FullResponse:
        refusal = ProxyError(
            "throttled", "no room; “soon”", retry_after=1.2345, should_retry=True, headers=(("X-More", "yes"),)
        )
        return error_response(request, refusal, "id-1", b"Date: now\r\n")

    async with served(handler) as port, raw_connection(port) as line:
        answer = await get(line)
        assert (answer.status, answer.error) == (429, "throttled")
        assert answer.headers == [
            ("Date", "now"),
            ("Content-Type", "application/json"),
            ("X-Proxy-Error", "throttled"),
            ("X-Proxy-Request-Id", "id-1"),
            ("X-Should-Retry", "true"),
            ("X-More", "yes"),
            ("Retry-After", "2"),
            ("retry-after-ms", "1235"),
            ("Content-Length", answer.get("Content-Length")),
        ]
        assert answer.json()["error"]["message"] == "no room; “soon”"


async def test_connection_headers_are_sent_only_if_they_differ_from_the_default() -> None:
    seen = []

    async def handler(request: BaseRequest) -> FullResponse:
        seen.extend([connection_line(request, True), connection_line(request, False)])
        return FullResponse(request, HEAD, b"", status=200)

    async with served(handler) as port:
        for version in ("1.1", "1.0"):
            async with raw_connection(port) as line:
                await get(line, version=version)
    assert seen == [b"", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b""]
