"""`StreamRelay`: passes a stream on, each read at once; a copy is audited, and stored if it is complete.

The client gets what the upstream sent, with two exceptions: a usage chunk that only the proxy asked for is taken out,
and a cost comment is put in if the client asked for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from ..cache.stream_audit import StreamAudit
from ..protocol.errors import error_event
from ..protocol.sse import Splitter, UsageFilter, data_of, is_usage_event
from ..system.clock import spawn
from ..upstream.interfaces import Write
from ..upstream.response import ResponseInHand, is_framed
from ..upstream.retry.outcome import TransportFailure

MAX_EVENT: Final = 16 * 1024 * 1024
"""A longer event is passed on without being parsed, so that memory is bounded (bytes)."""

SHUTTING_DOWN: Final = "the proxy is shutting down"

READ_ON: Final = 1.0
"""Seconds to wait for the end of the upstream's body if the client hung up at the end of its stream."""


class StreamBroken(Exception):
    """The stream cannot end well: the client's connection is to be aborted, so that the client sees it is incomplete.

    failure: why. at_once: do not wait for what was written already, because the client does not read it.
    """

    def __init__(self, failure: TransportFailure, *, at_once: bool = False) -> None:
        super().__init__(failure.detail)
        self.failure = failure
        self.at_once = at_once


@dataclass(slots=True)
class StreamEnd:
    """How a stream ended.

    body: its bytes, if they may be stored. why: the reason that it must not be stored. failure: the error code if it
    broke. client_left: the client disconnected.
    """

    body: bytes | None = None
    why: str | None = None
    failure: str = ""
    client_left: bool = False


class ClientFilter:
    """What one client gets of a stream.

    strip: the usage chunk is taken out, because only the proxy asked for it.
    comment: returns the cost comment that is put in before the end; None: the client wants none.
    """

    __slots__ = ("_comment", "_commented", "_filter", "_splitter", "_strip")

    def __init__(self, strip: bool, comment: Callable[[], bytes] | None) -> None:
        self._strip = strip
        self._comment = comment
        self._splitter = Splitter() if comment is not None else None
        self._filter = UsageFilter() if strip and comment is None else None
        self._commented = False

    @property
    def raw(self) -> bool:
        """Whether everything is passed on as it comes."""
        return self._filter is None and self._splitter is None

    @property
    def at_boundary(self) -> bool:
        """Whether an event of the proxy's may follow what was passed on so far. If it is `raw`, its source knows."""
        return self._filter is None or self._filter.at_boundary

    def feed(self, chunk: bytes) -> bytes:
        """Return what may be passed on now."""
        if self._filter is not None:
            return self._filter.feed(chunk)
        if self._splitter is None:
            return chunk
        out = self._with_comment(self._splitter.feed(chunk))
        if self._splitter.held > MAX_EVENT:
            out += self._splitter.rest
            self._splitter = None
        return out

    def finish(self) -> bytes:
        """Return the rest. The cost comment also goes before a `[DONE]` that lacks its blank line."""
        if self._filter is not None:
            return self._filter.finish()
        if self._splitter is None:
            return b""
        assert self._comment is not None
        out = self._with_comment(self._splitter.finish())
        rest = self._splitter.rest
        cost = b"" if self._commented else self._comment()
        return out + (cost + rest if rest.strip(b"\r\n") else rest + cost)

    def _with_comment(self, events: list[bytes]) -> bytes:
        """Return whole events, with the cost comment before `[DONE]`."""
        assert self._comment is not None
        out = []
        for event in events:
            if self._strip and is_usage_event(event):
                continue
            if not self._commented and (data_of(event) or b"").strip() == b"[DONE]":
                self._commented = True
                out.append(self._comment())
            out.append(event)
        return b"".join(out)


def _nothing() -> None:
    """Count no reads."""


