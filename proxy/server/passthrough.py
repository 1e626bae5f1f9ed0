"""Every other `/v1/…` route: passed through in both directions, never cached.

A request is sent once: another key or a retry is possible only while no byte of it has gone up, or for GET and HEAD.
A route that names stored objects uses one fixed key, because the objects belong to the account of the key that made
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import lru_cache, partial

from aiohttp.web import BaseRequest

from ..accounting.receipt import Receipt
from ..pipeline.response_headers import Pairs, Timing, cache_status, lines_of
from ..protocol.errors import ProxyError
from ..protocol.headers import downstream_headers
from ..protocol.options import Options
from ..protocol.request import Client
from ..protocol.routes import Route
from ..protocol.traceparent import traceparent
from ..services import Services
from ..upstream.deadline import SharedDeadline
from ..upstream.keys.lease import KeyRequest, UpstreamKey, by_priority
from ..upstream.keys.object_owners import UNPINNED
from ..upstream.keys.response_watch import ResponseWatch
from ..upstream.limits.clients import ClientReservation, check_passthrough
from ..upstream.progress import AttemptLog
from ..upstream.request import Body, UpstreamRequest
from ..upstream.reservations import Reservations
from ..upstream.response import ResponseInHand
from ..upstream.retry.outcome import TransportFailure
from ..upstream.sender import RetryingSender
from ..upstream.target import Upstream
from .passed_objects import PassedObjects
from .request_parser import time_limits
from .responses import (
    FullResponse,
    StreamedResponse,
    StreamingResponse,
    next_piece,
    raw_lines,
    read_body,
    send_continue,
    status_line,
    too_large,
)

_REASON = "uncacheable: route"

SMALL = 1024 * 1024
"""A JSON body of up to this many bytes is searched for ids of stored objects before it is sent."""


class PassthroughHandler:
    """Passes requests through. `observe` takes each one's receipt."""

    def __init__(
        self,
        services: Services,
        sender: RetryingSender,
        reservations: Reservations,
        observe: Callable[[Receipt], None],
    ) -> None:
        self._services = services
        self._sender = sender
        self._reservations = reservations
        self._observe = observe
        keys = services.pool.keys
        azure = tuple([key for key in keys if services.upstreams[key.upstream].address.kind == "azure"])
        self._groups, self._azure_groups = by_priority(keys), by_priority(azure or keys)
        self._objects = PassedObjects(services)

    async def forward(
        self, request: BaseRequest, route: Route, client: Client, options: Options, extra: bytes
    ) -> FullResponse | StreamedResponse:
        """Serve one request to its end. extra: further header lines of the response. Raises ProxyError."""
        services = self._services
        if services.replays:
            raise ProxyError("not_cached", "replay: this route is never cached, and nothing is sent upstream")
        check_passthrough(client, request.method, route.segment)
        services.budgets.check_passthrough(client, request.method, route.segment)
        if options.only_if_cached:
            raise ProxyError("not_cached", "this route is never cached, and only-if-cached asks for no other")
        limit = services.settings.server.max_body
        length = request.content_length
        if length is not None and length > limit:
            raise too_large(limit)
        passed = PassedRequest(services, request, route, client, options)
        try:
            passed.reservation = await self.reserve(client)
            response = await self._send(request, route, client, options, passed)
        except ProxyError as error:
            self.finish(passed, error.status, error.code)
            error.proxy_headers = passed.headers()
            raise
        except asyncio.CancelledError:
            self.finish(passed, 499, "client_gone")
            raise
        if response.body is not None:
            return self.error_response(request, passed, response, response.body, extra)
        watch = self._objects.watch(request.method, route, client, passed.pinned, response)
        return await self._stream(request, passed, response, extra, watch)

    # -- up -----------------------------------------------------------------------------------------------------------

    async def _send(
        self, request: BaseRequest, route: Route, client: Client, options: Options, passed: PassedRequest
    ) -> ResponseInHand:
        """Return the response to give. Raises ProxyError."""
        body = _Upload(request, self._services.settings.server.max_body)
        pinned_to = await self._pinned_to(route, client, body, passed)
        return await self._sender.send(
            UpstreamRequest(
                method=request.method,
                route=route,
                headers=request.raw_headers,
                body=body,
                model="",
                client=client,
                attempt_log=passed.log,
                max_wait=passed.max_wait,
                key_request=KeyRequest(pinned_to=pinned_to, groups=self.key_groups(route)),
                max_retries=options.max_retries,
                quota=self._sender.leases.quota(client),
                repeatable=request.method in ("GET", "HEAD") and not request.body_exists,
                verbatim=True,
            )
        )

    async def reserve(self, client: Client) -> ClientReservation | None:
        """Reserve one request in the client's limits. Raises ProxyError."""
        return await self._reservations.client(client, 0)

    def key_groups(self, route: Route) -> tuple[tuple[UpstreamKey, ...], ...]:
        """Return the keys that may serve a request without a known model, by priority."""
        return self._groups if route.shape == "openai" else self._azure_groups

    async def _pinned_to(self, route: Route, client: Client, body: _Upload, passed: PassedRequest) -> str:
        """Return the label of the only key that may serve; "" for any. Raises ProxyError(object_not_found).

        It is the key that made an object which the target or a small JSON body names, else, on a stateful route, the
        fixed one.
        """
        if not self._objects.matter(client):
            return ""
        passed.pinned = await self._objects.pin(route, await body.small_json(), client, partial(self._fixed, route))
        key = self._fixed(route) if route.stateful and not passed.pinned.key else None
        return passed.pinned.key if key is None else key.label

    def _fixed(self, route: Route) -> UpstreamKey | None:
        """Return the key for objects that nobody knows."""
        keys = sorted((key for group in self.key_groups(route) for key in group), key=self._services.pool.keys.index)
        return self._services.pool.fixed_key("", self._services.clock.monotonic(), keys)

    # -- down ---------------------------------------------------------------------------------------------------------

    def head(self, passed: PassedRequest, response: ResponseInHand) -> bytes:
        """Return the status line and the headers of a response, without framing."""
        services = self._services
        reply = response.response
        headers = downstream_headers(reply.raw_headers, pooled=not services.passthrough, decoded=response.decoded)
        headers = [(name, services.masker.mask(value)) for name, value in headers]
        retries = passed.log.retry_headers()
        if retries:
            headers = [(name, value) for name, value in headers if name.lower() != b"x-should-retry"]
        lines = lines_of((*passed.headers(), ("X-Proxy-Cost-Status", "unknown"), *retries))
        return status_line(reply.status, reply.reason) + raw_lines(headers) + lines.encode("latin-1", "replace")

    def error_response(
        self, request: BaseRequest, passed: PassedRequest, response: ResponseInHand, body: bytes, extra: bytes
    ) -> FullResponse:
        """Return the upstream's error response, whose whole body is `body`."""
        response.response.close()
        error = "no_usable_key" if passed.log.no_usable_key else f"upstream_{response.status}"
        self.finish(passed, response.status, error)
        head = self.head(passed, response) + extra
        return FullResponse(request, head, self._services.masker.mask(body), status=response.status)

    async def _stream(
        self,
        request: BaseRequest,
        passed: PassedRequest,
        response: ResponseInHand,
        extra: bytes,
        watch: ResponseWatch | None,
    ) -> StreamedResponse:
        length = response.response.headers.get("Content-Length")
        known = int(length) if length is not None and length.isascii() and length.isdigit() else None
        stream = StreamingResponse(request, self.head(passed, response) + extra, response.status, known)
        passed.first_byte_ms = passed.elapsed_ms()
        status, error = response.status, ""
        try:
            if request.method != "HEAD":
                async for chunk in response.more:
                    if watch is not None:
                        watch.feed(chunk)  # before the client has it and asks for the object
                    await stream.write(chunk)
            if watch is not None:
                watch.finish()
            return await stream.finish()
        except TransportFailure as failure:
            error = failure.code
            if not stream.started:
                proxy_error = failure.proxy_error()
                status = proxy_error.status
                raise proxy_error.copy(passed.headers()) from None
            return stream.abort()
        except BaseException:
            status, error = 499, "client_gone"
            raise
        finally:
            response.response.close()
            response.lease.settle(0)
            self.finish(passed, status, error)

    def finish(self, passed: PassedRequest, status: int, error: str) -> None:
        """End what is reserved, and write the receipt. error: as in `PassedRequest.receipt`."""
        if passed.reservation is not None:
            passed.reservation.settle(0) if passed.log.sent else passed.reservation.cancel()
        self._observe(passed.receipt(status, error))


