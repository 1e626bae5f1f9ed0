"""The routes for operators: health, metrics, and what the proxy knows of itself, its keys and a finished request."""

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
from .responses import DateHeader, FullResponse, read_body, status_line

_PROBES: Final = ("/healthz", "/readyz")
_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
_LINES: Final = "application/x-ndjson"
_RUNS: Final = "/_proxy/runs/"


class _Context(NamedTuple):
    """One request to a page. rest: the last segment of the path where the page is for many, decoded; query: raw."""

    request: BaseRequest
    rest: str
    query: str


class _AdminRoute(NamedTuple):
    """A route, by its path; one that ends in `/` has one more segment. guarded: for operators alone, else its own
    matter.
    """

    answer: Callable[[_Context], Awaitable[FullResponse]]
    method: str = "GET"
    guarded: bool = True


class AdminHandler:
    """Answers `own` routes."""

    def __init__(
        self,
        services: Services,
        metrics: Metrics,
        gatekeeper: AccessControl,
        traffic: InFlight,
        ledger: Ledger,
        seat: WorkerLink | None = None,
    ) -> None:
        self._services = services
        self._ledger = ledger
        self._metrics = metrics
        self._gatekeeper = gatekeeper
        self._dates = DateHeader(services.clock.wall)
        self.siblings = siblings = PeerWorkers(seat)
        self._cache = CacheAdmin(services, siblings)
        self._pages: dict[str, _AdminRoute] = {
            "/metrics": _AdminRoute(self._metrics_text),
            "/_proxy/status": _AdminRoute(self._status),
            "/_proxy/keys": _AdminRoute(self._keys),
            "/_proxy/usage": _AdminRoute(self._usage),
            "/_proxy/requests/": _AdminRoute(self._receipt, guarded=False),
            "/_proxy/limits/reset": _AdminRoute(self._reset_limits, "POST"),
            _RUNS: _AdminRoute(self._run),
            "/_proxy/cache": _AdminRoute(self._cached),
            "/_proxy/cache/": _AdminRoute(self._cached_one),
            "/_proxy/cache/purge": _AdminRoute(self._purge, "POST"),
            "/_proxy/cache/import": _AdminRoute(self._import, "POST"),
            "/_proxy/cache/explain": _AdminRoute(self._explain, "POST"),
        }
        self._traffic = traffic
        siblings.answer(
            {
                "receipt": self._own_receipt,
                "metrics": self._own_counts,
                "status": self._own_status,
                "pool": self._own_pool,
                "reset": self._reset,
                "totals": self._own_totals,
                **self._cache.for_peers(),
            }
        )

    async def handle(self, request: BaseRequest, route: Route) -> FullResponse:
        """One request to an `own` route of the main listener. Raises ProxyError."""
        path = route.path
        page, rest = self._pages.get(path), ""
        if page is None:
            stem, _, rest = path.rpartition("/")
            if path.startswith(_RUNS):
                stem, rest = _RUNS[:-1], path.removeprefix(_RUNS)  # a run's name may hold slashes
            page = self._pages.get(stem + "/") if rest else None
        method = "POST" if page is not None and page.method == "POST" else "GET"
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            allowed = "GET, HEAD" if method == "GET" else method
            message = f"only {method} is allowed here"
            raise ProxyError("method_not_allowed", message, headers=(("Allow", allowed),))
        if path in _PROBES:
            return self._probe(request, path)
        self._gatekeeper.check_host(request)
        self._gatekeeper.check_origin(request)
        if page is None or page.guarded:
            self._gatekeeper.check_admin(request)
        if page is None:
            raise unknown_route(path)
        return await page.answer(_Context(request, unquote(rest), route.query))

    async def handle_probe(self, request: BaseRequest, path: str) -> FullResponse:
        """One request to the second listener, `server.ops`: probes and metrics only, any Host, no key."""
        if request.method not in ("GET", "HEAD"):
            raise ProxyError("method_not_allowed", "only GET is allowed here", headers=(("Allow", "GET, HEAD"),))
        if path in _PROBES:
            return self._probe(request, path)
        if path == "/metrics":
            return await self._metrics_page(request)
        raise unknown_route(path)

    def _probe(self, request: BaseRequest, path: str) -> FullResponse:
        if path == "/readyz" and self._traffic.draining:
            return self._json(request, {"status": "draining"}, status=503)
        return self._json(request, {"status": "ok" if path == "/healthz" else "ready"})

    async def _reset_limits(self, visit: _Context) -> FullResponse:
        """Every window starts afresh, those of clients too; what is at work keeps its permits. Budgets are not reset:
        money spent is spent.
        """
        if self._services.limiter is not None:
            self._services.limiter.reset()
        await self._reset()
        await self.siblings.ask("reset")
        return self._json(visit.request, {"reset": True})

    async def _reset(self, _: bytes = b"") -> None:
        self._services.pool.reset()
        self._services.clients.reset()
        self._services.admission.wake()

    async def _metrics_text(self, visit: _Context) -> FullResponse:
        return await self._metrics_page(visit.request)

    async def _status(self, visit: _Context) -> FullResponse:
        status, others = await self._own_status(), await self.siblings.ask("status")
        if self.siblings.any:
            store = self._services.store
            status = statuses_joined([status, *others], store.slower is not None)
        return self._json(visit.request, status)

    async def _keys(self, visit: _Context) -> FullResponse:
        return self._json(visit.request, pools_joined([self._pool(), *await self.siblings.ask("pool")]))

    async def _usage(self, visit: _Context) -> FullResponse:
        others = await self.siblings.ask("totals")  # first: they write down what they have not yet
        mine = await usage(self._ledger, visit.query, self._services.clock.wall())
        return self._json(visit.request, usages_joined(mine, others) if others else mine)

    async def _cached(self, visit: _Context) -> FullResponse:
        return self._json(visit.request, await self._cache.list(visit.query))

    async def _cached_one(self, visit: _Context) -> FullResponse:
        found = await self._cache.show(visit.rest, visit.query)
        if isinstance(found, bytes):
            return self._answer(visit.request, found, _LINES)
        return self._json(visit.request, found)

    async def _purge(self, visit: _Context) -> FullResponse:
        return self._json(visit.request, await self._cache.purge(await self._body(visit)))

    async def _import(self, visit: _Context) -> FullResponse:
        return self._json(visit.request, await self._cache.take(await self._body(visit)))

    async def _explain(self, visit: _Context) -> FullResponse:
        body, raw = await self._body(visit), visit.request.raw_headers
        return self._json(visit.request, await self._cache.explain(visit.query, raw, body))

    async def _body(self, visit: _Context) -> bytes:
        return await read_body(visit.request, self._services.settings.server.max_body)

    async def _metrics_page(self, request: BaseRequest) -> FullResponse:
        text = self._metrics.render(self._services, self._traffic.requests)
        if self.siblings.any:  # its gauges are set by now
            text = await self.siblings.metrics(self._metrics.registry)
        return self._answer(request, text, _TEXT)

    def counts(self) -> list[Family]:
        """This worker's metrics."""
        self._metrics.render(self._services, self._traffic.requests)
        return self.siblings.own_metrics(self._metrics.registry)

    async def _receipt(self, visit: _Context) -> FullResponse:
        """A receipt is for operators and for the client key that made the request."""
        request, id_ = visit.request, visit.rest
        receipt = self._services.receipts.get(id_) or await self.siblings.receipt(id_)
        if not self._gatekeeper.is_admin(request):
            client = self._gatekeeper.client(request)
            if not client.name:
                self._gatekeeper.check_admin(request)
            if receipt is None or receipt.client != client.name:
                raise ProxyError("unknown_route", f"no receipt of this id is kept: {printable(id_)}")
        if receipt is None:
            raise ProxyError("unknown_route", f"no receipt of this id is kept: {printable(id_)}")
        return self._json(request, receipt.as_json())

    async def _run(self, visit: _Context) -> FullResponse:
        report = await self._services.runs.report(visit.rest)
        if report is None:
            raise ProxyError("unknown_route", f"no run of this name is remembered: {printable(visit.rest)}")
        return self._json(visit.request, report)

    # -- for the other workers ----------------------------------------------------------------------------------------

    async def _own_receipt(self, id_: bytes) -> Receipt | None:
        return self._services.receipts.get(id_.decode("utf-8", "surrogateescape"))

    async def _own_counts(self, _: bytes) -> list[Family]:
        return self.counts()

    async def _own_totals(self, _: bytes) -> dict[str, Any]:
        return await self._ledger.totals()

    async def _own_pool(self, _: bytes) -> dict[str, Any]:
        return self._pool()

    async def _own_status(self, _: bytes = b"") -> dict[str, Any]:
        status = await self.status()
        return status | {"worker": self.siblings.number, "pid": os.getpid()} if self.siblings.any else status

    async def status(self) -> dict[str, Any]:
        """Settings in force, without secrets, and how things stand."""
        services = self._services
        settings, prices = services.settings, services.upstreams[0].prices
        today = datetime.fromtimestamp(services.clock.wall(), UTC).date()
        return {
            "version": __version__,
            "address": self._traffic.address,
            "uptime_s": round(services.clock.wall() - self._traffic.started, 1),
            "state": "draining" if self._traffic.draining else "ready",
            "pass_through": services.passthrough,
            "in_flight": self._traffic.requests,
            "queue": {"waiting": services.admission.depth},
            "clients": services.clients.report(services.clock.monotonic()),
            "budgets": services.budgets.report(),
            "keys": services.pool.counts_by_state(services.clock.monotonic()),
            "cache": await services.store.stats() if services.store.enabled else None,
            "prices": {"as_of": prices.as_of, "age_days": prices.age(today)},
            "settings": plain(settings),
        }

    def _pool(self) -> dict[str, Any]:
        """The pool: keys by their labels, never the keys; and which upstreams are left alone."""
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
        return self._answer(request, orjson.dumps(document), "application/json", status)

    def _answer(self, request: BaseRequest, body: bytes, content_type: str, status: int = 200) -> FullResponse:
        head = status_line(status) + self._dates.line()
        head += f"Content-Type: {content_type}\r\nCache-Control: no-store\r\n".encode()
        return FullResponse(request, head, body, status=status)
