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
from ..pipeline.response_headers import Timing, forward_status
from ..protocol.errors import Refusal
from ..protocol.headers import downstream_headers, upstream_headers
from ..protocol.json_parse import parse_leniently
from ..protocol.options import Options
from ..protocol.request import Client
from ..protocol.routes import Route
from ..protocol.traceparent import traceparent
from ..services import World
from ..upstream.decompress import Inflater
from ..upstream.interfaces import Trip, UpstreamReply, WayUp
from ..upstream.keys.lease import PoolKey
from ..upstream.keys.stored_objects import Copy, ids_in_path, ids_named
from ..upstream.limits.clients import Hold, check_passage
from ..upstream.response import decoded_chunks, read_error
from ..upstream.retry.outcome import Class, TransportFailure, ailment, classify, error_info, retry_after
from ..upstream.retry.policy import Attempts, ChangeKey, Deliver, Pause
from .responses import Stream, Streamed, Whole, continued, next_piece, raw_lines, read_body, status_line, too_large

_REASON = "uncacheable: route"

SMALL = 64 * 1024
"""A JSON body up to this many bytes is looked through for ids of stored objects before it goes up."""


class Passage:
    """Carries requests through. `observe` takes each one's receipt."""

    def __init__(self, world: World, way_up: WayUp, observe: Callable[[Receipt], None]) -> None:
        self._world = world
        self._way_up = way_up
        self._observe = observe

    async def carry(
        self, request: BaseRequest, route: Route, client: Client, options: Options, extra: bytes
    ) -> Whole | Streamed:
        """One request, to its end. extra: further header lines. Raises Refusal."""
        world = self._world
        if world.replays:
            raise Refusal("not_cached", "replay: this route is never cached, and nothing is sent upstream")
        check_passage(client, request.method, route.segment)
        world.budgets.check_passage(client, request.method, route.segment)
        if options.only_if_cached:
            raise Refusal("not_cached", "this route is never cached, and only-if-cached asks for no other")
        limit = world.settings.server.max_body
        length = request.content_length
        if length is not None and length > limit:
            raise too_large(limit)
        trace = _Trace(world, request, route, client)
        try:
            trace.hold = await world.hold(client, 0)
            reply, failed = await self._send(request, route, client, options, trace)
        except Refusal as refusal:
            self._finish(trace, refusal.status, refusal.code)
            refusal.lines = trace.lines()
            raise
        except asyncio.CancelledError:
            self._finish(trace, 499, "client_gone")
            raise
        finally:
            for index, sick in trace.failing.items():  # as in exchange: once a request
                world.upstreams[index].breaker.failed(world.seams.monotonic(), sick)
        if failed is not None:
            return self._error(request, trace, reply, failed, extra)
        return await self._stream(request, trace, reply, extra, self._copy(request, route, reply))

    # -- up -----------------------------------------------------------------------------------------------------------

    async def _send(
        self, request: BaseRequest, route: Route, client: Client, options: Options, trace: _Trace
    ) -> tuple[UpstreamReply, bytes | None]:
        """The answer to give, and its body where it is an error."""
        world, seams = self._world, self._world.seams
        attempts = Attempts(world.policy.asked(options.max_retries), seams.random)
        repeatable = request.method in ("GET", "HEAD") and not request.body_exists
        fresh = not repeatable
        deadline = seams.monotonic() + (options.timeout or world.settings.timeouts.total)
        excluded: set[str] = set()
        upload = _Upload(request, world.settings.server.max_body)
        tied = await self._tied(route, upload)
        last: tuple[UpstreamReply, bytes] | None = None
        while True:
            key = self._choose(route, excluded, tied)
            if key is None:
                if last is None:
                    raise Refusal("no_usable_key", "no key can serve this route")
                trace.code = "" if world.passthrough else "no_usable_key"
                return last
            world.ring.used(key)
            upstream = world.upstreams[key.upstream]
            closed = upstream.breaker.wait(seams.monotonic())
            if closed:
                if last is not None:
                    return last
                message = "the upstream of this route has failed too often of late and is left alone for a while"
                raise Refusal("circuit_open", message, retry_after=closed)
            upstream.breaker.sends(seams.monotonic())
            trace.upstream, trace.key = upstream.site.name, key.label
            trace.attempts += 1
            now = seams.monotonic()
            trip = Trip(fresh=fresh)
            reply: UpstreamReply | None = None
            body: bytes | None = None
            failure: TransportFailure | None = None
            asked: float | None = None
            try:
                reply = await self._way_up.send(
                    request.method,
                    upstream.dialect.url(upstream.site, route, ""),
                    self._headers(request, client, key, upload),
                    upload.body(),
                    first_byte=max(0.001, min(world.settings.timeouts.first_byte, deadline - now)),
                    trip=trip,
                )
                outcome = Class.OK
                if reply.status >= 400:
                    body = await _error_body(reply, deadline - seams.monotonic())
                    info = error_info(body)
                    outcome = classify(reply.status, info, reply.headers.get("x-should-retry"))
                    asked = retry_after(reply.headers, seams.wall())
                    reason = f"{reply.status} {info.code or info.type}".strip()
                    if outcome in (Class.UNAUTHORIZED, Class.QUOTA) and not world.passthrough:
                        world.learn(key, "", outcome, 0.0, reason)
            except TransportFailure as error:
                if reply is not None:
                    reply.close()
                if upload.too_large:
                    raise too_large(world.settings.server.max_body) from None
                failure, outcome = error.again(), error.outcome
            except BaseException:
                if reply is not None:
                    reply.close()
                raise
            finally:
                trace.went_up |= trip.connected
            came = (reply.status, reply.headers) if reply is not None and failure is None else None
            sick = ailment(outcome, came)
            if sick is None:
                upstream.breaker.succeeded()
                trace.failing.pop(key.upstream, None)
            elif seams.monotonic() < deadline:
                trace.failing[key.upstream] = sick
            if outcome is Class.OK:
                assert reply is not None
                return reply, None
            if not repeatable and outcome is not Class.UNREACHED:
                outcome = Class.FINAL
            step = attempts.after(
                outcome,
                asked_wait=asked,
                left=deadline - seams.monotonic(),
                other_key=self._choose(route, excluded | {key.label}, tied) is not None,
                granted=lambda upstream=upstream: upstream.budget.take(seams.monotonic()),  # type: ignore[misc]
            )
            if not isinstance(step, Deliver):
                world.tallies.retried(upstream.site.name, outcome.value)
            match step:
                case Deliver(spent):
                    trace.spent = spent
                    if reply is None or body is None:
                        assert failure is not None
                        raise failure.refusal(spent)
                    return reply, body
                case ChangeKey():
                    excluded.add(key.label)
                    if reply is not None and body is not None:
                        last = reply, body
                case Pause(seconds):
                    await seams.sleep(seconds)
                case _:  # a GET on a connection that had gone stale
                    fresh = True

    async def _tied(self, route: Route, upload: _Upload) -> PoolKey | None:
        """The key that made an object which a stateful route names in its path, or in a small JSON body."""
        world = self._world
        if not route.stateful or len(world.ring.keys) == 1:
            return None
        ids = ids_in_path(route.path)
        body = await upload.small_json()
        if body is not None:
            with suppress(ValueError):
                ids += ids_named(body, parse_leniently(body))
        label = await world.objects.maker(ids) if ids else None
        return world.ring.named(label) if label is not None else None

    def _choose(self, route: Route, excluded: set[str] | frozenset[str], tied: PoolKey | None = None) -> PoolKey | None:
        """The one key that may see a stored object, or the fixed one of stateful routes; else the key least recently
        used of those that are ready.
        """
        world = self._world
        if tied is not None:
            return tied if tied.label not in excluded else None
        keys = world.ring.keys
        if route.shape != "openai":
            keys = tuple(k for k in keys if world.upstreams[k.upstream].site.kind == "azure") or keys
        if route.stateful:
            return keys[0] if keys[0].label not in excluded else None
        left = [key for key in keys if key.label not in excluded]
        now = world.seams.monotonic()
        asked = [key for key in left if not world.upstreams[key.upstream].breaker.wait(now)] or left
        ready = [key for key in asked if world.ring.state(key.label, "", now) is None] or asked
        return min(ready, key=lambda key: world.ring.last_used.get(key.label, 0), default=None)

    def _headers(self, request: BaseRequest, client: Client, key: PoolKey, upload: _Upload) -> list[tuple[str, str]]:
        world = self._world
        headers = upstream_headers(request._message.raw_headers, pooled=not world.passthrough)
        dialect = world.upstreams[key.upstream].dialect
        if not world.passthrough:
            headers.extend(world.credential(key.label))
        elif client.auth is not None:
            headers.extend(dialect.client_auth(*client.auth))
        if upload.length is not None:
            headers.append(("Content-Length", str(upload.length)))
        return headers

    # -- down ---------------------------------------------------------------------------------------------------------

    def _head(self, trace: _Trace, reply: UpstreamReply, *, decoded: bool) -> bytes:
        world = self._world
        pooled = not world.passthrough
        headers = downstream_headers(reply.raw_headers, pooled=pooled, decoded=decoded)
        headers = [(name, world.masker.mask(value)) for name, value in headers]
        final = trace.spent or bool(trace.code)
        if final:
            headers = [(name, value) for name, value in headers if name.lower() != b"x-should-retry"]
        lines = trace.lines() + "X-Proxy-Cost-Status: unknown\r\n"
        if trace.code:
            lines += f"X-Proxy-Error: {trace.code}\r\n"
        if final:
            lines += "X-Should-Retry: false\r\n"
        return status_line(reply.status, reply.reason) + raw_lines(headers) + lines.encode("latin-1", "replace")

    def _error(self, request: BaseRequest, trace: _Trace, reply: UpstreamReply, body: bytes, extra: bytes) -> Whole:
        decoded = Inflater.knows(reply.headers.get("Content-Encoding", "").strip().lower())
        reply.close()
        self._finish(trace, reply.status, trace.code or f"upstream_{reply.status}")
        head = self._head(trace, reply, decoded=decoded) + extra
        return Whole(request, head, self._world.masker.mask(body), status=reply.status)

    def _copy(self, request: BaseRequest, route: Route, reply: UpstreamReply) -> Copy | None:
        """A copy to be made of an answer that may bring a stored object; the answer itself flows on."""
        if not route.stateful or len(self._world.ring.keys) == 1 or request.method in ("HEAD", "DELETE"):
            return None
        return Copy() if reply.headers.get("Content-Type", "").lower().startswith("application/json") else None

    async def _stream(
        self, request: BaseRequest, trace: _Trace, reply: UpstreamReply, extra: bytes, copy: Copy | None
    ) -> Streamed:
        length = reply.headers.get("Content-Length")
        known = int(length) if length is not None and length.isascii() and length.isdigit() else None
        head = self._head(trace, reply, decoded=False) + extra
        stream = Stream(request, head, reply.status, known)
        trace.first_byte = trace.elapsed()
        status, error = reply.status, ""
        try:
            if request.method != "HEAD":
                async for chunk in reply.chunks():
                    if copy is not None:
                        copy.feed(chunk)
                    await stream.write(chunk)
            if copy is not None:  # before the client has its end and asks for the object
                self._world.objects.made(copy.ids(), trace.key)
            return await stream.finish()
        except TransportFailure as failure:
            error = failure.code
            if not stream.started:
                refusal = failure.refusal()
                status = refusal.status
                raise refusal.again(trace.lines()) from None
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

    def __init__(self, world: World, request: BaseRequest, route: Route, client: Client) -> None:
        self._seams = world.seams
        self.id = world.seams.new_id()
        self._began = world.seams.monotonic()
        self._endpoint = route.segment
        self._client = client.name
        self._headers = request._message.raw_headers
        self.upstream = self.key = self.code = ""
        self.attempts = 0
        self.first_byte: float | None = None
        self.spent = False
        self.hold: Hold | None = None
        self.went_up = False
        self._limits = partial(world.clients.line, client)
        self.failing: dict[int, int] = {}

    def elapsed(self) -> float:
        return (self._seams.monotonic() - self._began) * 1000

    def lines(self) -> str:
        """Our header lines on the answer."""
        timing = Timing(0.0, self.elapsed(), self.elapsed())
        went = f"X-Proxy-Upstream: {self.upstream}\r\nX-Proxy-Key: {self.key}\r\n" if self.upstream else ""
        return (
            f"X-Proxy-Request-Id: {self.id}\r\nX-Proxy-Cache: bypass\r\nX-Proxy-Cache-Reason: {_REASON}\r\n"
            f"Cache-Status: {forward_status('bypass', _REASON, False)}\r\n{went}{self._limits(self._seams.monotonic())}"
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
            finished_at=self._seams.wall(),
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
        await continued(self._request)
        began, size = asyncio.get_running_loop().time(), 0
        while piece := await next_piece(self._request, began, size):
            size += len(piece)
            if size > self._limit:
                self.too_large = True
                raise ValueError("too large")
            yield piece


async def _error_body(reply: UpstreamReply, patience: float) -> bytes:
    encoding = reply.headers.get("Content-Encoding", "").strip().lower()
    chunks = decoded_chunks(reply.chunks(), encoding) if Inflater.knows(encoding) else reply.chunks()
    try:
        async with asyncio.timeout(max(0.0, patience)):
            return await read_error(chunks)
    except TimeoutError:
        raise TransportFailure("timeout", "the upstream did not finish its answer in time") from None
