"""Answers as they go on the wire: ready bytes, one write (PERFORMANCE: a third cheaper than `web.Response`).

aiohttp asks of a response only `prepare`, `write_eof` and `keep_alive`; a test with the pinned aiohttp holds it to
that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final

from aiohttp import HttpVersion10
from aiohttp.web import BaseRequest

from ..pipeline.response_headers import lines_of
from ..protocol.errors import ProxyError, retry_after_headers
from ..protocol.headers import Raw

BODY_TIMEOUT: Final = 30.0
"""Seconds a request body has, and one more for each 64 KiB received (contract 7, Slow and hostile peers)."""

_SMALL: Final = 64 * 1024
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}


def status_line(status: int, reason: str = "") -> bytes:
    return f"HTTP/1.1 {status} {reason or _REASONS.get(status, '')}\r\n".encode("latin-1", "replace")


def raw_lines(headers: Iterable[Raw]) -> bytes:
    return b"".join([name + b": " + value + b"\r\n" for name, value in headers])


class DateHeader:
    """`Date` lines, made once a second (RFC 9110 section 6.6.1)."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._second = -1
        self._line = b""

    def line(self) -> bytes:
        now = int(self._wall())
        if now != self._second:
            self._second = now
            self._line = f"Date: {formatdate(now, usegmt=True)}\r\n".encode()
        return self._line


