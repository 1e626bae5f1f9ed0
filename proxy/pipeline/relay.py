"""A streamed answer on its way down: every read goes on at once, a copy is audited, and only a whole one is kept.

What the client gets differs from what came in two cases only: a usage chunk that nobody but the proxy asked for is
taken
out, and a cost comment is put in where asked for (contract 6 and 7, Streams).
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
from ..upstream.response import ResponseInHand
from ..upstream.retry.outcome import TransportFailure

MAX_EVENT: Final = 16 * 1024 * 1024
"""An event longer than this (bytes) is passed on without being looked at: memory is bounded, whatever comes."""


SHUTTING_DOWN: Final = "the proxy is shutting down"

READ_ON: Final = 1.0
"""Seconds for which the end of an upstream's body is waited for when the client hung up at the end of its stream."""


class StreamBroken(Exception):
    """The stream cannot end well: the client's connection is to be aborted, so that nobody takes it for complete.

    failure: why; at_once: what was written already is not waited for, because the client does not take it.
    """

    def __init__(self, failure: TransportFailure, *, at_once: bool = False) -> None:
        super().__init__(failure.detail)
        self.failure = failure
        self.at_once = at_once


@dataclass(slots=True)
class StreamEnd:
    """How a stream ended. whole: storable, else `why` not; failure: the error code where it broke; gone: the client
    left.
    """

    body: bytes | None = None
    why: str | None = None
    failure: str = ""
    client_left: bool = False


class ClientFilter:
    """What one client gets of a stream. strip: less the usage chunk, which only the proxy asked for; comment: gives the
    cost comment that it wants before the end."""

    __slots__ = ("_comment", "_filter", "_splitter", "_strip", "_told")

    def __init__(self, strip: bool, comment: Callable[[], bytes] | None) -> None:
        self._strip = strip
        self._comment = comment
        self._splitter = Splitter() if comment is not None else None
        self._filter = UsageFilter() if strip and comment is None else None
        self._told = False

    @property
    def raw(self) -> bool:
        """Everything goes on as it comes."""
        return self._filter is None and self._splitter is None

    @property
    def at_boundary(self) -> bool:
        """Whether an event of ours may follow what was given so far. Where it is `raw`, its source knows."""
        return self._filter is None or self._filter.at_boundary

    def feed(self, chunk: bytes) -> bytes:
        """What of it may go on now."""
        if self._filter is not None:
            return self._filter.feed(chunk)
        if self._splitter is None:
            return chunk
        out = self._commented(self._splitter.feed(chunk))
        if self._splitter.held > MAX_EVENT:
            out += self._splitter.rest
            self._splitter = None
        return out

    def finish(self) -> bytes:
        """The last of it; the cost comment goes before a `[DONE]` without its blank line, too."""
        if self._filter is not None:
            return self._filter.finish()
        if self._splitter is None:
            return b""
        assert self._comment is not None
        out = self._commented(self._splitter.finish())
        rest = self._splitter.rest
        cost = b"" if self._told else self._comment()
        return out + (cost + rest if rest.strip(b"\r\n") else rest + cost)

    def _commented(self, events: list[bytes]) -> bytes:
        """Whole events only, the cost comment before `[DONE]`."""
        assert self._comment is not None
        out = []
        for event in events:
            if self._strip and is_usage_event(event):
                continue
            if not self._told and (data_of(event) or b"").strip() == b"[DONE]":
                self._told = True
                out.append(self._comment())
            out.append(event)
        return b"".join(out)


def _nothing() -> None:
    """Nobody counts the reads."""


