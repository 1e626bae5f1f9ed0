"""Requests come in here: the fast lane for hits, the way through the house for all else, errors into envelopes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
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
from ..protocol.errors import ProxyError
from ..protocol.headers import is_request_option
from ..protocol.options import Options, from_headers
from ..protocol.request import Client, ProxyRequest, parse_body
from ..protocol.routes import Route, parse_target, printable
from ..protocol.traceparent import traceparent
from ..services import Services
from ..system.threads import in_thread_if_large
from ..upstream.limits.clients import check_model
from ..upstream.providers.registry import model_named, models_in_path
from .access import ANONYMOUS, AccessControl
from .admin import AdminHandler
from .cors import METHODS, cors_headers, preflight
from .in_flight import InFlight
from .passthrough import PassthroughHandler
from .responses import (
    DateHeader,
    FullResponse,
    StreamedResponse,
    StreamingResponse,
    error_response,
    raw_lines,
    read_body,
    status_line,
)

log = logging.getLogger("proxy")

Answer = FullResponse | StreamedResponse

_POST_ONLY: Final = frozenset({"embeddings", "completions", "moderations", "responses"})
_KEEP: Final = 2048


@dataclass(slots=True)
class _Context:
    """One request on its way through the house. origin: the browser origin that may call; began: monotonic seconds."""

    request: BaseRequest
    target: str
    route: Route
    began: float
    origin: str | None = None
    client: Client = ANONYMOUS


class ApiHandler:
    """The handler of the main listener."""

    def __init__(
        self,
        services: Services,
        journey: RequestHandler,
        passage: PassthroughHandler,
        ops: AdminHandler,
        metrics: Metrics,
        gatekeeper: AccessControl,
        traffic: InFlight,
        ledger: Ledger,
    ) -> None:
        self._services = services
        self._journey = journey
        self._passage = passage
        self._ops = ops
        self._metrics = metrics
        self._gatekeeper = gatekeeper
        self._dates = DateHeader(services.clock.wall)
        self._routes: dict[str, Route] = {}
        self._heads: dict[tuple[str, str], tuple[Entry, bytes]] = {}
        self._show_key = len(services.settings.server.client_keys) < 2
        self._fast = not services.settings.cost.stream_comment
        self._max_body = services.settings.server.max_body
        self.traffic = traffic
        self._ledger = ledger
        self._hit_log = HitLog()
        self._model_of = partial(model_named, services.addresses)

    # -- every request ------------------------------------------------------------------------------------------------

    async def handle(self, request: BaseRequest) -> Answer:
        """One request. Never raises but for a client that is gone."""
        self.traffic.requests += 1
        began = self._services.clock.monotonic()
        visit = None
        try:
            target = request.raw_path
            route = self._routes.get(target)
            if route is None:
                route = self._parse(request, target)
            visit = _Context(request, target, route, began)
            if route.kind == "own":
                return await self._ops.handle(request, route)
            self._gatekeeper.check_host(request)
            headers = request.headers
            if "Origin" in headers or "Sec-Fetch-Site" in headers:
                origin = visit.origin = self._gatekeeper.check_origin(request)
                if origin is not None and request.method == "OPTIONS":
                    return preflight(request, origin, self._dates.line())
            answer = await self._serve(visit)
        except ProxyError as refusal:
            answer = self._error(request, refusal, visit)
        except ConnectionError as error:
            log.debug("%s %s: %s", request.method, printable(request.raw_path), error)
            return StreamedResponse(False, 499)
        except Exception:
            log.exception("a request failed inside the proxy")
            failed = ProxyError("internal_error", "the proxy failed on this request; its log says more")
            answer = self._error(request, failed, visit)
        finally:
            self.traffic.requests -= 1
        return answer

    def _parse(self, request: BaseRequest, target: str) -> Route:
        if request.method in ("TRACE", "CONNECT"):
            raise _not_allowed(request.method, "GET, POST")
        route = parse_target(target)
        if len(target) <= 256:
            if len(self._routes) >= _KEEP:
                self._routes.clear()
            self._routes[target] = route
        return route

    async def _serve(self, visit: _Context) -> Answer:
        request, route = visit.request, visit.route
        method = request.method
        visit.client = self._gatekeeper.client(request)
        if self.traffic.closing:
            raise ProxyError("draining", "the proxy is shutting down", retry_after=1.0)
        if route.kind == "endpoint" and method == "POST":
            headers = request.headers
            content_type = headers.get("Content-Type", "")
            if not content_type.startswith("application/json") or "Content-Encoding" in headers:
                _check_media_type(content_type, headers.get("Content-Encoding"))
            body = await read_body(request, self._max_body)
            raw = request.raw_headers
            name = None
            plain = self._fast and not visit.client.models  # whose model must be read first
            if plain and _leaves_hits_alone(route.options) and not _asks_something(raw):
                name = digest_of_request(visit.target, visit.client.cache_partition, body)
                hit = self._journey.cache.peek(name)
                if hit is not None:
                    return self._hit(visit, hit, b"", route.options.tags)
            return await self._endpoint(visit, body, name)
        if method not in METHODS or (route.endpoint in _POST_ONLY):
            raise _not_allowed(method, "POST" if route.endpoint else ", ".join(sorted(METHODS)))
        if route.endpoint == "chat" and method not in ("GET", "HEAD"):
            raise _not_allowed(method, "GET, POST")
        options = from_headers(route.options, _text(request.raw_headers))
        self._check_in_flight()
        return await self._passage.forward(request, route, visit.client, options, cors_headers(visit.origin))

    # -- the five endpoints -------------------------------------------------------------------------------------------

    async def _endpoint(self, visit: _Context, body: bytes, name: RequestDigest | None) -> Answer:
        """name: where no header asks for anything, by which the answer may be found again."""
        request = visit.request
        call = await self._proxy_request(visit, body, plain=name is not None)
        if visit.client.models:
            check_model(visit.client, call.model, *models_in_path(self._services.addresses, visit.route))
        served = await self._journey.handle(call, self._check_in_flight, name)
        if isinstance(served, CacheHit):
            comment = call.stream and (call.options.stream_cost or self._services.settings.cost.stream_comment)
            zero = cost_comment(Cost(_ZERO, "exact"), served.entry.usage) if comment else b""
            if served.stale:
                return self._stale(visit, served, zero)
            return self._hit(visit, served, zero, call.options.tags)
        reply = served
        head = (
            status_line(reply.status, reply.reason)
            + raw_lines(reply.headers)
            + lines_of(reply.proxy_headers).encode("latin-1", "replace")
            + cors_headers(visit.origin)
        )
        if reply.body is not None:
            return FullResponse(request, head, reply.body, status=reply.status)
        return await self._relay(request, head, reply)

    async def _relay(self, request: BaseRequest, head: bytes, reply: Reply) -> StreamedResponse:
        """Lets a stream flow to the client."""
        flow = reply.stream
        assert flow is not None
        names = {name.lower() for name, _ in reply.headers}
        if flow.audit is not None:
            if b"cache-control" not in names:
                head += b"Cache-Control: no-cache\r\n"
            if b"x-accel-buffering" not in names:
                head += b"X-Accel-Buffering: no\r\n"
        task = asyncio.current_task()
        assert task is not None
        self.traffic.streams[task] = flow
        stream = StreamingResponse(request, head, reply.status, trailers=TRAILERS if flow.audit is not None else "")
        if isinstance(flow, SubscriberStream):
            flow.push = stream.push
        try:
            await flow.relay(stream.write)
            charge = reply.charge
            cost = cost_headers(charge.cost, charge.usage, charge.savings) if charge is not None else ()
            return await stream.finish(lines_of(cost))
        except StreamBroken as broken:
            return stream.abort(broken.at_once)
        finally:
            flow.client_left()
            del self.traffic.streams[task]

    async def _proxy_request(self, visit: _Context, body: bytes, plain: bool) -> ProxyRequest:
        """The request, read and understood. Raises ProxyError(invalid_json, invalid_option)."""
        services, request, route = self._services, visit.request, visit.route
        raw = request.raw_headers
        options = route.options if plain else from_headers(route.options, _text(raw))
        document = await in_thread_if_large(len(body), parse_body, body)
        now = services.clock.monotonic()
        total = services.settings.timeouts.total if options.timeout is None else options.timeout
        own = _client_timeout(request)
        if own is not None:
            total = min(total, own - min(1.0, own / 10))
        patience = options.max_wait if options.max_wait is not None else services.settings.throttle.max_wait
        if patience is None:
            patience = max(0.0, (own if own is not None else total) - 5.0)
        return ProxyRequest.from_body(
            body,
            document,
            self._model_of,
            route=route,
            headers=raw,
            options=options,
            client=visit.client,
            id=services.clock.new_id(),
            arrived=now,
            deadline=now + total,
            max_wait=patience,
        )

    def _check_in_flight(self) -> None:
        """Refuses early and cheaply when too much is going on; those who wait in the queue are counted there."""
        limit = self._services.settings.server.max_in_flight
        if self.traffic.requests - self._services.admission.depth > limit:
            message = f"{limit} requests are being served already (server.max_in_flight)"
            raise ProxyError("overloaded", message, retry_after=1.0)

    # -- hits ---------------------------------------------------------------------------------------------------------

    def _hit(self, visit: _Context, hit: CacheHit, comment: bytes, tags: tuple[str, ...]) -> FullResponse:
        entry = hit.entry
        cached = self._heads.get((entry.key, entry.form))
        if cached is not None and cached[0] is entry:
            head = cached[1]
        else:
            head = self._render(entry)
            if len(self._heads) >= _KEEP:
                self._heads.clear()
            self._heads[entry.key, entry.form] = entry, head
        wall = self._services.clock.wall()
        spent = (self._services.clock.monotonic() - visit.began) * 1000
        sampled = "; detail=sampled" if entry.sampled else ""
        lines = (
            f"Age: {entry.age(wall)}\r\nCache-Status: openai-proxy; hit; ttl={entry.remaining(wall)}{sampled}\r\n"
            f"X-Proxy-Request-Id: {hit.id}\r\nServer-Timing: queue;dur=0.0, upstream;dur=0.0, proxy;dur={spent:.2f}\r\n"
            f"{lines_of(hit.headers)}"
        )
        body = with_comment(hit.body, comment) if comment else hit.body
        self._services.receipts.put_hit(hit.id, visit.client.name, entry, wall, hit.run, tags)
        self._metrics.record_hit(entry)
        self._hit_log.hit(hit.id, visit.client.name, entry, wall, visit.request.raw_headers)
        self._ledger.hit(entry, visit.client.name, tags, hit.run, wall, spent)
        head = head + self._dates.line() + lines.encode()
        if visit.origin is not None:
            head += cors_headers(visit.origin)
        return FullResponse(visit.request, head, body, status=entry.status)

    def _stale(self, visit: _Context, hit: CacheHit, comment: bytes) -> FullResponse:
        """An answer past its lifetime. Its receipt is written."""
        lines = lines_of(hit.headers + stale_headers(hit.entry, self._services.clock.wall(), hit.stale, hit.fwd))
        spent = Timing(total=(self._services.clock.monotonic() - visit.began) * 1000)
        lines += f"X-Proxy-Request-Id: {hit.id}\r\nServer-Timing: {spent.header()}\r\n"
        head = self._render(hit.entry, "stale", hit.attempts) + self._dates.line() + lines.encode()
        body = with_comment(hit.body, comment) if comment else hit.body
        return FullResponse(visit.request, head + cors_headers(visit.origin), body, status=hit.entry.status)

    def _render(self, entry: Entry, cache: str = "hit", attempts: int = 0) -> bytes:
        """The part of a hit's head that is the same every time."""
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

    # -- refusals and browsers ----------------------------------------------------------------------------------------

    def _error(self, request: BaseRequest, refusal: ProxyError, visit: _Context | None) -> FullResponse:
        """visit: None where not even the target can be read."""
        request_id = self._services.clock.new_id()
        if not refusal.proxy_headers:  # else its receipt was counted and logged
            self._metrics.record_refusal(refusal.code)
            if visit is None:
                self._ledger.refused(refusal.code, refusal.status, "", "")
            elif visit.route.kind != "own":
                self._ledger.refused(refusal.code, refusal.status, visit.client.name, visit.route.endpoint)
            fields = {
                "status": refusal.status,
                "id": request_id,
                "client": visit.client.name if visit is not None else "",
                "error": refusal.code,
                "traceparent": traceparent(request.raw_headers),
            }
            log_refusal(request.method, request.raw_path, fields)
        if visit is not None and visit.origin is not None:
            pairs = [line.split(": ", 1) for line in cors_headers(visit.origin).decode().splitlines()]
            refusal.headers = (*refusal.headers, *((name, value) for name, value in pairs))
        unread = not request.content.is_eof()
        return error_response(request, refusal, request_id, self._dates.line(), close=unread and refusal.status == 413)


