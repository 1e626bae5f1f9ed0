"""Every other `/v1/…` route: carried through in both directions, never understood, never cached.

A request is sent once. Another key or a retry is possible only while no byte of it has gone up, or for GET and HEAD.
Routes that name stored objects always use one fixed key, for another could not see the objects (contract 4).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial

from aiohttp.web import BaseRequest

from ..accounting.receipt import Receipt
from ..pipeline.response_headers import Timing, cache_status
from ..protocol.errors import ProxyError
from ..protocol.headers import downstream_headers, upstream_headers
from ..protocol.json_parse import parse_leniently
from ..protocol.options import Options
from ..protocol.request import Client
from ..protocol.routes import Route
from ..protocol.traceparent import traceparent
from ..services import Services
from ..upstream.decompress import Decompressor
from ..upstream.interfaces import ConnectionInfo, UpstreamResponse, UpstreamTransport
from ..upstream.keys.lease import UpstreamKey
from ..upstream.keys.stored_objects import BodyCopy, ids_in_path, ids_named
from ..upstream.limits.clients import ClientReservation, check_passthrough
from ..upstream.response import decoded_chunks, read_error
from ..upstream.retry.outcome import OutcomeKind, TransportFailure, breaker_failure, classify, error_info, retry_after
from ..upstream.retry.policy import RetryAfter, RetryState, ReturnToClient, TryNextKey
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

SMALL = 64 * 1024
"""A JSON body up to this many bytes is looked through for ids of stored objects before it goes up."""


class PassthroughHandler:
    """Carries requests through. `observe` takes each one's receipt."""

    def __init__(self, services: Services, transport: UpstreamTransport, observe: Callable[[Receipt], None]) -> None:
        self._services = services
        self._way_up = transport
        self._observe = observe

    async def forward(
        self, request: BaseRequest, route: Route, client: Client, options: Options, extra: bytes
    ) -> FullResponse | StreamedResponse:
        """One request, to its end. extra: further header lines. Raises ProxyError."""
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
        trace = _Trace(services, request, route, client)
        try:
            trace.hold = await services.reserve_client(client, 0)
            reply, failed = await self._send(request, route, client, options, trace)
        except ProxyError as refusal:
            self._finish(trace, refusal.status, refusal.code)
            refusal.lines = trace.lines()
            raise
        except asyncio.CancelledError:
            self._finish(trace, 499, "client_gone")
            raise
        finally:
            for index, sick in trace.failing.items():  # as in exchange: once a request
                services.upstreams[index].breaker.record_failure(services.clock.monotonic(), sick)
        if failed is not None:
            return self._error(request, trace, reply, failed, extra)
        return await self._stream(request, trace, reply, extra, self._copy(request, route, reply))

    # -- up -----------------------------------------------------------------------------------------------------------

    async def _send(
        self, request: BaseRequest, route: Route, client: Client, options: Options, trace: _Trace
    ) -> tuple[UpstreamResponse, bytes | None]:
        """The answer to give, and its body where it is an error."""
        services, clock = self._services, self._services.clock
        attempts = RetryState(services.settings.retry, clock.random, options.max_retries)
        repeatable = request.method in ("GET", "HEAD") and not request.body_exists
        fresh = not repeatable
        deadline = clock.monotonic() + (options.timeout or services.settings.timeouts.total)
        excluded: set[str] = set()
        upload = _Upload(request, services.settings.server.max_body)
        tied = await self._pinned(route, upload)
        last: tuple[UpstreamResponse, bytes] | None = None
        while True:
            key = self._choose(route, excluded, tied)
            if key is None:
                if last is None:
                    raise ProxyError("no_usable_key", "no key can serve this route")
                trace.code = "" if services.passthrough else "no_usable_key"
                return last
            services.pool.mark_used(key)
            upstream = services.upstreams[key.upstream]
            closed = upstream.breaker.wait(clock.monotonic())
            if closed:
                if last is not None:
                    return last
                message = "the upstream of this route has failed too often of late and is left alone for a while"
                raise ProxyError("circuit_open", message, retry_after=closed)
            upstream.breaker.sends(clock.monotonic())
            trace.upstream, trace.key = upstream.address.name, key.label
            trace.attempts += 1
            now = clock.monotonic()
            trip = ConnectionInfo(fresh=fresh)
            reply: UpstreamResponse | None = None
            body: bytes | None = None
            failure: TransportFailure | None = None
            asked: float | None = None
            try:
                reply = await self._way_up.send(
                    request.method,
                    upstream.provider.url(upstream.address, route, ""),
                    self._headers(request, client, key, upload),
                    upload.body(),
                    first_byte=max(0.001, min(services.settings.timeouts.first_byte, deadline - now)),
                    trip=trip,
                )
                outcome = OutcomeKind.OK
                if reply.status >= 400:
                    body = await _error_body(reply, deadline - clock.monotonic())
                    info = error_info(body)
                    outcome = classify(reply.status, info, reply.headers.get("x-should-retry"))
                    asked = retry_after(reply.headers, clock.wall())
                    reason = f"{reply.status} {info.code or info.type}".strip()
                    if outcome in (OutcomeKind.UNAUTHORIZED, OutcomeKind.QUOTA) and not services.passthrough:
                        services.record_outcome(key, "", outcome, 0.0, reason)
            except TransportFailure as error:
                if reply is not None:
                    reply.close()
                if upload.too_large:
                    raise too_large(services.settings.server.max_body) from None
                failure, outcome = error.again(), error.outcome
            except BaseException:
                if reply is not None:
                    reply.close()
                raise
            finally:
                trace.went_up |= trip.connected
            came = (reply.status, reply.headers) if reply is not None and failure is None else None
            sick = breaker_failure(outcome, came)
            if sick is None:
                upstream.breaker.record_success()
                trace.failing.pop(key.upstream, None)
            elif clock.monotonic() < deadline:
                trace.failing[key.upstream] = sick
            if outcome is OutcomeKind.OK:
                assert reply is not None
                return reply, None
            if not repeatable and outcome is not OutcomeKind.UNREACHED:
                outcome = OutcomeKind.FINAL
            step = attempts.next(
                outcome,
                asked_wait=asked,
                left=deadline - clock.monotonic(),
                other_key=self._choose(route, excluded | {key.label}, tied) is not None,
                granted=lambda upstream=upstream: upstream.budget.take(clock.monotonic()),  # type: ignore[misc]
            )
            if not isinstance(step, ReturnToClient):
                services.counters.record_retry(upstream.address.name, outcome.value)
            match step:
                case ReturnToClient(spent):
                    trace.spent = spent
                    if reply is None or body is None:
                        assert failure is not None
                        raise failure.proxy_error(spent)
                    return reply, body
                case TryNextKey():
                    excluded.add(key.label)
                    if reply is not None and body is not None:
                        last = reply, body
                case RetryAfter(seconds):
                    await clock.sleep(seconds)
                case _:  # a GET on a connection that had gone stale
                    fresh = True

    async def _pinned(self, route: Route, upload: _Upload) -> UpstreamKey | None:
        """The key that made an object which a stateful route names in its path, or in a small JSON body."""
        services = self._services
        if not route.stateful or len(services.pool.keys) == 1:
            return None
        ids = ids_in_path(route.path)
        body = await upload.small_json()
        if body is not None:
            with suppress(ValueError):
                ids += ids_named(body, parse_leniently(body))
        label = await services.object_owners.owner_of(ids) if ids else None
        return services.pool.by_label(label) if label is not None else None

    def _choose(
        self, route: Route, excluded: set[str] | frozenset[str], tied: UpstreamKey | None = None
    ) -> UpstreamKey | None:
        """The one key that may see a stored object, or the fixed one of stateful routes; else the key least recently
        used of those that are ready.
        """
        services = self._services
        if tied is not None:
            return tied if tied.label not in excluded else None
        keys = services.pool.keys
        if route.shape != "openai":
            keys = tuple(k for k in keys if services.upstreams[k.upstream].address.kind == "azure") or keys
        if route.stateful:
            return keys[0] if keys[0].label not in excluded else None
        left = [key for key in keys if key.label not in excluded]
        now = services.clock.monotonic()
        asked = [key for key in left if not services.upstreams[key.upstream].breaker.wait(now)] or left
        ready = [key for key in asked if services.pool.state(key.label, "", now) is None] or asked
        return min(ready, key=lambda key: services.pool.last_used.get(key.label, 0), default=None)

    def _headers(
        self, request: BaseRequest, client: Client, key: UpstreamKey, upload: _Upload
    ) -> list[tuple[str, str]]:
        services = self._services
        headers = upstream_headers(request.raw_headers, pooled=not services.passthrough)
        dialect = services.upstreams[key.upstream].provider
        if not services.passthrough:
            headers.extend(services.credential(key.label))
        elif client.auth is not None:
            headers.extend(dialect.client_auth(*client.auth))
        if upload.length is not None:
            headers.append(("Content-Length", str(upload.length)))
        return headers

    # -- down ---------------------------------------------------------------------------------------------------------

    def _head(self, trace: _Trace, reply: UpstreamResponse, *, decoded: bool) -> bytes:
        services = self._services
        pooled = not services.passthrough
        headers = downstream_headers(reply.raw_headers, pooled=pooled, decoded=decoded)
        headers = [(name, services.masker.mask(value)) for name, value in headers]
        final = trace.spent or bool(trace.code)
        if final:
            headers = [(name, value) for name, value in headers if name.lower() != b"x-should-retry"]
        lines = trace.lines() + "X-Proxy-Cost-Status: unknown\r\n"
        if trace.code:
            lines += f"X-Proxy-Error: {trace.code}\r\n"
        if final:
            lines += "X-Should-Retry: false\r\n"
        return status_line(reply.status, reply.reason) + raw_lines(headers) + lines.encode("latin-1", "replace")

    def _error(
        self, request: BaseRequest, trace: _Trace, reply: UpstreamResponse, body: bytes, extra: bytes
    ) -> FullResponse:
        decoded = Decompressor.knows(reply.headers.get("Content-Encoding", "").strip().lower())
        reply.close()
        self._finish(trace, reply.status, trace.code or f"upstream_{reply.status}")
        head = self._head(trace, reply, decoded=decoded) + extra
        return FullResponse(request, head, self._services.masker.mask(body), status=reply.status)

    def _copy(self, request: BaseRequest, route: Route, reply: UpstreamResponse) -> BodyCopy | None:
        """A copy to be made of an answer that may bring a stored object; the answer itself flows on."""
        if not route.stateful or len(self._services.pool.keys) == 1 or request.method in ("HEAD", "DELETE"):
            return None
        return BodyCopy() if reply.headers.get("Content-Type", "").lower().startswith("application/json") else None

    async def _stream(
        self, request: BaseRequest, trace: _Trace, reply: UpstreamResponse, extra: bytes, copy: BodyCopy | None
    ) -> StreamedResponse:
        length = reply.headers.get("Content-Length")
        known = int(length) if length is not None and length.isascii() and length.isdigit() else None
        head = self._head(trace, reply, decoded=False) + extra
        stream = StreamingResponse(request, head, reply.status, known)
        trace.first_byte = trace.elapsed()
        status, error = reply.status, ""
        try:
            if request.method != "HEAD":
                async for chunk in reply.chunks():
                    if copy is not None:
                        copy.feed(chunk)
                    await stream.write(chunk)
            if copy is not None:  # before the client has its end and asks for the object
                self._services.object_owners.record_owner(copy.ids(), trace.key)
            return await stream.finish()
        except TransportFailure as failure:
            error = failure.code
            if not stream.started:
                refusal = failure.proxy_error()
                status = refusal.status
                raise refusal.copy(trace.lines()) from None
            return stream.abort()
        except BaseException:
            status, error = 499, "client_gone"
            raise
        finally:
            reply.close()
            self._finish(trace, status, error)

    def _finish(self, trace: _Trace, status: int, error: str) -> None:
        if trace.hold is not None:
            trace.hold.settle(0) if trace.went_up else trace.hold.cancel()
        self._observe(trace.receipt(status, error))


