"""An upstream's answer in hand: what it is, found out with as little reading as possible.

An error is read whole. A stream is read to its first event, which may be an error, too: until then no byte has gone to
the
client, and everything may still be retried. Any other answer is not read here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from ..protocol.sse import Splitter, data_of
from .decompress import Decompressor
from .interfaces import UpstreamResponse
from .key_lease import KeyLease
from .retry.outcome import ErrorInfo, OutcomeKind, TransportFailure, classify, error_info, stream_error
from .target import Upstream

MAX_ERROR_BODY: Final = 8 * 1024 * 1024
FIRST_EVENT_HELD: Final = 64 * 1024
"""A stream's first bytes are held back at most so far for its first event to be complete."""


@dataclass(slots=True)
class ResponseInHand:
    """An upstream's answer in hand. body: bytes of what was read whole (errors), else None; first: what was read of a
    stream so far, decoded; leaked: it repeats a pool key; more: the rest of the body, decoded; injected: its usage
    chunk was only our wish."""

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
        """Its events can be read: not compressed in a way we do not know."""
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


async def classify_response(answered: ResponseInHand) -> None:
    """Reads what must be read to know the outcome. Raises TransportFailure."""
    should_retry = answered.response.headers.get("x-should-retry")
    if answered.status >= 400:
        answered.body = await read_error(answered.more)
        answered.outcome = classify(answered.status, error_info(answered.body), should_retry)
        return
    error = await _first_event(answered)
    if error is not None:
        outcome = classify(*error, should_retry)
        answered.outcome = OutcomeKind.OK if outcome is OutcomeKind.FINAL else outcome


async def read_error(chunks: AsyncIterator[bytes]) -> bytes:
    """An error's body, whole. Raises TransportFailure(invalid) beyond `MAX_ERROR_BODY`."""
    parts, size = [], 0
    async for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ERROR_BODY:
            raise TransportFailure("invalid", "the upstream's error answer is too large")
    return b"".join(parts)


async def decoded_chunks(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """`chunks`, decompressed piece by piece. Raises TransportFailure(invalid) where they are broken, cut or too
    much.
    """
    inflater = Decompressor(encoding)
    async for chunk in chunks:
        out = inflater.feed(chunk)
        if out:
            yield out
    inflater.finish()


async def _first_event(answered: ResponseInHand) -> tuple[int, ErrorInfo] | None:
    """Reads up to the first event that carries data, into `answered.first`; the error it is, if it is one."""
    splitter = Splitter()
    held = 0
    async for chunk in answered.more:
        answered.first.append(chunk)
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


def refuses_stream_options(answered: ResponseInHand) -> bool:
    """Whether an upstream refuses what we asked for on our own account."""
    return answered.status == 400 and answered.body is not None and b"stream_options" in answered.body