@dataclass(slots=True)
class StreamRelay:
    """One stream. dress: what the client gets of it; keep: bytes kept at most for the cache; ended: called exactly
    once, with what is to be settled, priced, stored and recorded; quiet: a failure is told to nobody here, because
    those who read (`reel`) are told of it where they are; read: called at each read of what follows the
    first event."""

    answered: ResponseInHand
    audit: StreamAudit | None
    keep: int
    client_filter: ClientFilter
    ended: Callable[[StreamEnd], None]
    quiet: bool = False
    read: Callable[[], None] = _nothing
    interrupted: str = ""
    _done: bool = False
    _dropped: bool = False
    _pumped: bool = False
    _kept: list[bytes] | None = None
    _size: int = 0
    _blind: bool = False
    _splitter: Splitter = field(default_factory=Splitter)

    def client_left(self) -> None:
        """The client left before the first byte. After `pump` it does nothing."""
        if not self._pumped:
            self._end(StreamEnd(client_left=True))

    def cancel(self) -> None:
        """Nobody wants it any more: it ends now, whoever pumps; unless it is at its end already."""
        if not self._done:
            self._dropped = True
            self._end(StreamEnd(client_left=True))

    async def relay(self, write: Write) -> None:
        """Passes the whole stream to `write`. Raises StreamBroken after a failure has been told, or could not be."""
        self._pumped = True
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
                if not self._done and self.audit.truncated(rest):
                    raise TransportFailure("invalid", "the upstream ended its stream before its end")
            if out := self.client_filter.finish():
                await write(out)
        except TransportFailure as failure:
            if self._done:  # it broke off after its end: nothing is missing
                self._end(StreamEnd())
                return
            # Where the cut falls inside an event, nothing of ours may stand there.
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
        """All was said that such a stream has to say."""
        return self.audit is not None and self.audit.ended and self._splitter.at_boundary and not self._blind

    @property
    def open_for_error(self) -> bool:
        """Whether an event of ours may follow what came so far, and has not been told by the upstream itself."""
        return self.audit is not None and not self.audit.error and not self._blind and self._splitter.at_boundary

    def _ending(self) -> StreamEnd:
        """The good ending."""
        return StreamEnd(b"".join(self._kept) if self._kept is not None else None, self._verdict())

    def _read_on(self) -> None:
        """The client hung up at the end: what little is left is read, so that the connection upstream can be kept."""
        if self._dropped:
            return

        async def rest() -> None:
            try:
                async with asyncio.timeout(READ_ON):
                    async for _ in self.answered.response.chunks():
                        pass
            except (TimeoutError, TransportFailure):
                pass
            finally:
                self.answered.response.close()

        spawn(rest(), "read on")

    def _verdict(self) -> str | None:
        if self.audit is None:
            return "uncacheable: opaque"
        return "event too large" if self._blind else self.audit.reason_not_stored(self._splitter.rest)

    async def _break(self, write: Write, code: str, failure: TransportFailure, at_boundary: bool) -> None:
        """Tells the client of a failure after the first byte: an error event where one can stand, then no clean end."""
        told = self.audit is not None and self.audit.error
        self._end(StreamEnd(failure=code))
        if at_boundary and self.audit is not None and not self._blind and not told and not self.quiet:
            await write(error_event(code, failure.detail))
        raise StreamBroken(failure)

    async def _chunks(self) -> AsyncIterator[bytes]:
        for chunk in self.answered.first:
            yield chunk
        self.answered.first = []
        async for chunk in self.answered.more:
            self.read()
            yield chunk

    def _examine(self, chunk: bytes) -> None:
        """Keeps and audits a copy."""
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

    def _end(self, ending: StreamEnd) -> None:
        self.answered.response.close()
        self._report(ending)

    def _report(self, ending: StreamEnd) -> None:
        if not self._done:
            self._done = True
            self.ended(ending)


def with_comment(body: bytes, comment: bytes) -> bytes:
    """A stored stream with the cost comment before its `[DONE]`, or at its end."""
    for end in (b"data: [DONE]", b"data:[DONE]"):
        at = body.rfind(end)
        if at == 0 or (at > 0 and body[at - 1] in b"\r\n"):  # elsewhere it is part of what the model said
            return body[:at] + comment + body[at:]
    return body + comment