_ZERO: Final = Decimal(0)


def _asks_something(raw: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether any header may change what we do: then the fast lane is closed."""
    return True in map(is_request_option, map(itemgetter(0), raw))


def _leaves_hits_alone(options: Options) -> bool:
    """Whether a hit is the same with these options of the base URL as without; the others choose which entry it is."""
    return options.max_age is None and not (options.stream_cost or options.run or options.max_cost is not None)


def _text(raw: Sequence[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in raw]


def _check_media_type(content_type: str, encoding: str | None) -> None:
    """Raises Refusal(unsupported_media_type) for anything but plain JSON: it also keeps browsers' simple requests
    out.
    """
    essence = content_type.partition(";")[0].strip().lower()
    if essence != "application/json" and not (essence.startswith("application/") and essence.endswith("+json")):
        raise ProxyError("unsupported_media_type", "Content-Type must be application/json", param="Content-Type")
    if encoding is not None and encoding.strip().lower() != "identity":
        raise ProxyError("unsupported_media_type", "request bodies must not be compressed", param="Content-Encoding")


def _client_timeout(request: BaseRequest) -> float | None:
    """Seconds after which the SDK gives up, as it says itself."""
    found = []
    for name in ("X-Stainless-Read-Timeout", "X-Stainless-Timeout"):
        text = request.headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            continue
        if 0 < seconds < 1e6:
            found.append(seconds)
    return min(found) if found else None


def _not_allowed(method: str, allow: str) -> ProxyError:
    message = f"method {printable(method, 20)} is not allowed here"
    return ProxyError("method_not_allowed", message, headers=(("Allow", allow),))