@lru_cache(16)
def _cache_headers(reason: str) -> Pairs:
    """Return the headers that say why the cache was not used. reason: one of a few constants."""
    return (
        ("X-Proxy-Cache", "bypass"),
        ("X-Proxy-Cache-Reason", reason),
        ("Cache-Status", cache_status("bypass", reason, False)),
    )


class PassedRequest:
    """One request that is passed through: what its response headers and its receipt say."""

    def __init__(
        self,
        services: Services,
        request: BaseRequest,
        route: Route,
        client: Client,
        options: Options,
        reason: str = _REASON,
    ) -> None:
        """reason: why it is not cached."""
        self._services = services
        self._reason = reason
        self.model = ""
        self._clock = services.clock
        self._began = services.clock.monotonic()
        self._endpoint = route.segment
        self._client = client
        self._headers = request.raw_headers
        limits = time_limits(services.settings, options, request, self._began)
        self.max_wait = limits.max_wait
        self.id = services.clock.new_id()
        self.log = AttemptLog(SharedDeadline(limits.deadline, services.clock.monotonic, limits.act_until))
        self.first_byte_ms: float | None = None
        self.reservation: ClientReservation | None = None
        self.pinned = UNPINNED

    def elapsed_ms(self) -> float:
        """Return the milliseconds since the request came."""
        return (self._clock.monotonic() - self._began) * 1000

    def headers(self) -> Pairs:
        """Return the proxy's own headers of the response."""
        elapsed = self.elapsed_ms()
        timing = Timing(0.0, elapsed, elapsed)
        return (
            ("X-Proxy-Request-Id", self.id),
            *_cache_headers(self._reason),
            *self.log.upstream_headers(),
            *self._services.clients.headers(self._client, self._clock.monotonic()),
            ("X-Proxy-Attempts", str(self.log.attempts)),
            ("Server-Timing", timing.header()),
        )

    def receipt(self, status: int, error: str) -> Receipt:
        """Return the receipt. error: a code of the proxy's, or `upstream_STATUS`; "": none."""
        return Receipt(
            id=self.id,
            client=self._client.name,
            endpoint=self._endpoint,
            model=self.model,
            status=status,
            cache="bypass",
            finished_at=self._clock.wall(),
            reason=self._reason,
            upstream=self.log.upstream,
            key=self.log.key,
            attempts=self.log.attempts,
            error=error,
            upstream_ms=self.elapsed_ms(),
            total_ms=self.elapsed_ms(),
            first_byte_ms=self.first_byte_ms,
            traceparent=traceparent(self._headers),
        )


