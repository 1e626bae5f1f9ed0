"""A request on its way to an upstream as bytes: head, framing, and the body as fast as the upstream takes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final

import aiohttp

from .client_errors import error_name

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler

    from .client import Target

LARGE: Final = 256 * 1024
"""Bytes of a body that are written at once."""

_NO_BODY: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that need no `Content-Length: 0` without a body (RFC 9110 section 8.6)."""


def framing_of(
    method: str, headers: Sequence[tuple[str, str]], body: bytes | AsyncIterator[bytes] | None
) -> tuple[str, bool]:
    """Return the header line that tells a body's length, and whether it is chunked (RFC 9112 section 6)."""
    if isinstance(body, bytes):
        return f"Content-Length: {len(body)}\r\n", False
    if body is None:
        return ("" if method in _NO_BODY else "Content-Length: 0\r\n"), False
    if any(name.lower() == "content-length" for name, _ in headers):
        return "", False
    return "Transfer-Encoding: chunked\r\n", True


def request_head(method: str, target: Target, headers: Sequence[tuple[str, str]], framing: str) -> bytes:
    """Return a request's head. Raises ValueError for a header with a line break.

    The parser and the settings let no line break in: this check is the last one.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
    head = f"{method}{target.start}{lines}{framing}\r\n".encode("utf-8", "surrogateescape")
    if head.count(b"\n") != len(headers) + target.lines + 1 + (framing != ""):
        raise ValueError("a header with a line break")
    return head


class OutgoingRequest:
    """A request on its way out. head: its bytes up to the blank line."""

    __slots__ = ("_body", "_chunked", "_head", "method")

    def __init__(self, method: str, head: bytes, body: bytes | AsyncIterator[bytes] | None, chunked: bool) -> None:
        self.method = method
        self._head = head
        self._body = body
        self._chunked = chunked

    def write(self, protocol: ResponseHandler, transport: asyncio.Transport) -> asyncio.Task[None] | None:
        """Write the request. Return the task that writes its body, if that is streamed or large."""
        head, body = self._head, self._body
        if body is None or (isinstance(body, bytes) and len(body) <= LARGE):
            transport.write(head + body if body else head)
            return None
        transport.write(head)
        pieces = _sliced(body) if isinstance(body, bytes) else body
        return asyncio.get_running_loop().create_task(_write(protocol, pieces, self._chunked))


async def _write(protocol: ResponseHandler, pieces: AsyncIterator[bytes], chunked: bool) -> None:
    """Write a body as fast as the upstream takes it. If it breaks, the wait for the response ends with an error."""
    try:
        async for piece in pieces:
            transport = protocol.transport
            if transport is None or transport.is_closing():
                return
            if piece:
                transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if protocol.writing_paused:
                await protocol._drain_helper()
        if chunked and protocol.transport is not None:
            protocol.transport.write(b"0\r\n\r\n")
    except Exception as error:
        protocol.set_exception(aiohttp.ClientConnectionError(f"the request body broke off ({error_name(error)})"))


async def _sliced(body: bytes) -> AsyncIterator[bytes]:
    """Yield a large body in pieces, so that writing it neither blocks the loop nor doubles it in memory."""
    view = memoryview(body)
    for start in range(0, len(view), LARGE):
        yield bytes(view[start : start + LARGE])
