"""A WebSocket on its way through: bytes from each side go to the other as they come, with back-pressure.

Frames are not read. Only their headers are followed, so that a Close frame of the proxy's comes between two of them.
"""

from __future__ import annotations

import asyncio
from typing import Final

from ..protocol.websocket import GOING_AWAY, FrameBoundaries, close_frame
from ..system.clock import spawn
from .interfaces import SwitchedConnection

CLOSE_TIMEOUT: Final = 10.0
"""Seconds that one side may still send after the other has ended its own half of the connection."""

REFUSALS: Final = frozenset({400, 404, 405, 426, 501})
"""Beside any status below 400, what an upstream answers to a handshake if it speaks no WebSocket there."""


class _Direction:
    """One direction: what `source` receives goes to `sink`. `over` is called when nothing more will come."""

    def __init__(self, source: SwitchedConnection, sink: SwitchedConnection, masked: bool, over: asyncio.Event) -> None:
        """masked: frames of this direction come from the client."""
        self._source = source
        self._sink = sink
        self._masked = masked
        self._over = over
        self._frames = FrameBoundaries()
        self._waiting: asyncio.Task[None] | None = None
        self.ended = False
        self.broken = False

    # What aiohttp's protocols and the proxy's own call.

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Pass on what came; if the other side takes less, read no more until it has taken that."""
        transport = self._sink.transport
        if self.ended or transport is None or transport.is_closing():
            return False, b""
        self._frames.feed(data)
        transport.write(data)
        if self._sink.writing_paused and self._waiting is None:
            self._source.pause_reading()
            self._waiting = spawn(self._until_taken(), "websocket")
        return False, b""

    def feed_eof(self) -> None:
        """The source sends no more: say so to the sink."""
        if self.ended:
            return
        self.ended = True
        self._over.set()
        transport = self._sink.transport
        if transport is not None and not transport.is_closing():
            transport.write_eof() if transport.can_write_eof() else transport.close()

    def keeps_open(self) -> bool:
        """The source has ended its half. Return whether it may still be written to (TLS has no halves)."""
        self.feed_eof()
        transport = self._source.transport
        return transport is not None and transport.can_write_eof()

    def connection_lost(self, error: BaseException | None) -> None:
        self.broken |= error is not None and not self.ended
        self.feed_eof()

    # What `Tunnel` calls.

    async def _until_taken(self) -> None:
        try:
            await self._sink._drain_helper()
        except ConnectionError:
            pass
        self._waiting = None
        self._source.resume_reading()

    def go_away(self) -> None:
        """End it with a Close frame, unless a frame is under way: then the end of the connection must do."""
        transport = self._sink.transport
        if self._frames.between_frames and not self.ended and transport is not None and not transport.is_closing():
            transport.write(close_frame(GOING_AWAY, self._masked))
        self.ended = True

    def stop(self) -> None:
        self.ended = True
        if self._waiting is not None:
            self._waiting.cancel()


class Tunnel:
    """Carries the bytes of one WebSocket. interrupted: why the proxy ends it, '' while it does not."""

    def __init__(self, client: SwitchedConnection, upstream: SwitchedConnection) -> None:
        self._client = client
        self._upstream = upstream
        self._over = asyncio.Event()
        self._up = _Direction(client, upstream, True, self._over)
        self._down = _Direction(upstream, client, False, self._over)
        self.interrupted = ""

    @property
    def client_broke(self) -> bool:
        """Whether the client's connection was cut."""
        return self._up.broken

    @property
    def upstream_broke(self) -> bool:
        """Whether the upstream's connection was cut."""
        return self._down.broken

    async def run(self) -> None:
        """Carry bytes until both sides have ended, or one has and the other does not follow within `CLOSE_TIMEOUT`."""
        try:
            self._upstream.set_parser(self._down, None)
            self._client.set_parser(self._up, None)
            await self._over.wait()
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._rest()
            except TimeoutError:
                pass
        except asyncio.CancelledError:
            if not self.interrupted:
                raise
            self._up.go_away()
            self._down.go_away()
        finally:
            self._up.stop()
            self._down.stop()

    async def _rest(self) -> None:
        while not (self._up.ended and self._down.ended):
            self._over.clear()
            await self._over.wait()
