"""The routes for operators: health, metrics, and what the proxy knows of itself, its keys and a finished request."""

from __future__ import annotations

from typing import Any, Final

import orjson
from aiohttp.web import BaseRequest

from .. import __version__
from ..config.render import plain
from ..core.errors import Refusal
from ..core.routes import Route, unknown_route
from ..world import World
from .gatekeeper import Gatekeeper
from .metrics import Metrics
from .wire import Dates, Whole, status_line

_PROBES: Final = ("/healthz", "/readyz")
_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"


class Ops:
    """Answers `own` routes. draining: set when SIGTERM came; address: shown in the status."""

    def __init__(self, world: World, metrics: Metrics, gatekeeper: Gatekeeper) -> None:
        self._world = world
        self._metrics = metrics
        self._gatekeeper = gatekeeper
        self._dates = Dates(world.seams.wall)
        self._started = world.seams.wall()
        self.draining = False
        self.address = ""

    async def handle(self, request: BaseRequest, route: Route, in_flight: int) -> Whole:
        """One request to an `own` route of the main listener. Raises Refusal."""
        path = route.path
        if request.method not in ("GET", "HEAD"):
            raise Refusal("method_not_allowed", "only GET is allowed here", headers=(("Allow", "GET, HEAD"),))
        if path in _PROBES:
            return self._probe(request, path)
        self._gatekeeper.check_host(request)
        self._gatekeeper.check_origin(request)
        if path.startswith("/_proxy/requests/"):
            return self._receipt(request, path.removeprefix("/_proxy/requests/"))
        self._gatekeeper.check_admin(request)
        if path == "/metrics":
            return self._metrics_page(request, in_flight)
        if path == "/_proxy/status":
            return self._json(request, await self.status(in_flight))
        if path == "/_proxy/keys":
            return self._json(request, self._keys())
        raise unknown_route(path)

    async def handle_probe(self, request: BaseRequest, path: str, in_flight: int) -> Whole:
        """One request to the second listener, `server.ops`: probes and metrics only, any Host, no key."""
        if request.method not in ("GET", "HEAD"):
            raise Refusal("method_not_allowed", "only GET is allowed here", headers=(("Allow", "GET, HEAD"),))
        if path in _PROBES:
            return self._probe(request, path)
        if path == "/metrics":
            return self._metrics_page(request, in_flight)
        raise unknown_route(path)

    def _probe(self, request: BaseRequest, path: str) -> Whole:
        if path == "/readyz" and self.draining:
            return self._json(request, {"status": "draining"}, status=503)
        return self._json(request, {"status": "ok" if path == "/healthz" else "ready"})

    def _metrics_page(self, request: BaseRequest, in_flight: int) -> Whole:
        return self._answer(request, self._metrics.render(self._world, in_flight), _TEXT)

    def _receipt(self, request: BaseRequest, id_: str) -> Whole:
        """A receipt is for operators and for the client key that made the request."""
        receipt = self._world.receipts.get(id_)
        if not self._gatekeeper.is_admin(request):
            client = self._gatekeeper.client(request)
            if not client.name:
                self._gatekeeper.check_admin(request)
            if receipt is None or receipt.client != client.name:
                raise unknown_route(f"/_proxy/requests/{id_}")
        if receipt is None:
            raise unknown_route(f"/_proxy/requests/{id_}")
        return self._json(request, receipt.as_json())

    async def status(self, in_flight: int) -> dict[str, Any]:
        """Settings in force, without secrets, and how things stand."""
        world = self._world
        settings = world.settings
        return {
            "version": __version__,
            "address": self.address,
            "uptime_s": round(world.seams.wall() - self._started, 1),
            "state": "draining" if self.draining else "ready",
            "pass_through": world.passthrough,
            "in_flight": in_flight,
            "queue": {"waiting": world.gate.depth},
            "keys": world.ring.counts(world.seams.monotonic()),
            "cache": await world.store.stats() if world.store is not None else None,
            "prices": {"as_of": world.upstreams[0].prices.as_of},
            "settings": plain(settings),
        }

    def _keys(self) -> dict[str, Any]:
        """The pool: keys by their labels, never the keys; and which upstreams are left alone."""
        world = self._world
        now = world.seams.monotonic()
        return {
            "keys": world.ring.report(now),
            "upstreams": [
                {
                    "name": upstream.site.name,
                    "state": upstream.breaker.state(now),
                    "until_s": round(upstream.breaker.wait(now), 3),
                }
                for upstream in world.upstreams
            ],
        }

    def _json(self, request: BaseRequest, document: object, status: int = 200) -> Whole:
        return self._answer(request, orjson.dumps(document), "application/json", status)

    def _answer(self, request: BaseRequest, body: bytes, content_type: str, status: int = 200) -> Whole:
        head = status_line(status) + self._dates.line()
        head += f"Content-Type: {content_type}\r\nCache-Control: no-store\r\n".encode()
        return Whole(request, head, body, status=status)
