"""Reads request bodies: in time, within `server.max_body`, and decoded where a client has compressed them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from aiohttp import HttpVersion11
from aiohttp.web import BaseRequest

from ..protocol.decompress import ACCEPTED, Bounds, DecodingError, Decompressor
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..protocol.json_parse import parse_leniently
from ..protocol.routes import printable
from ..system.threads import in_thread_if_large

BODY_TIMEOUT: Final = 30.0
"""Seconds in which a request body must arrive, plus one for each 64 KiB received (docs/security.md)."""

_ANY_RATIO: Final = 64 * 1024
"""A compressed body may decode to so many bytes whatever its own size."""

_JSON: Final = (b"Content-Type", b"application/json")


async def read_json(request: BaseRequest, max_body: int) -> tuple[bytes, Sequence[Raw]]:
    """Return a body that may be compressed, or JSON under another media type, and the headers that fit it.

    What it holds decides, since old clients send no `Content-Type` or that of forms. Raises ProxyError
    (unsupported_media_type, request_too_large, invalid_json).
    """
    headers = request.headers
    raw: Sequence[Raw] = request.raw_headers
    encoding = ", ".join(headers.getall("Content-Encoding", ())).strip().lower()
    if encoding not in ("", "identity") and not Decompressor.knows(encoding):
        message = f"a request body may be compressed with {ACCEPTED}; found {printable(encoding, 80)!r}"
        accepted = (("Accept-Encoding", ACCEPTED),)  # RFC 9110 section 12.5.3
        raise ProxyError("unsupported_media_type", message, param="Content-Encoding", headers=accepted)
    body = await read_body(request, max_body)
    if encoding not in ("", "identity"):
        body = await in_thread_if_large(len(body), decoded, body, encoding, max_body)
        raw = [pair for pair in raw if pair[0].lower() != b"content-encoding"]
    content_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        try:
            await in_thread_if_large(len(body), parse_leniently, body)
        except ValueError:
            message = f"the request body must be JSON, found {printable(content_type, 80)!r}"
            raise ProxyError("unsupported_media_type", message, param="Content-Type") from None
        raw = [*(pair for pair in raw if pair[0].lower() != b"content-type"), _JSON]
    return body, raw


def decoded(body: bytes, encoding: str, max_body: int) -> bytes:
    """Return a compressed body decoded. Raises ProxyError(request_too_large, invalid_json)."""
    decompressor = Decompressor(encoding, Bounds(max_body, _ANY_RATIO))
    try:
        plain = decompressor.feed(body)
        decompressor.finish()
    except DecodingError as error:
        if error.too_large:
            message = f"the request body decodes to more than server.max_body ({max_body} bytes) or 100 times its size"
            raise ProxyError("request_too_large", message, param="Content-Encoding") from None
        message = f"the request body {error} (Content-Encoding: {encoding})"
        raise ProxyError("invalid_json", message, param="Content-Encoding") from None
    return plain


async def read_body(request: BaseRequest, max_body: int) -> bytes:
    """Return the request body. Raises ProxyError(request_too_large), or ConnectionResetError if it is too slow."""
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
    """Return the next piece of a body, b"" at its end. size: bytes received since `began` (loop time).

    Raises ConnectionResetError, and closes the connection, if the body is too slow.
    """
    try:
        async with asyncio.timeout_at(began + BODY_TIMEOUT + size / 65536):
            return await request.content.readany()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the request body was too slow") from None


async def send_continue(request: BaseRequest) -> None:
    """Answer `Expect: 100-continue` before the body is read (RFC 9110 section 10.1.1)."""
    wanted = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    if wanted and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def too_large(limit: int, setting: str = "max_body") -> ProxyError:
    """Return the error for a body of more than `limit` bytes. setting: the one below `server` that says so."""
    return ProxyError("request_too_large", f"the request body is larger than server.{setting} ({limit} bytes)")
