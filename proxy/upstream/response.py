"""An upstream's response in hand: what it is, found out with as little reading as possible.

An error is read whole. A stream is read to its first event, which may be an error too: until then no byte has gone to
the client, and everything can be retried. Any other response is not read here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from ..protocol.decompress import DecodingError, Decompressor
from ..protocol.sse import Splitter, begins_stream, data_of
from .deadline import SharedDeadline
from .interfaces import UpstreamResponse
from .key_lease import KeyLease
from .read_ahead import ReadAhead
from .request import UpstreamRequest
from .retry.error_body import NO_ERROR_INFO, ErrorInfo, error_info, stream_error
from .retry.outcome import OutcomeKind, TransportFailure, classify
from .target import Upstream

MAX_ERROR_BODY: Final = 8 * 1024 * 1024
"""An error's body may have at most this many bytes."""

FIRST_EVENT_HELD: Final = 64 * 1024
"""At most this many bytes of a stream are held back until its first event is complete."""

HOLD: Final = 1.0
"""Seconds for which the head of a stream, and comments before its first event, are held back at most."""


@dataclass(slots=True)
class ResponseInHand:
    """An upstream's response in hand.

    injected: the proxy asked for the usage chunk, the client did not. is_stream: it is a stream of events.
    opaque: its encoding is unknown, so that it cannot be read. decoded: `more` is decoded.
    more: what is still to be read. body: an error's body, else None. first: what was read of a stream so far.
    sent_at: monotonic seconds when it was asked for. leaked: it repeats a pool key.
    error: what it says of its error.
    """

    status: int
    response: UpstreamResponse
    upstream: Upstream
    lease: KeyLease
    injected: bool
    is_stream: bool
    opaque: bool
    decoded: bool
    more: AsyncIterator[bytes]
    outcome: OutcomeKind = OutcomeKind.OK
    body: bytes | None = None
    first: list[bytes] = field(default_factory=list)
    sent_at: float = 0.0
    leaked: bool = False
    error: ErrorInfo = NO_ERROR_INFO

    @property
    def is_event_stream(self) -> bool:
        """Whether it is a stream whose events can be read."""
        return self.is_stream and not self.opaque


def response_in_hand(
    reply: UpstreamResponse, upstream: Upstream, lease: KeyLease, injected: bool, sent_at: float, verbatim: bool
) -> ResponseInHand:
    """Return what the head of a response tells.

    verbatim: it is handed on as it comes; only an error's body is read, and so decoded. Otherwise a redirect raises
    TransportFailure(invalid), because none is followed.
    """
    if 300 <= reply.status < 400 and not verbatim:
        raise TransportFailure("invalid", f"the upstream answered with a redirect ({reply.status})")
    encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
    decoded = Decompressor.knows(encoding) and (not verbatim or reply.status >= 400)
    return ResponseInHand(
        status=reply.status,
        response=reply,
        upstream=upstream,
        lease=lease,
        injected=injected,
        is_stream=reply.headers.get("Content-Type", "").lower().startswith("text/event-stream"),
        opaque=not decoded and encoding not in ("", "identity"),
        decoded=decoded,
        more=_chunks_of(reply, encoding, decoded),
        sent_at=sent_at,
    )


def is_framed(reply: UpstreamResponse) -> bool:
    """Whether the framing shows the end of a body, so that a cut is seen (RFC 9112 section 8)."""
    return "Content-Length" in reply.headers or "Transfer-Encoding" in reply.headers


def _chunks_of(reply: UpstreamResponse, encoding: str, decoded: bool) -> AsyncIterator[bytes]:
    if decoded:
        return decoded_chunks(reply.chunks(), encoding)
    if reply.status < 400 and Decompressor.knows(encoding) and not is_framed(reply):
        return _checked_chunks(reply.chunks(), encoding)
    return reply.chunks()


async def classify_response(response: ResponseInHand, request: UpstreamRequest) -> None:
    """Read what is needed to know the outcome. Raises TransportFailure."""
    should_retry = response.response.headers.get("x-should-retry")
    if response.status >= 400:
        response.body = await read_error(response.more)
        response.error = error_info(response.body)
        response.outcome = classify(response.status, response.error, should_retry, endpoint=not request.verbatim)
        return
    if not (response.is_stream or request.stream):
        return
    error = await _first_event(response, request.attempt_log.deadline)
    if error is not None:
        response.error = error[1]
        outcome = classify(*error, should_retry)
        response.outcome = OutcomeKind.OK if outcome is OutcomeKind.FINAL else outcome