class _Trace:
    """What one passage has cost and where it went, for headers and receipt."""

    def __init__(self, services: Services, request: BaseRequest, route: Route, client: Client) -> None:
        self._clock = services.clock
        self.id = services.clock.new_id()
        self._began = services.clock.monotonic()
        self._endpoint = route.segment
        self._client = client.name
        self._headers = request.raw_headers
        self.upstream = self.key = self.code = ""
        self.attempts = 0
        self.first_byte: float | None = None
        self.spent = False
        self.hold: ClientReservation | None = None
        self.went_up = False
        self._limits = partial(services.clients.headers, client)
        self.failing: dict[int, int] = {}

    def elapsed(self) -> float:
        return (self._clock.monotonic() - self._began) * 1000

    def lines(self) -> str:
        """Our header lines on the answer."""
        timing = Timing(0.0, self.elapsed(), self.elapsed())
        went = f"X-Proxy-Upstream: {self.upstream}\r\nX-Proxy-Key: {self.key}\r\n" if self.upstream else ""
        return (
            f"X-Proxy-Request-Id: {self.id}\r\nX-Proxy-Cache: bypass\r\nX-Proxy-Cache-Reason: {_REASON}\r\n"
            f"Cache-Status: {cache_status('bypass', _REASON, False)}\r\n{went}{self._limits(self._clock.monotonic())}"
            f"X-Proxy-Attempts: {self.attempts}\r\nServer-Timing: {timing.header()}\r\n"
        )

    def receipt(self, status: int, error: str) -> Receipt:
        return Receipt(
            id=self.id,
            client=self._client,
            endpoint=self._endpoint,
            model="",
            status=status,
            cache="bypass",
            finished_at=self._clock.wall(),
            reason=_REASON,
            upstream=self.upstream,
            key=self.key,
            attempts=self.attempts,
            error=error,
            upstream_ms=self.elapsed(),
            total_ms=self.elapsed(),
            first_byte_ms=self.first_byte,
            traceparent=traceparent(self._headers),
        )