class FullResponse:
    """An answer in hand. head: status line and headers, without framing and the blank line."""

    __slots__ = ("_body", "_request", "head", "keep_alive", "status")

    def __init__(self, request: BaseRequest, head: bytes, body: bytes, *, status: int, close: bool = False) -> None:
        self._request = request
        self.head = head
        self._body = body
        self.status = status
        self.keep_alive = request.keep_alive and not close

    async def prepare(self, request: BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        request = self._request
        protocol = request.protocol
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        body = self._body
        framing = b""
        if self.status >= 200 and self.status not in (204, 304):
            framing = b"Content-Length: %d\r\n" % len(body)
        else:
            body = b""
        head = self.head + framing + connection_line(request, self.keep_alive) + b"\r\n"
        if request.method == "HEAD":
            body = b""
        if len(body) < _SMALL:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
            await wait_for_drain(protocol)


class StreamedResponse:
    """An answer that has been written by `StreamingResponse` already; aiohttp only keeps the connection."""

    __slots__ = ("keep_alive", "status")

    def __init__(self, keep_alive: bool, status: int) -> None:
        self.keep_alive = keep_alive
        self.status = status

    async def prepare(self, request: BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


class StreamingResponse:
    """Writes an answer piece by piece: chunked (RFC 9112 section 7.1), or bare where length is known or HTTP/1.0.

    Every write waits until the client has taken enough: memory is held by back-pressure.
    """

    __slots__ = ("_bare", "_head", "_protocol", "_request", "_status", "_trailed", "keep_alive", "started")

    def __init__(
        self, request: BaseRequest, head: bytes, status: int, length: int | None = None, trailers: str = ""
    ) -> None:
        """trailers: names of the fields that may follow the last chunk; announced to those who take them."""
        self._request = request
        self._protocol = request.protocol
        self._status = status
        self.started = False
        self._bare = length is not None or request.version == HttpVersion10 or request.method == "HEAD"
        self.keep_alive = request.keep_alive and not (length is None and request.version == HttpVersion10)
        framing = b"" if self._bare else b"Transfer-Encoding: chunked\r\n"
        if length is not None:
            framing = b"Content-Length: %d\r\n" % length
        if status in (204, 304):
            framing, self._bare = b"", True
        self._trailed = bool(trailers) and not self._bare and takes_trailers(request)
        if self._trailed:
            framing += f"Trailer: {trailers}\r\n".encode()
        self._head = head + framing + connection_line(request, self.keep_alive) + b"\r\n"

    async def write(self, data: bytes) -> None:
        """Sends `data` on, and waits until the client has taken enough. Raises ConnectionResetError when it is gone."""
        if not self.push(data):
            await wait_for_drain(self._protocol)

    def push(self, data: bytes) -> bool:
        """Sends `data` on; whether the client takes as much as is written. Raises ConnectionResetError."""
        transport = self._protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        framed = data if self._bare else b"%x\r\n%b\r\n" % (len(data), data)
        if not self.started:
            self.started = True
            framed = self._head + framed if data else self._head
        elif not data:
            framed = b""
        if framed:
            transport.write(framed)
        return not self._protocol.writing_paused

    async def finish(self, trailers: str = "") -> StreamedResponse:
        """The clean end; with the fields announced, where they are wanted (RFC 9112 section 7.1.2)."""
        if not self.started:
            await self.write(b"")
        transport = self._protocol.transport
        if not self._bare and transport is not None and not transport.is_closing():
            transport.write(b"0\r\n%b\r\n" % (trailers.encode() if self._trailed else b""))
        return StreamedResponse(self.keep_alive, self._status)

    def abort(self, at_once: bool = False) -> StreamedResponse:
        """No clean end: what was written is still delivered, unless `at_once`, then the connection closes without the
        last chunk.
        """
        transport = self._protocol.transport
        if transport is not None:
            transport.abort() if at_once else transport.close()
        return StreamedResponse(False, self._status)


async def wait_for_drain(protocol: Any) -> None:
    """Waits while the client takes less than we write."""
    await protocol._drain_helper()


def takes_trailers(request: BaseRequest) -> bool:
    """Whether the client asked for trailer fields (RFC 9110 sections 6.5.1 and 10.1.4)."""
    if "TE" not in request.headers:
        return False
    codings = ",".join(request.headers.getall("TE")).lower().split(",")
    return any(coding.strip() == "trailers" for coding in codings)


def connection_line(request: BaseRequest, keep_alive: bool) -> bytes:
    """RFC 9112 section 9.3: only what differs from the version's default is said."""
    if request.version == HttpVersion10:
        return b"Connection: keep-alive\r\n" if keep_alive else b""
    return b"" if keep_alive else b"Connection: close\r\n"


def error_response(
    request: BaseRequest, refusal: ProxyError, request_id: str, date: bytes, *, close: bool = False
) -> FullResponse:
    """An answer made by the proxy itself, in OpenAI's shape."""
    lines = f"Content-Type: application/json\r\nX-Proxy-Error: {refusal.code}\r\n"
    lines += lines_of(refusal.proxy_headers or (("X-Proxy-Request-Id", request_id),))
    if refusal.should_retry is not None:
        lines += f"X-Should-Retry: {'true' if refusal.should_retry else 'false'}\r\n"
    lines += lines_of(refusal.headers)
    if refusal.retry_after is not None:
        lines += lines_of(retry_after_headers(refusal.retry_after))
    head = status_line(refusal.status) + date + lines.encode("latin-1", "replace")
    return FullResponse(request, head, refusal.body(), status=refusal.status, close=close)


async def read_body(request: BaseRequest, max_body: int) -> bytes:
    """The whole request body. Raises ProxyError(request_too_large); ConnectionResetError where it comes too slowly."""
    content = request.content
    if content.is_eof():
        body = content.read_nowait(-1)
        if len(body) > max_body:
            raise too_large(max_body)
        return body
    length = request.content_length
    if length is not None and length > max_body:
        raise too_large(max_body)
    await send_continue(request)
    parts: list[bytes] = []
    size = 0
    began = asyncio.get_running_loop().time()
    while part := await next_piece(request, began, size):
        parts.append(part)
        size += len(part)
        if size > max_body:
            raise too_large(max_body)
    return b"".join(parts)


async def next_piece(request: BaseRequest, began: float, size: int) -> bytes:
    """The next read of a body of which `size` bytes came since `began` (loop time), b"" at its end.

    Raises ConnectionResetError where it comes too slowly: then the connection is cut.
    """
    try:
        async with asyncio.timeout_at(began + BODY_TIMEOUT + size / 65536):
            return await request.content.readany()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the request body came too slowly") from None


async def send_continue(request: BaseRequest) -> None:
    """Answers `Expect: 100-continue`, now that the body is wanted (RFC 9110 section 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def too_large(max_body: int) -> ProxyError:
    return ProxyError("request_too_large", f"the request body is larger than server.max_body ({max_body} bytes)")