async def read_error(chunks: AsyncIterator[bytes]) -> bytes:
    """Return an error's whole body. Raises TransportFailure(invalid) if it is longer than `MAX_ERROR_BODY`."""
    parts, size = [], 0
    async for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ERROR_BODY:
            raise TransportFailure("invalid", "the upstream's error answer is too large")
    return b"".join(parts)


async def decoded_chunks(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """Yield the chunks decompressed. Raises TransportFailure(invalid) if they are broken, cut or too many."""
    decompressor = Decompressor(encoding)
    try:
        async for chunk in chunks:
            out = decompressor.feed(chunk)
            if out:
                yield out
        decompressor.finish()
    except DecodingError as error:
        raise TransportFailure("invalid", f"the upstream's compressed answer {error}") from None


async def _checked_chunks(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """Yield the chunks as they come. Raises TransportFailure(invalid) at the end if they end within compressed data."""
    copy = Decompressor(encoding)
    try:
        async for chunk in chunks:
            copy.feed(chunk)
            yield chunk
        copy.finish()
    except DecodingError as error:
        raise TransportFailure("invalid", f"the upstream's compressed answer {error}") from None


async def _first_event(response: ResponseInHand, deadline: SharedDeadline) -> tuple[int, ErrorInfo] | None:
    """Read into `response.first` up to the first event that carries data. Return the error that it is, if it is one.

    It is read for `HOLD` seconds at most: until then the client has nothing, and everything can be retried. If the
    first bytes are not those of a stream, it is none, whatever its headers say.
    """
    opening = _Opening(response)
    try:
        error = await _in_time(opening)
        if error is None and response.is_stream and not opening.begun:
            response.more = _until_first_event(opening, deadline)
        return error
    except asyncio.CancelledError:
        opening.ahead.cancel()
        raise


async def _in_time(opening: _Opening) -> tuple[int, ErrorInfo] | None:
    """Read to the first event for `HOLD` seconds; then on only until it is known whether it is a stream."""
    try:
        async with asyncio.timeout(HOLD):
            return await opening.read()
    except TimeoutError:
        return await opening.read(until_known=True)


class _Opening:
    """The beginning of a body, up to the first event that carries data if it is a stream."""

    def __init__(self, response: ResponseInHand) -> None:
        self._response = response
        self.ahead = response.more = ReadAhead(response.more)
        self._splitter = Splitter()
        self._held = b""
        self._shape: bool | None = None
        self.begun = False

    async def read(self, until_known: bool = False) -> tuple[int, ErrorInfo] | None:
        """Read into `response.first`. Return the error that the first event is, if it is one.

        until_known: only until it is known whether it is a stream. Raises TransportFailure.
        """
        response = self._response
        while len(self._held) <= FIRST_EVENT_HELD and not (until_known and response.is_stream):
            try:
                chunk = await self.ahead.read()
            except StopAsyncIteration:
                break
            response.first.append(chunk)
            self._held += chunk
            if self._shape is None:
                self._shape = begins_stream(self._held)
                if self._shape is not None:
                    response.is_stream = self._shape
            data = self.first_data(chunk)
            if self._shape is False:
                return None
            if data is not None:
                return stream_error(data)
        if not (self._held or until_known):
            raise TransportFailure("invalid", "the upstream ended its stream before the first event")
        return None

    def first_data(self, chunk: bytes) -> bytes | None:
        """Return the data of the first event that has any, if the chunk completes it."""
        for event in self._splitter.feed(chunk):
            data = data_of(event)
            if data is not None:
                self.begun = True
                return data
        return None


async def _until_first_event(opening: _Opening, deadline: SharedDeadline) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream whose head has gone down. The request's time bounds them up to the first event."""
    while not opening.begun:
        try:
            async with deadline.limit():
                chunk = await opening.ahead.read()
        except TimeoutError:
            raise TransportFailure("timeout", "the upstream did not begin its answer in time") from None
        except StopAsyncIteration:
            return
        yield chunk
        opening.first_data(chunk)
    async for chunk in opening.ahead:
        yield chunk


def refuses_stream_options(response: ResponseInHand) -> bool:
    """Whether an upstream refuses the `stream_options` that the proxy has added."""
    return 400 <= response.status < 500 and response.body is not None and b"stream_options" in response.body