class _Upload:
    """The request body on its way up, counted and timed. length: as the client announced it."""

    def __init__(self, request: BaseRequest, limit: int) -> None:
        self._request = request
        self._limit = limit
        self._exists = request.body_exists
        self.length = request.content_length if self._exists else None
        self.too_large = False
        self._read: bytes | None = None

    async def small_json(self) -> bytes | None:
        """The whole body, where it is JSON and so small that it may be read before it goes up."""
        kind = self._request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if not self.length or self.length > SMALL or kind != "application/json":
            return None
        self._read, self.length = await read_body(self._request, self._limit), None  # it tells its own length
        return self._read

    def body(self) -> bytes | AsyncIterator[bytes] | None:
        if self._read is not None:
            return self._read
        return self._pieces() if self._exists else None

    async def _pieces(self) -> AsyncIterator[bytes]:
        await send_continue(self._request)
        began, size = asyncio.get_running_loop().time(), 0
        while piece := await next_piece(self._request, began, size):
            size += len(piece)
            if size > self._limit:
                self.too_large = True
                raise ValueError("too large")
            yield piece


async def _error_body(reply: UpstreamResponse, patience: float) -> bytes:
    encoding = reply.headers.get("Content-Encoding", "").strip().lower()
    chunks = decoded_chunks(reply.chunks(), encoding) if Decompressor.knows(encoding) else reply.chunks()
    try:
        async with asyncio.timeout(max(0.0, patience)):
            return await read_error(chunks)
    except TimeoutError:
        raise TransportFailure("timeout", "the upstream did not finish its answer in time") from None
