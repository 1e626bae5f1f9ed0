"""Sending by the real way up to an upstream made of bytes."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from socket import SO_LINGER, SOL_SOCKET

from proxy.upstream.client import AiohttpResponse, AiohttpTransport
from proxy.upstream.interfaces import ConnectionInfo
from tests.server.kit import TEST_TIMEOUT, Raw, Say

OK = b"HTTP/1.1 200 Fine\r\nContent-Type: application/json\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 2\r\n\r\n{}"


async def send(
    transport: AiohttpTransport,
    upstream: Raw,
    connection: ConnectionInfo | None = None,
    body: bytes | AsyncIterator[bytes] | None = b"{}",
    first_byte: float = 2.0,
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),),
    method: str = "POST",
) -> AiohttpResponse:
    url = upstream.url + "/x?a=%2F&b=c"
    return await transport.send(
        method, url, headers, body, first_byte=first_byte, connection=connection or ConnectionInfo()
    )


async def whole(answer: AiohttpResponse) -> bytes:
    async with asyncio.timeout(TEST_TIMEOUT):
        return b"".join([chunk async for chunk in answer.chunks()])


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def says(*pieces: bytes | float | None, then: str = "close", times: int = 1) -> Say:
    """To each of `times` requests on a connection: bytes, pauses; None hangs up by RST."""

    async def turn(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(times):
            await raw.read_request(reader)
            for piece in pieces:
                if piece is None:
                    reset(writer)
                elif isinstance(piece, float):
                    await asyncio.sleep(piece)
                else:
                    writer.write(piece)
                    await writer.drain()
        if then == "wait":
            await reader.read()

    return turn
