"""An upstream's response in hand: what it is, found out with as little reading as possible.

An error is read whole. A stream is read to its first event, which may be an error too: until then no byte has gone to
the client, and everything can be retried. Any other response is not read here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from ..protocol.decompress import DecodingError, Decompressor
from ..protocol.sse import Splitter, data_of
from .interfaces import UpstreamResponse
from .key_lease import KeyLease
from .retry.error_body import ErrorInfo, error_info, stream_error
from .retry.outcome import OutcomeKind, TransportFailure, classify
from .target import Upstream

MAX_ERROR_BODY: Final = 8 * 1024 * 1024
"""An error's body may have at most this many bytes."""

FIRST_EVENT_HELD: Final = 64 * 1024
"""At most this many bytes of a stream are held back until its first event is complete."""


@dataclass(slots=True)
class ResponseInHand:
    """An upstream's response in hand.

    injected: the proxy asked for the usage chunk, the client did not. is_stream: it is a stream of events.
    opaque: its encoding is unknown, so that it cannot be read. decoded: `more` is decoded.
    more: what is still to be read. body: an error's body, else None. first: what was read of a stream so far.
    sent_at: monotonic seconds when it was asked for. leaked: it repeats a pool key.
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
        more=decoded_chunks(reply.chunks(), encoding) if decoded else reply.chunks(),
        sent_at=sent_at,
    )


async def classify_response(response: ResponseInHand, verbatim: bool) -> None:
    """Read what is needed to know the outcome. Raises TransportFailure. verbatim: as in `response_in_hand`."""
    should_retry = response.response.headers.get("x-should-retry")
    if response.status >= 400:
        response.body = await read_error(response.more)
        response.outcome = classify(response.status, error_info(response.body), should_retry, endpoint=not verbatim)
        return
    error = await _first_event(response)
    if error is not None:
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


async def _first_event(response: ResponseInHand) -> tuple[int, ErrorInfo] | None:
    """Read into `response.first` up to the first event that carries data. Return the error that it is, if it is one."""
    splitter = Splitter()
    held = 0
    async for chunk in response.more:
        response.first.append(chunk)
        held += len(chunk)
        for event in splitter.feed(chunk):
            data = data_of(event)
            if data is not None:
                return stream_error(data)
        if held > FIRST_EVENT_HELD:
            return None
    if not held:
        raise TransportFailure("invalid", "the upstream ended its stream before the first event")
    return None


def refuses_stream_options(response: ResponseInHand) -> bool:
    """Whether an upstream refuses the `stream_options` that the proxy has added."""
    return 400 <= response.status < 500 and response.body is not None and b"stream_options" in response.body
