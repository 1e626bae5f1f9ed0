"""The admin routes: health, metrics, status, keys, usage, receipts, runs and the cache (docs/routes-and-errors.md)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import orjson
from aiohttp.web import BaseRequest

from .. import __version__
from ..accounting.ledger.ledger import Ledger
from ..accounting.receipt import Receipt
from ..config.render import plain
from ..observability.aggregate import Family, pools_joined, statuses_joined, usages_joined
from ..observability.event_counters import operator_action
from ..observability.metrics import Metrics
from ..protocol.errors import ProxyError
from ..protocol.routes import Route, printable, unknown_route
from ..services import Services
from ..workers.worker import WorkerLink
from .access import AccessControl
from .admin_cache import CacheAdmin
from .admin_usage import usage
from .in_flight import InFlight
from .peers import PeerWorkers
from .request_body import read_body
from .responses import DateHeader, FullResponse, status_line

_PROBES: Final = ("/healthz", "/readyz")
_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
_JSON_LINES: Final = "application/x-ndjson"
_RUNS: Final = "/_proxy/runs/"


class _Context(NamedTuple):
    """One request. rest: the decoded rest of the path, if the route ends in `/`; query: as it came."""

    request: BaseRequest
    rest: str
    query: str


class _AdminRoute(NamedTuple):
    """A route. If its path ends in `/`, one segment follows. guarded: for operators only."""

    answer: Callable[[_Context], Awaitable[FullResponse]]
    method: str = "GET"
    guarded: bool = True


class AdminHandler:
    """Serves the proxy's own routes. link: to the other workers, if there are any."""

    def __init__(
        self,
        services: Services,
        metrics: Metrics,
        access: AccessControl,
        in_flight: InFlight,
        ledger: Ledger,
        link: WorkerLink | None = None,
    ) -> None:
        self._services = services
        self._ledger = ledger
        self._metrics = metrics
        self._access = access
        self._date = DateHeader(services.clock.wall)
        self.peers = peers = PeerWorkers(link)
        self._cache = CacheAdmin(services, peers)
        self._routes: dict[str, _AdminRoute] = {
            "/metrics": _AdminRoute(self._metrics_text),
            "/_proxy/status": _AdminRoute(self._status),
            "/_proxy/keys": _AdminRoute(self._keys),
            "/_proxy/usage": _AdminRoute(self._usage),
            "/_proxy/requests/": _AdminRoute(self._receipt, guarded=False),
            "/_proxy/limits/reset": _AdminRoute(self._reset_limits, "POST"),
            _RUNS: _AdminRoute(self._run),
            "/_proxy/cache": _AdminRoute(self._list_entries),
            "/_proxy/cache/": _AdminRoute(self._show_entry),
            "/_proxy/cache/purge": _AdminRoute(self._purge, "POST"),
            "/_proxy/cache/import": _AdminRoute(self._import, "POST"),
            "/_proxy/cache/explain": _AdminRoute(self._explain, "POST"),
        }
        self._in_flight = in_flight
        peers.answer(
            {
                "receipt": self._own_receipt,
                "metrics": self._own_metrics,
                "status": self._own_status,
                "pool": self._own_pool,
                "reset": self._reset,
                "totals": self._own_totals,
                **self._cache.for_peers(),
            }
        )

    async def handle(self, request: BaseRequest, route: Route) -> FullResponse:
        """Serve a request of the main listener to one of the proxy's own routes. Raises ProxyError."""
        path = route.path
        admin_route, rest = self._routes.get(path), ""
        if admin_route is None:
            parent, _, rest = path.rpartition("/")
            if path.startswith(_RUNS):
                parent, rest = _RUNS[:-1], path.removeprefix(_RUNS)  # the name of a run may contain slashes
            admin_route = self._routes.get(parent + "/") if rest else None
        if admin_route is not None and admin_route.method == "POST":
            _check_method(request, "POST")
        else:
            _check_method(request, "GET", "HEAD")
        if path in _PROBES:
            return self._probe(request, path)
        self._access.check_host(request)
        self._access.check_origin(request)
        if admin_route is None or admin_route.guarded:
            self._access.check_admin(request)
        if admin_route is None:
            raise unknown_route(path)
        return await admin_route.answer(_Context(request, unquote(rest), route.query))

    async def handle_probe(self, request: BaseRequest, path: str) -> FullResponse:
        """Serve a request of the listener `server.ops`: probes and metrics, with any Host and no key."""
        _check_method(request, "GET", "HEAD")
        if path in _PROBES:
            return self._probe(request, path)
        if path == "/metrics":
            return await self._metrics_response(request)
        raise unknown_route(path)

    def _probe(self, request: BaseRequest, path: str) -> FullResponse:
        if path == "/readyz" and self._in_flight.draining:
            return self._json(request, {"status": "draining"}, status=503)
        return self._json(request, {"status": "ok" if path == "/healthz" else "ready"})

    async def _reset_limits(self, context: _Context) -> FullResponse:
        """Empty all limit windows, also those of clients. Requests in flight and budgets are not reset."""
        if self._services.limiter is not None:
            self._services.limiter.reset()
        await self._reset()
        await self.peers.ask("reset")
        operator_action("limits reset", self._access.operator(context.request), "all windows of all limits")
        return self._json(context.request, {"reset": True})

    async def _reset(self, _: bytes = b"") -> None:
        self._services.pool.reset()
        self._services.clients.reset()
        self._services.admission.wake()

    async def _metrics_text(self, context: _Context) -> FullResponse:
        return await self._metrics_response(context.request)

    async def _status(self, context: _Context) -> FullResponse:
        status, others = await self._own_status(), await self.peers.ask("status")
        if self.peers.any:
            store = self._services.store
            status = statuses_joined([status, *others], store.slower is not None)
        return self._json(context.request, status)

    async def _keys(self, context: _Context) -> FullResponse:
        return self._json(context.request, pools_joined([self._pool(), *await self.peers.ask("pool")]))

    async def _usage(self, context: _Context) -> FullResponse:
        others = await self.peers.ask("totals")  # first, because this also writes their rows to the ledger
        own = await usage(self._ledger, context.query, self._services.clock.wall())
        return self._json(context.request, usages_joined(own, others) if others else own)

    async def _list_entries(self, context: _Context) -> FullResponse:
        return self._json(context.request, await self._cache.list(context.query))

    async def _show_entry(self, context: _Context) -> FullResponse:
        shown = await self._cache.show(context.rest, context.query)
        if isinstance(shown, bytes):
            return self._response(context.request, shown, _JSON_LINES)
        return self._json(context.request, shown)

    async def _purge(self, context: _Context) -> FullResponse:
        return self._json(
            context.request, await self._cache.purge(await self._body(context), self._access.operator(context.request))
        )

    async def _import(self, context: _Context) -> FullResponse:
        return self._json(
            context.request,
            await self._cache.import_lines(await self._body(context), self._access.operator(context.request)),
        )

    async def _explain(self, context: _Context) -> FullResponse:
        body, raw = await self._body(context), context.request.raw_headers
        return self._json(context.request, await self._cache.explain(context.query, raw, body))

    async def _body(self, context: _Context) -> bytes:
        return await read_body(context.request, self._services.settings.server.max_body)

    async def _metrics_response(self, request: BaseRequest) -> FullResponse:
        text = self._metrics.render(self._services, self._in_flight.requests)
        if self.peers.any:
            text = await self.peers.metrics(self._metrics.registry)
        return self._response(request, text, _TEXT)

    def own_metrics(self) -> list[Family]:
        """Return this worker's metrics."""
        self._metrics.render(self._services, self._in_flight.requests)
        return self.peers.own_metrics(self._metrics.registry)

    async def _receipt(self, context: _Context) -> FullResponse:
        """Show a receipt to operators, and to the client key that made the request."""
        request, id_ = context.request, context.rest
        receipt = self._services.receipts.get(id_) or await self.peers.receipt(id_)
        if not self._access.is_admin(request):
            client = self._access.client(request)
            if not client.name:
                self._access.check_admin(request)
            if receipt is not None and receipt.client != client.name:
                receipt = None
        if receipt is None:
            message = f"there is no receipt with the id {printable(id_)}; only the last requests have one"
            raise ProxyError("unknown_route", message)
        return self._json(request, receipt.as_json())

    async def _run(self, context: _Context) -> FullResponse:
        report = await self._services.runs.report(context.rest)
        if report is None:
            message = f"there is no run with the name {printable(context.rest)}; only the last runs are remembered"
            raise ProxyError("unknown_route", message)
        return self._json(context.request, report)

    # -- answers to other workers -------------------------------------------------------------------------------------

    async def _own_receipt(self, id_: bytes) -> Receipt | None:
        return self._services.receipts.get(id_.decode("utf-8", "surrogateescape"))

    async def _own_metrics(self, _: bytes) -> list[Family]:
        return self.own_metrics()

    async def _own_totals(self, _: bytes) -> dict[str, Any]:
        return await self._ledger.totals()

    async def _own_pool(self, _: bytes) -> dict[str, Any]:
        return self._pool()

    async def _own_status(self, _: bytes = b"") -> dict[str, Any]:
        status = await self.status()
        return status | {"worker": self.peers.number, "pid": os.getpid()} if self.peers.any else status

    async def status(self) -> dict[str, Any]:
        """Return this process's settings, without secrets, and its state."""
        services = self._services
        settings, prices = services.settings, services.upstreams[0].prices
        today = datetime.fromtimestamp(services.clock.wall(), UTC).date()
        return {
            "version": __version__,
            "address": self._in_flight.address,
            "uptime_s": round(services.clock.wall() - self._in_flight.started, 1),
            "state": "draining" if self._in_flight.draining else "ready",
            "pass_through": services.passthrough,
            "in_flight": self._in_flight.requests,
            "queue": {"waiting": services.admission.depth},
            "clients": services.clients.report(services.clock.monotonic()),
            "budgets": services.budgets.report(),
            "keys": services.pool.counts_by_state(services.clock.monotonic()),
            "cache": await services.store.stats() if services.store.enabled else None,
            "prices": {"as_of": prices.as_of, "age_days": prices.age(today)},
            "settings": plain(settings),
        }

    def _pool(self) -> dict[str, Any]:
        """Return the keys, by label, and the circuit breakers of the upstreams."""
        services = self._services
        now = services.clock.monotonic()
        return {
            "keys": services.pool.report(now),
            "upstreams": [
                {
                    "name": upstream.address.name,
                    "state": upstream.breaker.state(now),
                    "until_s": round(upstream.breaker.wait(now), 3),
                }
                for upstream in services.upstreams
            ],
        }

    def _json(self, request: BaseRequest, document: object, status: int = 200) -> FullResponse:
        return self._response(request, orjson.dumps(document), "application/json", status)

    def _response(self, request: BaseRequest, body: bytes, content_type: str, status: int = 200) -> FullResponse:
        head = status_line(status) + self._date.line()
        head += f"Content-Type: {content_type}\r\nCache-Control: no-store\r\n".encode()
        return FullResponse(request, head, body, status=status)


def _check_method(request: BaseRequest, *allowed: str) -> None:
    if request.method not in allowed:
        message = f"method {printable(request.method, 20)} is not allowed here; use {allowed[0]}"
        raise ProxyError("method_not_allowed", message, headers=(("Allow", ", ".join(allowed)),))
