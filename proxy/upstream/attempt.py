"""One attempt: prepare the request for an upstream, send it, and classify what came back."""

from __future__ import annotations

import asyncio
from typing import Final

from ..protocol.headers import upstream_headers
from ..protocol.websocket import handshake_headers
from ..system.clock import Clock
from .credentials import Credentials
from .interfaces import ConnectionInfo, UpstreamTransport
from .key_lease import KeyLease
from .keys.pool import KeyPool
from .request import UpstreamRequest
from .response import ResponseInHand, classify_response, response_in_hand
from .result import AttemptResult
from .retry.error_body import masked
from .retry.outcome import OutcomeKind, TransportFailure
from .target import Upstream
from .websocket import REFUSALS

_ACCEPT_ENCODING: Final = frozenset({b"accept-encoding"})
_NONE: Final[frozenset[bytes]] = frozenset()


class AttemptRunner:
    """Makes single attempts. first_byte: seconds to wait for the head of a response; pooled: as in `KeyLeases`."""

    def __init__(
        self,
        transport: UpstreamTransport,
        credentials: Credentials,
        pool: KeyPool,
        clock: Clock,
        first_byte: float,
        pooled: bool,
    ) -> None:
        self._transport = transport
        self._credentials = credentials
        self._pool = pool
        self._clock = clock
        self._first_byte = first_byte
        self._pooled = pooled

    async def run(self, request: UpstreamRequest, lease: KeyLease, upstream: Upstream, fresh: bool) -> AttemptResult:
        """Send once. The lease is settled, unless the result is a good response: then it goes on with that.

        fresh: on a connection that nobody has used before. Raises ProxyError if the client's body cannot be sent.
        """
        clock, log = self._clock, request.attempt_log
        began = clock.monotonic()
        connection = ConnectionInfo(fresh)
        tokens: int | None = None
        kept = may_have_run = False
        try:
            if log.deadline.act_until <= began:
                raise TransportFailure("timeout", "the time for this request is over")
            log.attempts += 1
            log.upstream, log.key = upstream.address.name, lease.key.label
            response = await self._send(request, lease, upstream, connection, began)
            if response.outcome is OutcomeKind.OK:
                kept = True
            else:
                tokens = 0
            return AttemptResult(response, None, response.outcome)
        except TransportFailure as failure:
            if request.body.error is not None:
                raise request.body.error from None
            may_have_run = failure.kind == "timeout"
            return AttemptResult(None, failure.again(), failure.outcome)
        except asyncio.CancelledError:
            may_have_run = True
            raise
        finally:
            log.upstream_ms += (clock.monotonic() - began) * 1000
            log.sent |= connection.connected
            if not kept:
                lease.settle(tokens) if connection.connected else lease.cancel()
                if may_have_run and connection.connected and log.budget_reservation is not None:
                    log.budget_reservation.assume(clock.wall())

    async def _send(
        self,
        request: UpstreamRequest,
        lease: KeyLease,
        upstream: Upstream,
        connection: ConnectionInfo,
        began: float,
    ) -> ResponseInHand:
        """Send, and read what is needed to know the outcome. Raises TransportFailure. began: monotonic seconds."""
        deadline = request.attempt_log.deadline
        body, injected = request.body.for_upstream(upstream)
        headers = self._headers(request, lease, upstream)
        deadline.sending(connection, began + self._first_byte)
        reply = await self._transport.send(
            request.method,
            upstream.provider.url(upstream.address, request.route, request.model),
            headers,
            body,
            first_byte=min(self._first_byte, deadline.at - began),
            connection=connection,
        )
        try:
            if request.model_known:
                self._pool.observe_headers(lease.key, lease.name, reply.headers, self._clock.monotonic(), request.quota)
            response = response_in_hand(reply, upstream, lease, injected, began, request.verbatim)
            upgraded = request.upgrade and reply.headers.get("Upgrade", "").lower() == "websocket"
            if reply.status == 101 and not upgraded:
                raise TransportFailure("invalid", "the upstream changed to another protocol, unasked")
            if request.upgrade and response.status in REFUSALS:
                response.outcome = OutcomeKind.FINAL
            elif response.status >= 400 or not (request.verbatim or response.opaque):
                async with deadline.limit():
                    await classify_response(response, request)
                    response.error = masked(response.error, self._credentials.mask)
            return response
        except TimeoutError:
            reply.close()
            raise TransportFailure("timeout", "the upstream did not answer in time") from None
        except BaseException:
            reply.close()
            raise

    def _headers(self, request: UpstreamRequest, lease: KeyLease, upstream: Upstream) -> list[tuple[str, str]]:
        plain = request.uncompressed or not request.verbatim
        dropped = _ACCEPT_ENCODING if plain else _NONE
        headers = upstream_headers(request.headers, pooled=self._pooled, dropped=dropped)
        if plain:  # the response is read, and compression would hold back the events of a stream
            headers.append(("Accept-Encoding", "identity"))
        credential = self._credentials.headers(lease.key.label, upstream, request.client)
        headers.extend(credential)
        if request.upgrade:
            headers.extend(handshake_headers(request.headers, credential if self._pooled else None))
        if request.body.length is not None:
            headers.append(("Content-Length", str(request.body.length)))
        return headers