@dataclass(slots=True)
class StreamRelay:
    """One stream.

    keep: the number of bytes kept for the cache, at most. client_filter: what the client gets of it.
    ended: is called exactly once, at the end. read: is called at each read of what follows the first event.
    quiet: no error event is written, because the subscribers of a `Broadcast` each write their own.
    watch: is called with each event that can be read.
    interrupted: the error code to end with if the task is cancelled; "": the client has left.
    """

    response: ResponseInHand
    audit: StreamAudit | None
    keep: int
    client_filter: ClientFilter
    ended: Callable[[StreamEnd], None]
    quiet: bool = False
    read: Callable[[], None] = _nothing
    watch: Callable[[bytes], None] | None = None
    interrupted: str = ""
    _done: bool = False
    _cancelled: bool = False
    _started: bool = False
    _kept: list[bytes] | None = None
    _size: int = 0
    _blind: bool = False
    _splitter: Splitter = field(default_factory=Splitter)

    def client_left(self) -> None:
        """End a stream whose client left before the first byte. After `relay` has begun it does nothing."""
        if not self._started:
            self._end(StreamEnd(client_left=True))

    def cancel(self) -> None:
        """End the stream now, because no client wants it any more; unless it is at its end already."""
        if not self._done:
            self._cancelled = True
            self._end(StreamEnd(client_left=True))

    async def relay(self, write: Write) -> None:
        """Pass the whole stream to `write`. Raises StreamBroken after a failure, when it has written an error event."""
        self._started = True
        self._kept = [] if self.audit is not None and self.keep else None
        feed = self.client_filter.feed
        try:
            async for chunk in self._chunks():
                if self.audit is not None:
                    self._examine(chunk)
                out = feed(chunk)
                if self.over:
                    # Most SDKs hang up at `[DONE]`, and their next request may follow at once: it is a hit already.
                    self._report(self._ending())
                if out:
                    await write(out)
            if self.audit is not None and not self._blind:
                self._audit(self._splitter.finish())
                rest = self._splitter.rest
                if not self._done and (data_of(rest + b"\n\n") or b"").strip() == b"[DONE]":
                    self.audit.event(rest)  # SDKs take it without its blank line, too
                if not (self._done or is_framed(self.response.response)) and self.audit.truncated(rest):
                    raise TransportFailure("invalid", "the upstream ended its stream before its end")
            if out := self.client_filter.finish():
                await write(out)
        except TransportFailure as failure:
            if self._done:  # it broke off after its end: nothing is missing
                self._end(StreamEnd())
                return
            # If it broke inside an event, no other event may be written.
            at_boundary = self._splitter.at_boundary and self.client_filter.at_boundary
            await self._break(write, failure.code, failure, at_boundary)
        except asyncio.CancelledError:
            if self._done:
                self._read_on()
                raise
            if not self.interrupted:
                self._end(StreamEnd(client_left=True))
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            at_boundary = self._splitter.at_boundary if self.client_filter.raw else self.client_filter.at_boundary
            await self._break(write, self.interrupted, TransportFailure("invalid", SHUTTING_DOWN), at_boundary)
        except BaseException:
            if self._done:
                self._read_on()
            else:
                self._end(StreamEnd(client_left=True))
            raise
        else:
            self._end(self._ending())

    @property
    def over(self) -> bool:
        """Whether the stream has come to its last event."""
        return self.audit is not None and self.audit.ended and self._splitter.at_boundary and not self._blind

    @property
    def between_events(self) -> bool:
        """Whether a comment may follow what was passed on so far."""
        return self.open_for_error and not self.over and self.client_filter.at_boundary

    @property
    def open_for_error(self) -> bool:
        """Whether an error event may follow what came so far, and the upstream has not sent one itself."""
        return self.audit is not None and not self.audit.error and not self._blind and self._splitter.at_boundary

    def _ending(self) -> StreamEnd:
        """Return how a stream ended that is complete."""
        return StreamEnd(b"".join(self._kept) if self._kept is not None else None, self._why_not_stored())

    def _read_on(self) -> None:
        """Read what little is left after a client hung up at the end, so that the upstream connection can be kept."""
        if self._cancelled:
            return

        async def rest() -> None:
            try:
                async with asyncio.timeout(READ_ON):
                    async for _ in self.response.response.chunks():
                        pass
            except (TimeoutError, TransportFailure):
                pass
            finally:
                self.response.response.close()

        spawn(rest(), "read on")

    def _why_not_stored(self) -> str | None:
        if self.audit is None:
            return "uncacheable: opaque"
        return "event too large" if self._blind else self.audit.reason_not_stored(self._splitter.rest)

    async def _break(self, write: Write, code: str, failure: TransportFailure, at_boundary: bool) -> None:
        """Report a failure after the first byte: an error event if one may be written, then no clean end."""
        reported = self.audit is not None and self.audit.error
        self._end(StreamEnd(failure=code))
        if at_boundary and self.audit is not None and not self._blind and not reported and not self.quiet:
            await write(error_event(code, failure.detail))
        raise StreamBroken(failure)

    async def _chunks(self) -> AsyncIterator[bytes]:
        for chunk in self.response.first:
            yield chunk
        self.response.first = []
        async for chunk in self.response.more:
            self.read()
            yield chunk

    def _examine(self, chunk: bytes) -> None:
        """Keep and audit a copy."""
        if self._kept is not None:
            self._size += len(chunk)
            if self._size > self.keep:
                self._kept = None
            else:
                self._kept.append(chunk)
        if self._blind:
            return
        self._audit(self._splitter.feed(chunk))
        if self._splitter.held > MAX_EVENT:
            self._blind, self._kept = True, None

    def _audit(self, events: list[bytes]) -> None:
        assert self.audit is not None
        for event in events:
            self.audit.event(event)
            if self.watch is not None:
                self.watch(event)

    def _end(self, ending: StreamEnd) -> None:
        self.response.response.close()
        self._report(ending)

    def _report(self, ending: StreamEnd) -> None:
        if not self._done:
            self._done = True
            self.ended(ending)


def with_comment(body: bytes, comment: bytes) -> bytes:
    """Return a stored stream with the cost comment before its `[DONE]`, or at its end."""
    for end in (b"data: [DONE]", b"data:[DONE]"):
        at = body.rfind(end)
        if at == 0 or (at > 0 and body[at - 1] in b"\r\n"):  # elsewhere it is part of what the model said
            return body[:at] + comment + body[at:]
    return body + comment