class _Upload:
    """The request body on its way up, counted and timed. limit: bytes that it may have at most."""

    def __init__(self, request: BaseRequest, limit: int) -> None:
        self._request = request
        self._limit = limit
        self._exists = request.body_exists
        self._too_large = False
        self._read: bytes | None = None
        self.length = request.content_length if self._exists else None

    @property
    def error(self) -> ProxyError | None:
        return too_large(self._limit) if self._too_large else None

    async def small_json(self) -> bytes | None:
        """Return the whole body if it is JSON and small enough to be read before it is sent."""
        kind = self._request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if not self.length or self.length > SMALL or kind != "application/json":
            return None
        self._read, self.length = await read_body(self._request, self._limit), None  # bytes tell their own length
        return self._read

    def for_upstream(self, upstream: Upstream) -> tuple[Body, bool]:
        if self._read is not None:
            return self._read, False
        return self._pieces() if self._exists else None, False

    def without_usage(self, upstream: Upstream) -> None:
        raise AssertionError("nothing is added to this body")

    async def _pieces(self) -> AsyncIterator[bytes]:
        await send_continue(self._request)
        began, size = asyncio.get_running_loop().time(), 0
        while piece := await next_piece(self._request, began, size):
            size += len(piece)
            if size > self._limit:
                self._too_large = True
                raise ValueError("too large")
            yield piece
