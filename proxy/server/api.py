"""The handler of the main listener: a fast path for cache hits, the pipeline, pass-through, and error responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from operator import itemgetter
from typing import Final

from aiohttp.web import BaseRequest

from ..accounting.ledger.ledger import Ledger
from ..cache.entry import Entry
from ..cache.lookup import CacheHit, RequestDigest, digest_of_request
from ..cost.pricing import Cost
from ..observability.logs import HitLog, log_refusal
from ..observability.metrics import Metrics
from ..pipeline.coalescing.broadcast import SubscriberStream
from ..pipeline.coalescing.reply import Reply
from ..pipeline.handler import RequestHandler
from ..pipeline.relay import StreamBroken, with_comment
from ..pipeline.response_headers import (
    TRAILERS,
    ZERO_COST,
    Timing,
    cost_comment,
    cost_headers,
    lines_of,
    stale_headers,
    usage_headers,
)
from ..protocol.errors import ProxyError, error_event
from ..protocol.headers import Raw, is_request_option
from ..protocol.options import Options, from_headers
from ..protocol.request import Client, ProxyRequest
from ..protocol.routes import Route, parse_target, printable
from ..protocol.traceparent import traceparent
from ..protocol.websocket import is_handshake
from ..services import Services
from ..upstream.limits.clients import check_model, check_unambiguous
from ..upstream.providers.registry import models_that_run
from .access import ANONYMOUS, AccessControl
from .admin import AdminHandler
from .cors import METHODS, cors_headers, preflight
from .in_flight import InFlight
from .keepalive import KeepAlive, Waiting, as_event, early_head
from .passthrough import PassthroughHandler
from .request_body import read_body, read_json
from .request_parser import RequestParser, text_headers
from .responses import (
    DateHeader,
    FullResponse,
    StreamedResponse,
    StreamingResponse,
    error_response,
    raw_lines,
    status_line,
)
from .upgrade import UpgradeHandler

log = logging.getLogger("proxy")

Response = FullResponse | StreamedResponse

_POST_ONLY: Final = frozenset({"embeddings", "completions", "moderations", "responses"})
_MAX_MEMOIZED: Final = 2048


@dataclass(slots=True)
class _Context:
    """A request that is being served. origin: an allowed browser origin; began: monotonic seconds."""

    request: BaseRequest
    target: str
    route: Route
    began: float
    origin: str | None = None
    client: Client = ANONYMOUS


class ApiHandler:
    """Serves the requests of the main listener."""

    def __init__(
        self,
        services: Services,
        handler: RequestHandler,
        passthrough: PassthroughHandler,
        upgrades: UpgradeHandler,
        admin: AdminHandler,
        metrics: Metrics,
        access: AccessControl,
        in_flight: InFlight,
        ledger: Ledger,
    ) -> None:
        self._services = services
        self._handler = handler
        self._passthrough = passthrough
        self._upgrades = upgrades
        self._admin = admin
        self._metrics = metrics
        self._access = access
        self._date = DateHeader(services.clock.wall)
        self._routes: dict[str, Route] = {}
        self._heads: dict[tuple[str, str], tuple[Entry, bytes]] = {}
        self._show_key = len(services.settings.server.client_keys) < 2
        self._has_fast_path = not services.settings.cost.stream_comment
        self._max_body = services.settings.server.max_body
        self.in_flight = in_flight
        self._ledger = ledger
        self._hit_log = HitLog()
        self._parser = RequestParser(services)

    # -- every request ------------------------------------------------------------------------------------------------

    async def handle(self, request: BaseRequest) -> Response:
        """Serve one request. Raises nothing except CancelledError."""
        self.in_flight.requests += 1
        began = self._services.clock.monotonic()
        context = None
        try:
            target = request.raw_path
            route = self._routes.get(target)
            if route is None:
                route = self._parse_route(request, target)
            context = _Context(request, target, route, began)
            if route.kind == "own":
                return await self._admin.handle(request, route)
            self._access.check_host(request)
            headers = request.headers
            if "Origin" in headers or "Sec-Fetch-Site" in headers:
                origin = context.origin = self._access.check_origin(request)
                if origin is not None and request.method == "OPTIONS":
                    return preflight(request, origin, self._date.line())
            return await self._serve(context)
        except ProxyError as error:
            return self._error_response(request, error, context)
        except ConnectionError as error:
            log.debug("%s %s: %s", request.method, printable(request.raw_path), error)
            return StreamedResponse(False, 499)
        except Exception:
            log.exception("a request failed inside the proxy")
            failure = ProxyError("internal_error", "the proxy failed on this request; see its log")
            return self._error_response(request, failure, context)
        finally:
            self.in_flight.requests -= 1

    def _parse_route(self, request: BaseRequest, target: str) -> Route:
        if request.method in ("TRACE", "CONNECT"):
            raise _not_allowed(request.method, "GET, POST")
        route = parse_target(target)
        if len(target) <= 256:
            if len(self._routes) >= _MAX_MEMOIZED:
                self._routes.clear()
            self._routes[target] = route
        return route

    async def _serve(self, context: _Context) -> Response:
        request, route = context.request, context.route
        method = request.method
        context.client = self._access.client(request)
        if self.in_flight.closing:
            raise ProxyError("draining", "the proxy is shutting down", retry_after=1.0)
        if route.kind == "endpoint" and method == "POST":
            headers = request.headers
            raw: Sequence[Raw] = request.raw_headers
            if headers.get("Content-Type", "").startswith("application/json") and "Content-Encoding" not in headers:
                body = await read_body(request, self._max_body)
            else:
                body, raw = await read_json(request, self._max_body)
            digest = None
            simple = self._has_fast_path and not context.client.models  # else the model must be parsed and checked
            if simple and _keeps_hits_unchanged(route.options) and not _has_request_option(raw):
                digest = digest_of_request(context.target, context.client.cache_partition, body)
                hit = self._handler.cache.peek(digest)
                if hit is not None:
                    return self._hit(context, hit, b"", route.options.tags)
            return await self._endpoint(context, body, raw, digest)
        if is_handshake(method, request.headers):
            options = from_headers(route.options, text_headers(request.raw_headers))
            self._check_in_flight()
            return await self._upgrades.serve(request, route, context.client, options)
        if method not in METHODS or (route.endpoint in _POST_ONLY):
            raise _not_allowed(method, "POST" if route.endpoint else ", ".join(sorted(METHODS)))
        if route.endpoint == "chat" and method not in ("GET", "HEAD"):
            raise _not_allowed(method, "GET, POST")
        options = from_headers(route.options, text_headers(request.raw_headers))
        self._check_in_flight()
        return await self._passthrough.forward(request, route, context.client, options, cors_headers(context.origin))

    # -- the five endpoints -------------------------------------------------------------------------------------------

    async def _endpoint(
        self, context: _Context, body: bytes, raw: Sequence[Raw], digest: RequestDigest | None
    ) -> Response:
        """raw: the headers that fit the body.

        digest: names the request in the fast path; None if a header or an option asks for something.
        """
        request = context.request
        proxy_request = await self._parser.parse(
            request, context.route, context.client, body, raw, has_options=digest is None
        )
        if context.client.models:
            check_unambiguous(context.client, body)
            named = proxy_request.body_model
            check_model(context.client, *models_that_run(self._services.addresses, context.route, named))
        handling = self._handler.handle(proxy_request, self._check_in_flight, digest)
        if (interval := self._services.settings.server.keepalive) and proxy_request.stream:
            waiting = Waiting(handling, interval)
            if (found := await waiting.within_interval()) is None:
                return await self._relay_later(context, proxy_request, waiting)
            if isinstance(found, ProxyError):
                raise found
            reply = found
        else:
            reply = await handling
        if isinstance(reply, CacheHit):
            return self._cached(context, proxy_request, reply)
        head = (
            status_line(reply.status, reply.reason)
            + raw_lines(reply.headers)
            + lines_of(reply.proxy_headers).encode("latin-1", "replace")
            + cors_headers(context.origin)
        )
        if reply.body is not None:
            return FullResponse(request, head, reply.body, status=reply.status)
        return await self._relay(request, head, reply)

    def _cached(self, context: _Context, request: ProxyRequest, hit: CacheHit) -> FullResponse:
        options = request.options
        wants_comment = options.stream_cost or self._services.settings.cost.stream_comment
        comment = b""
        if request.stream and wants_comment:
            comment = cost_comment(Cost(_ZERO, "exact"), hit.entry.usage)
        if hit.stale:
            return self._stale(context, hit, comment)
        return self._hit(context, hit, comment, options.tags)

    async def _relay_later(self, context: _Context, request: ProxyRequest, waiting: Waiting) -> StreamedResponse:
        """Begin a stream with comments before its response is there. Then an error is an event of the stream."""
        head = early_head(self._date.line(), request.id) + cors_headers(context.origin)
        response = StreamingResponse(context.request, head, 200, trailers=TRAILERS)
        result = await waiting.comment(response)
        if isinstance(result, ProxyError):
            self._error_response(context.request, result, context)
            await response.write(error_event(result.code, result.message))
            return response.abort()
        if isinstance(result, CacheHit):
            await response.write(self._cached(context, request, result).body)
        elif result.body is None:
            return await self._relay(context.request, b"", result, response)
        else:
            await response.write(as_event(result.status, result.body))
            if result.status >= 400:
                return response.abort()
        return await response.finish()

    async def _relay(
        self, request: BaseRequest, head: bytes, reply: Reply, response: StreamingResponse | None = None
    ) -> StreamedResponse:
        """Relay a stream to the client. response: it has begun already."""
        stream = reply.stream
        assert stream is not None
        is_api_stream = stream.audit is not None
        if is_api_stream:
            names = {name.lower() for name, _ in reply.headers}
            if b"cache-control" not in names:
                head += b"Cache-Control: no-cache\r\n"
            if b"x-accel-buffering" not in names:
                head += b"X-Accel-Buffering: no\r\n"
        task = asyncio.current_task()
        assert task is not None
        self.in_flight.streams[task] = stream
        if response is None:
            response = StreamingResponse(request, head, reply.status, trailers=TRAILERS if is_api_stream else "")
        interval = self._services.settings.server.keepalive
        keepalive = KeepAlive(response, stream, interval) if interval and is_api_stream else None
        writer = keepalive or response
        if isinstance(stream, SubscriberStream):
            stream.push = writer.push
        try:
            await stream.relay(writer.write)
            charge = reply.charge
            cost = cost_headers(charge.cost, charge.usage, charge.savings) if charge is not None else ()
            return await response.finish(lines_of(cost))
        except StreamBroken as broken:
            return response.abort(broken.at_once)
        finally:
            if keepalive is not None:
                keepalive.close()
            stream.client_left()
            del self.in_flight.streams[task]

    def _check_in_flight(self) -> None:
        """Raise `overloaded` above `server.max_in_flight`. Requests waiting in the queue do not count here."""
        limit = self._services.settings.server.max_in_flight
        if self.in_flight.requests - self._services.admission.depth > limit:
            message = f"{limit} requests are in flight (server.max_in_flight); try again later"
            raise ProxyError("overloaded", message, retry_after=1.0)

    # -- hits ---------------------------------------------------------------------------------------------------------

    def _hit(self, context: _Context, hit: CacheHit, comment: bytes, tags: tuple[str, ...]) -> FullResponse:
        """Return the response to a fresh hit, and record the hit. comment: SSE comment with the cost."""
        entry = hit.entry
        cached = self._heads.get((entry.key, entry.form))
        if cached is not None and cached[0] is entry:
            head = cached[1]
        else:
            head = self._render_head(entry)
            if len(self._heads) >= _MAX_MEMOIZED:
                self._heads.clear()
            self._heads[entry.key, entry.form] = entry, head
        wall = self._services.clock.wall()
        spent = (self._services.clock.monotonic() - context.began) * 1000
        sampled = "; detail=sampled" if entry.sampled else ""
        lines = (
            f"Age: {entry.age(wall)}\r\nCache-Status: openai-proxy; hit; ttl={entry.remaining(wall)}{sampled}\r\n"
            f"X-Proxy-Request-Id: {hit.id}\r\nServer-Timing: queue;dur=0.0, upstream;dur=0.0, proxy;dur={spent:.2f}\r\n"
            f"{lines_of(hit.headers) if hit.headers else ''}"
        )
        body = with_comment(hit.body, comment) if comment else hit.body
        self._services.receipts.put_hit(hit.id, context.client.name, entry, wall, hit.run, tags)
        self._metrics.record_hit(entry)
        self._hit_log.hit(hit.id, context.client.name, entry, wall, context.request.raw_headers)
        self._ledger.hit(entry, context.client.name, tags, hit.run, wall, spent)
        head = head + self._date.line() + lines.encode()
        if context.origin is not None:
            head += cors_headers(context.origin)
        return FullResponse(context.request, head, body, status=entry.status)

    def _stale(self, context: _Context, hit: CacheHit, comment: bytes) -> FullResponse:
        """Return the response to a stale hit; the pipeline has recorded it."""
        lines = lines_of(hit.headers + stale_headers(hit.entry, self._services.clock.wall(), hit.stale, hit.fwd))
        spent = Timing(total=(self._services.clock.monotonic() - context.began) * 1000)
        lines += f"X-Proxy-Request-Id: {hit.id}\r\nServer-Timing: {spent.header()}\r\n"
        head = self._render_head(hit.entry, "stale", hit.attempts) + self._date.line() + lines.encode()
        body = with_comment(hit.body, comment) if comment else hit.body
        return FullResponse(context.request, head + cors_headers(context.origin), body, status=hit.entry.status)

    def _render_head(self, entry: Entry, cache: str = "hit", attempts: int = 0) -> bytes:
        """Return the part of a hit's head that is the same for every request."""
        lines = f"X-Proxy-Cache: {cache}\r\nX-Proxy-Attempts: {attempts}\r\n"
        if self._show_key:
            lines += f"X-Proxy-Cache-Key: {entry.key}\r\n"
        lines += (
            f"X-Proxy-Cost-USD: {ZERO_COST}\r\nX-Proxy-Cost-Status: {'estimated' if entry.estimated else 'exact'}\r\n"
        )
        if entry.cost is not None:
            lines += f"X-Proxy-Cost-Saved-USD: {entry.cost}\r\n"
        lines += lines_of(usage_headers(entry.usage))
        return status_line(entry.status) + raw_lines(entry.headers) + lines.encode()

    # -- errors -------------------------------------------------------------------------------------------------------

    def _error_response(self, request: BaseRequest, error: ProxyError, context: _Context | None) -> FullResponse:
        """Return the error response, and record the error. context: None if the target cannot be parsed."""
        request_id = self._services.clock.new_id()
        if not error.proxy_headers:  # else the pipeline has recorded it
            self._metrics.record_refusal(error.code)
            if context is None:
                self._ledger.refused(error.code, error.status, "", "")
            elif context.route.kind != "own":
                self._ledger.refused(error.code, error.status, context.client.name, context.route.endpoint)
            fields = {
                "status": error.status,
                "id": request_id,
                "client": context.client.name if context is not None else "",
                "error": error.code,
                "traceparent": traceparent(request.raw_headers),
            }
            log_refusal(request.method, request.raw_path, fields)
        if context is not None and context.origin is not None:
            pairs = [line.split(": ", 1) for line in cors_headers(context.origin).decode().splitlines()]
            error.headers = (*error.headers, *((name, value) for name, value in pairs))
        # An unread body is skipped, but one that is too large, or that may not come at all (RFC 9110 section 10.1.1).
        close = not request.content.is_eof() and (error.status == 413 or "Expect" in request.headers)
        return error_response(request, error, request_id, self._date.line(), close=close)


_ZERO: Final = Decimal(0)


def _has_request_option(raw: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return True if a header may be a request option; then the fast path is not taken."""
    return True in map(is_request_option, map(itemgetter(0), raw))


def _keeps_hits_unchanged(options: Options) -> bool:
    """Return True if a hit is the same with these options of the base URL. Other options are part of the cache key."""
    return options.max_age is None and not (options.stream_cost or options.run or options.max_cost is not None)


def _not_allowed(method: str, allow: str) -> ProxyError:
    message = f"method {printable(method, 20)} is not allowed here; use {allow}"
    return ProxyError("method_not_allowed", message, headers=(("Allow", allow),))
