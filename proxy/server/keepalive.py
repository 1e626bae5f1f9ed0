"""Comments in streams that wait (`server.keepalive`), so that nothing on the way takes them for dead.

A comment is one line: after an event with an `id`, a comment with a blank line would be taken for an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import orjson

from ..cache.lookup import CacheHit
from ..pipeline.coalescing.broadcast import SubscriberStream
from ..pipeline.coalescing.reply import Reply
from ..pipeline.relay import StreamRelay
from ..protocol.errors import ProxyError, envelope
from ..system.clock import spawn
from .responses import StreamingResponse, for_event_stream, raw_lines, status_line

COMMENT: Final = b": keep-alive\n"

Result = CacheHit | Reply | ProxyError


def early_head(date: bytes, request_id: str) -> bytes:
    """Return the head of a stream that begins before its response is there. date: its header line."""
    lines = f"Content-Type: text/event-stream; charset=utf-8\r\nX-Proxy-Request-Id: {request_id}\r\n"
    return status_line(200) + date + raw_lines(for_event_stream([])) + lines.encode()


class Waiting:
    """A request that is answered while its client may get comments. interval: seconds between them."""

    def __init__(self, handling: Coroutine[Any, Any, CacheHit | Reply], interval: float) -> None:
        self._task = spawn(_result(handling), "a stream that waits")
        self._interval = interval

    async def within_interval(self) -> Result | None:
        """Return the result; None if it is not there in time. The request ends if this is cancelled."""
        try:
            await asyncio.wait([self._task], timeout=self._interval)
        except asyncio.CancelledError:
            await self._end()
            raise
        return self._task.result() if self._task.done() else None

    async def comment(self, response: StreamingResponse) -> Result:
        """Write comments until the result is there, and return it. Raises ConnectionResetError."""
        while True:
            try:
                await response.write(COMMENT)
            except BaseException:
                await self._end()
                raise
            result = await self.within_interval()
            if result is not None:
                return result

    async def _end(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        result = None if self._task.cancelled() else self._task.result()
        if isinstance(result, Reply) and result.stream is not None:
            result.stream.client_left()


async def _result(handling: Coroutine[Any, Any, CacheHit | Reply]) -> Result:
    try:
        return await handling
    except ProxyError as error:
        return error


class KeepAlive:
    """Writes a comment into a stream that has had no byte for `interval` seconds, between two events."""

    def __init__(self, response: StreamingResponse, stream: StreamRelay | SubscriberStream, interval: float) -> None:
        self._response = response
        self._stream = stream
        self._interval = interval
        self._writing = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(interval, self._comment)

    async def write(self, data: bytes) -> None:
        """Write as `StreamingResponse.write` does."""
        self._restart()
        self._writing = True
        try:
            await self._response.write(data)
        finally:
            self._writing = False

    def push(self, data: bytes) -> bool:
        """Write as `StreamingResponse.push` does."""
        self._restart()
        return self._response.push(data)

    def close(self) -> None:
        """Write no more comments."""
        self._timer.cancel()

    def _restart(self) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(self._interval, self._comment)

    def _comment(self) -> None:
        self._timer = self._loop.call_later(self._interval, self._comment)
        if not self._writing and self._stream.between_events:
            try:
                self._response.push(COMMENT)
            except ConnectionResetError:
                self.close()


def as_event(status: int, body: bytes) -> bytes:
    """Return a whole response as an event: an error as the SDKs know it, anything else as it is."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if status < 400 and document is not None:
        return b"data: " + orjson.dumps(document) + b"\n\n"
    if isinstance(document, dict) and document.get("error"):
        return b"data: " + orjson.dumps(document) + b"\n\n"
    said = body[:1024].decode("utf-8", "replace")
    return b"data: " + envelope(f"the upstream answered {status}: {said}", "server_error", None, str(status)) + b"\n\n"
