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

from .answered import Answered
from .core.cacheability import StreamAudit
from .core.call import Call
from .core.errors import error_event
from .core.outcome import TransportFailure
from .core.ports import Write
from .core.sse import Splitter, UsageFilter, data_of, is_usage_event
from .seams import spawn

MAX_EVENT: Final = 16 * 1024 * 1024
"""An event longer than this (bytes) is passed on without being looked at: memory is bounded, whatever comes."""


READ_ON: Final = 1.0
"""Seconds for which the end of an upstream's body is waited for when the client hung up at the end of its stream."""


class StreamBroken(Exception):
    """The stream cannot end well: the client's connection is to be aborted, so that nobody takes it for complete."""


@dataclass(slots=True)
class Ending:
    """How a stream ended. whole: storable, else `why` not; failure: the error code where it broke; gone: the client
    left.
    """

    audit: StreamAudit | None
    body: bytes | None = None
    why: str | None = None
    failure: str = ""
    detail: str = ""
    gone: bool = False


@dataclass(slots=True)
class Flow:
    """One stream. comment: gives the cost comment once the usage is known; keep: bytes kept at most for the cache;
    ended: called exactly once, with what is to be settled, priced, stored and recorded."""

    call: Call
    answered: Answered
    audit: StreamAudit | None
    keep: int
    comment: Callable[[StreamAudit], bytes] | None
    ended: Callable[[Ending], None]
    interrupted: str = ""
    _done: bool = False
    _pumped: bool = False
    _kept: list[bytes] | None = None
    _size: int = 0
    _blind: bool = False
    _cost_told: bool = False
    _splitter: Splitter = field(default_factory=Splitter)

    def abandon(self) -> None:
        """The client left before the first byte. After `pump` it does nothing."""
        if not self._pumped:
            self._end(Ending(self.audit, gone=True))

    async def pump(self, write: Write) -> None:
        """Passes the whole stream to `write`. Raises StreamBroken after a failure has been told, or could not be."""
        self._pumped = True
        filter_ = UsageFilter() if self.answered.injected and self.audit is not None else None
        self._kept = [] if self.audit is not None and self.keep else None
        at_boundary = True
        try:
            async for chunk in self._chunks():
                events = self._examine(chunk) if self.audit is not None else []
                if self.comment is not None and self.audit is not None:
                    out = self._commented(events, filter_ is not None)
                    at_boundary = True
                    if self._blind:
                        out, self.comment = out + self._splitter.rest, None
                elif filter_ is not None:
                    out = filter_.feed(chunk)
                    at_boundary = filter_.at_boundary
                else:
                    out = chunk
                    at_boundary = self._splitter.at_boundary
                if self._is_over():
                    # Most SDKs hang up at `[DONE]`, and their next request may follow at once: it is a hit already.
                    self._report(self._ending())
                if out:
                    await write(out)
            if self.audit is not None and not self._blind:
                last = self._splitter.finish()
                self._audit(last)
                rest = self._splitter.rest
                if not self._done and (data_of(rest + b"\n\n") or b"").strip() == b"[DONE]":
                    self.audit.event(rest)  # SDKs take it without its blank line, too
                if not self._done and self.audit.truncated(rest):
                    raise TransportFailure("invalid", "the upstream ended its stream before its end")
                if self.comment is not None:
                    await self._write_last(write, last, rest, filter_ is not None)
            if filter_ is not None and (out := filter_.finish()):
                await write(out)
        except TransportFailure as failure:
            if self._done:  # it broke off after its end: nothing is missing
                self._end(Ending(self.audit))
                return
            # Where the cut falls inside an event, nothing of ours may stand there.
            await self._break(write, failure.code, failure.detail, at_boundary and self._splitter.at_boundary)
        except asyncio.CancelledError:
            if self._done:
                self._read_on()
                raise
            if not self.interrupted:
                self._end(Ending(self.audit, gone=True))
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            await self._break(write, self.interrupted, "the proxy is shutting down", at_boundary)
        except BaseException:
            if self._done:
                self._read_on()
            else:
                self._end(Ending(self.audit, gone=True))
            raise
        else:
            self._end(self._ending())

    def _is_over(self) -> bool:
        return self.audit is not None and self.audit.over and self._splitter.at_boundary and not self._blind

    def _ending(self) -> Ending:
        """The good ending."""
        return Ending(self.audit, b"".join(self._kept) if self._kept is not None else None, self._verdict())

    def _read_on(self) -> None:
        """The client hung up at the end: what little is left is read, so that the connection upstream can be kept."""

        async def rest() -> None:
            try:
                async with asyncio.timeout(READ_ON):
                    async for _ in self.answered.reply.chunks():
                        pass
            except (TimeoutError, TransportFailure):
                pass
            finally:
                self.answered.reply.close()

        spawn(rest(), "read on")

    def _verdict(self) -> str | None:
        if self.audit is None:
            return "uncacheable: opaque"
        return "event too large" if self._blind else self.audit.verdict(self._splitter.rest)

    async def _break(self, write: Write, code: str, detail: str, at_boundary: bool) -> None:
        """Tells the client of a failure after the first byte: an error event where one can stand, then no clean end."""
        told = self.audit is not None and self.audit.error
        self._end(Ending(self.audit, failure=code, detail=detail))
        if at_boundary and self.audit is not None and not self._blind and not told:
            await write(error_event(code, detail))
        raise StreamBroken(detail)

    async def _chunks(self) -> AsyncIterator[bytes]:
        for chunk in self.answered.first:
            yield chunk
        self.answered.first = []
        async for chunk in self.answered.more:
            yield chunk

    def _examine(self, chunk: bytes) -> list[bytes]:
        """Keeps and audits a copy; the events that are complete now."""
        if self._kept is not None:
            self._size += len(chunk)
            if self._size > self.keep:
                self._kept = None
            else:
                self._kept.append(chunk)
        if self._blind:
            return []
        events = self._splitter.feed(chunk)
        self._audit(events)
        if self._splitter.held > MAX_EVENT:
            self._blind, self._kept = True, None
        return events

    def _audit(self, events: list[bytes]) -> None:
        assert self.audit is not None
        for event in events:
            self.audit.event(event)

    def _commented(self, events: list[bytes], strip: bool) -> bytes:
        """Whole events only, the cost comment before `[DONE]`."""
        assert self.comment is not None
        assert self.audit is not None
        out = []
        for event in events:
            if strip and is_usage_event(event):
                continue
            if not self._cost_told and (data_of(event) or b"").strip() == b"[DONE]":
                self._cost_told = True
                out.append(self.comment(self.audit))
            out.append(event)
        return b"".join(out)

    async def _write_last(self, write: Write, events: list[bytes], rest: bytes, strip: bool) -> None:
        """The end of a stream with a cost comment, which goes before a `[DONE]` without its blank line, too."""
        assert self.comment is not None
        assert self.audit is not None
        out = self._commented(events, strip)
        cost = b"" if self._cost_told else self.comment(self.audit)
        out += cost + rest if rest.strip(b"\r\n") else rest + cost
        if out:
            await write(out)

    def _end(self, ending: Ending) -> None:
        self.answered.reply.close()
        self._report(ending)

    def _report(self, ending: Ending) -> None:
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
