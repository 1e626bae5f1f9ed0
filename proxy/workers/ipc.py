"""The link between the supervisor and a worker: requests, which are answered, and notifications, which are not."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from ..system.clock import spawn

log = logging.getLogger("proxy")

REQUEST_TIMEOUT: Final = 2.0
"""Seconds that a request waits for its answer."""

Answer = bytes | None
Handle = Callable[[bytes], Answer | Awaitable[Answer]]
"""Handles a request or a notification, whose answer is dropped. Synchronous handlers answer in order of arrival."""


class ConnectionLost(Exception):
    """There is no answer: the other end has gone, is too slow, or failed."""


class _Frame(msgspec.Struct, array_like=True, frozen=True):
    """One message.

    kind: of a request or notification, "" in an answer. number: of the request, 0 in a notification.
    body: None in the answer to a request that failed.
    """

    kind: str
    number: int
    body: bytes | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Frame).decode


class Channel:
    """One end of a link. handlers: by kind; more may be added at any time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handlers: dict[str, Handle] = {}
        self._reader = reader
        self._writer = writer
        self._requests = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._ended = False

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        """Return a channel that owns one end of a socket pair."""
        end.setblocking(False)
        return cls(*await asyncio.open_connection(sock=end))

    def notify(self, kind: str, body: bytes = b"") -> None:
        self._send(_Frame(kind, 0, body))

    async def request(self, kind: str, body: bytes = b"", timeout: float = REQUEST_TIMEOUT) -> bytes:
        """Send a request and return the answer. timeout: seconds. Raises ConnectionLost."""
        if self._ended:
            raise ConnectionLost
        self._requests += 1
        number = self._requests
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(_Frame(kind, number, body))
        try:
            async with asyncio.timeout(timeout):
                return await self._waiting[number]  # in no variable: with an exception that would be a reference cycle
        except TimeoutError:
            raise ConnectionLost from None
        finally:
            del self._waiting[number]

    async def run(self) -> None:
        """Receive messages until the other end closes."""
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4))
                self._receive(_decode(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._ended = True
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ConnectionLost())
            self._writer.close()

    def close(self) -> None:
        self._writer.close()

    async def flush(self) -> None:
        """Wait until the send buffer has room, or the other end has closed."""
        try:
            await self._writer.drain()
        except OSError:
            pass

    def _receive(self, frame: _Frame) -> None:
        if not frame.kind:
            answer = self._waiting.get(frame.number)
            if answer is not None and not answer.done():
                if frame.body is None:
                    answer.set_exception(ConnectionLost())
                else:
                    answer.set_result(frame.body)
            return
        try:
            result = self.handlers[frame.kind](frame.body or b"")
        except Exception:
            log.exception("between workers: %s failed", frame.kind)
            result = None
        if isinstance(result, bytes | None):
            self._answer(frame.number, result)
        else:
            spawn(self._answer_later(frame, result), f"between workers: {frame.kind}")

    async def _answer_later(self, frame: _Frame, answer: Awaitable[Answer]) -> None:
        body = None
        try:
            body = await answer
        finally:
            self._answer(frame.number, body)

    def _answer(self, number: int, body: bytes | None) -> None:
        if number:
            self._send(_Frame("", number, body))

    def _send(self, frame: _Frame) -> None:
        if not self._ended and not self._writer.is_closing():
            data = _encode(frame)
            self._writer.write(len(data).to_bytes(4) + data)
