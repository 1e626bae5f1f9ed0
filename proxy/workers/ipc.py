"""The wire between the parent and a worker: frames both ways; a call gets an answer, a note does not."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from ..system.clock import spawn

log = logging.getLogger("proxy")

PATIENCE: Final = 2.0
"""Seconds a call waits for its answer."""

Answer = bytes | None
Handle = Callable[[bytes], Answer | Awaitable[Answer]]
"""Answers a call, or takes a note (its answer is dropped). What answers at once is answered in the order it came."""


class ConnectionLost(Exception):
    """No answer: the other end is gone, too slow, or failed."""


class _Frame(msgspec.Struct, array_like=True, frozen=True):
    """kind: of a call or a note, "" in an answer; number: of the call, 0 in a note; body: None: it failed."""

    kind: str
    number: int
    body: bytes | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Frame).decode


class Channel:
    """One end. handlers: by kind; may be added to at any time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handlers: dict[str, Handle] = {}
        self._reader = reader
        self._writer = writer
        self._calls = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._ended = False

    @classmethod
    async def over(cls, end: socket.socket) -> Channel:
        """Over one end of a socket pair, which is the channel's from now on."""
        end.setblocking(False)
        return cls(*await asyncio.open_connection(sock=end))

    def notify(self, kind: str, body: bytes = b"") -> None:
        self._send(_Frame(kind, 0, body))

    async def request(self, kind: str, body: bytes = b"", patience: float = PATIENCE) -> bytes:
        """What the other end answers. Raises ConnectionLost."""
        if self._ended:
            raise ConnectionLost
        self._calls += 1
        number = self._calls
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(_Frame(kind, number, body))
        try:
            async with asyncio.timeout(patience):
                return await self._waiting[number]  # from no variable: its error would hold this frame, and be held
        except TimeoutError:
            raise ConnectionLost from None
        finally:
            del self._waiting[number]

    async def run(self) -> None:
        """Serves the other end until it is gone."""
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4))
                self._take(_decode(await self._reader.readexactly(size)))
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
        """Returns when what was sent is on its way, or the other end is gone."""
        try:
            await self._writer.drain()
        except OSError:
            pass

    def _take(self, frame: _Frame) -> None:
        if not frame.kind:
            answer = self._waiting.get(frame.number)
            if answer is not None and not answer.done():
                if frame.body is None:
                    answer.set_exception(ConnectionLost())
                else:
                    answer.set_result(frame.body)
            return
        try:
            found = self.handlers[frame.kind](frame.body or b"")
        except Exception:
            log.exception("between workers: %s failed", frame.kind)
            found = None
        if isinstance(found, bytes | None):
            self._answer(frame.number, found)
        else:
            spawn(self._later(frame, found), f"between workers: {frame.kind}")

    async def _later(self, frame: _Frame, found: Awaitable[Answer]) -> None:
        body = None
        try:
            body = await found
        finally:
            self._answer(frame.number, body)

    def _answer(self, number: int, body: bytes | None) -> None:
        if number:
            self._send(_Frame("", number, body))

    def _send(self, frame: _Frame) -> None:
        if not self._ended and not self._writer.is_closing():
            data = _encode(frame)
            self._writer.write(len(data).to_bytes(4) + data)
