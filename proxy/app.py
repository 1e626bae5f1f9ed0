"""The composition root: settings become objects, objects become a running proxy, and a signal ends it in order.

The only file that knows everybody.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from aiohttp.web import BaseRequest, Server

from .accounting.ledger.ledger import Ledger
from .accounting.receipt import Receipt
from .cache.stores.build import max_stale
from .config.loader import LoadedSettings
from .config.settings import Settings
from .config.urls import parse_url
from .coordination import NO_COORDINATION, Coordination
from .observability import logs
from .observability.metrics import Metrics
from .pipeline.handler import RequestHandler
from .protocol.errors import ProxyError
from .server.access import AccessControl
from .server.admin import AdminHandler
from .server.api import ApiHandler
from .server.in_flight import InFlight
from .server.passthrough import PassthroughHandler
from .server.responses import DateHeader, error_response
from .server.tracing import Tracing
from .services import Services, build_endpoint_sender, build_reservations, build_sender, build_services
from .system.clock import SYSTEM_CLOCK, Clock, spawn
from .upstream.client import AiohttpTransport, ConnectOptions
from .upstream.entra import EntraTokens, default_identity
from .workers.budgets import WorkerBudgets
from .workers.limiter import WorkerLimits
from .workers.worker import WorkerLink, WorkerOwners, WorkerRuns

log = logging.getLogger("proxy")

SWEEP_INTERVAL: float = 60.0
"""Seconds between two looks for entries whose time is over (contract 7: gone within 10 minutes of their end)."""


class App:
    """Everything one proxy is made of. `handle` is the main listener's handler."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock = SYSTEM_CLOCK,
        seat: WorkerLink | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._seat = seat
        self.metrics = Metrics()
        self.traffic = InFlight(started=clock.wall())
        ledger = settings.ledger
        self.ledger = Ledger(ledger.path if ledger.enabled else None, clock)
        offline = settings.cache.mode == "replay"
        self.transport = AiohttpTransport(
            settings.timeouts.connect, settings.timeouts.idle, connect_options(settings), offline
        )
        self.tracing = tracing
        self._traced_way_up = self.transport if tracing is None else tracing.transport(self.transport)
        self._dates = DateHeader(clock.wall)
        self._renewals: list[asyncio.Task[None]] = []
        self._build(build_services(settings, clock, coordination=_worker_coordination(seat, clock)))

    def _build(self, services: Services) -> None:
        """Everything that stands in this world. What is in flight keeps the rooms it is in."""
        self.services = services
        gatekeeper = AccessControl(services.settings)
        self.ops = AdminHandler(services, self.metrics, gatekeeper, self.traffic, self.ledger, self._seat)
        sender = build_sender(services, self._traced_way_up)
        reservations = build_reservations(services)
        endpoint_sender = build_endpoint_sender(services, sender, reservations)
        self.journey = RequestHandler(services, endpoint_sender, self._observe)
        self.downstream = ApiHandler(
            services,
            self.journey,
            PassthroughHandler(services, sender, reservations, self._observe_and_keep),
            self.ops,
            self.metrics,
            gatekeeper,
            self.traffic,
            self.ledger,
        )

    def apply(self, loaded: LoadedSettings) -> None:
        """Puts other settings in force, in one step. Raises OSError, and then nothing has changed."""
        old, settings = self.services, loaded.settings
        services, found = build_services(settings, old.clock, old), connect_options(settings)
        self.transport.apply_settings(settings.timeouts.connect, settings.timeouts.idle, found)
        self._build(services)
        logs.configure(settings.log.level, settings.log.format, services.masker)
        self.start_tokens()

    def apply_from_supervisor(self, loaded: LoadedSettings) -> None:
        """As `use`, by the parent, which has checked them and logged what is to be logged."""
        try:
            self.apply(loaded)
        except OSError as error:
            log.error("reload: a worker cannot use the new settings, the old ones stay: %s", error)

    def start_tokens(self) -> list[EntraTokens]:
        """Has the Entra ID tokens of this world renewed, and no longer those of the one before."""
        for task in self._renewals:
            task.cancel()
        services, tokens = self.services, []
        for spec in services.settings.upstreams:
            if spec.entra_id:
                tokens.append(EntraTokens(partial(services.put_token, spec.name), services.clock, default_identity))
        self._renewals = [spawn(one.run(), "entra id") for one in tokens]
        return tokens

    def _observe(self, receipt: Receipt) -> None:
        self.metrics.observe(receipt)
        self.ledger.record(receipt)
        logs.log_receipt(receipt)
        if self.tracing is not None:
            self.tracing.observe(receipt, self.services)

    def _observe_and_keep(self, receipt: Receipt) -> None:
        self.services.receipts.put(receipt)
        self._observe(receipt)

    async def handle(self, request: BaseRequest) -> Any:
        if self.tracing is not None:
            return await self.tracing.handle(request, self.services, self.downstream.handle)
        return await self.downstream.handle(request)

    async def handle_ops(self, request: BaseRequest) -> Any:
        try:
            path = request.raw_path.partition("?")[0]
            return await self.ops.handle_probe(request, path)
        except ProxyError as refusal:
            return error_response(request, refusal, self.services.clock.new_id(), self._dates.line())

    async def sweep(self) -> None:
        """Takes entries out of memory whose time is over; a little at a time."""
        store, grace = self.services.store, max_stale(self.services.settings.cache)
        while store.enabled:
            await self.services.clock.sleep(SWEEP_INTERVAL)
            while store.sweep(self.services.clock.wall(), grace=grace):  # noqa: ASYNC110 - lets others run in between
                await asyncio.sleep(0)

    def _is_busy(self, server: Server) -> bool:
        """Whether a request is being served, an answer is read for the cache, or is not wholly handed to the system."""
        if self.traffic.requests or len(self.journey.coalescer.flights):
            return True
        transports = (connection.transport for connection in server.connections)
        return any(transport is not None and transport.get_write_buffer_size() for transport in transports)

    async def drain(self, server: Server, now: asyncio.Event) -> None:
        """Lets what is being served finish, within `drain_timeout`; then tells streams and drops the rest."""
        self.traffic.closing = True
        limit = self.services.settings.server.drain_timeout
        loop = asyncio.get_running_loop()
        end = loop.time() + limit
        # A look now and then: an event would have to be set on the hot path.
        while self._is_busy(server) and loop.time() < end and not now.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        if count := self.traffic.requests:
            cause = "second signal" if now.is_set() else f"server.drain_timeout ({limit:g}s) is over"
            log.warning("%s: cutting off %d request%s in flight", cause, count, "" if count == 1 else "s")
        for task, flow in list(self.traffic.streams.items()):
            flow.interrupted = "draining"
            task.cancel()
        tasks = list(self.traffic.streams)
        if tasks:
            await asyncio.wait(tasks, timeout=0.5)


def _worker_coordination(link: WorkerLink | None, clock: Clock) -> Coordination:
    """Return the ports to the other workers, over the supervisor; none if there are no workers."""
    if link is None:
        return NO_COORDINATION
    return Coordination(
        limits=WorkerLimits(link, clock.monotonic),
        budgets=WorkerBudgets(link),
        runs=WorkerRuns(link),
        owners=WorkerOwners(link),
    )


def connect_options(settings: Settings) -> dict[str, ConnectOptions]:
    """By origin, how those upstreams are reached that are not reached directly. Raises OSError."""
    return {
        parse_url(spec.base_url).origin: ConnectOptions(spec.proxy.reveal() if spec.proxy else None, spec.ca_file)
        for spec in settings.upstreams
        if spec.proxy or spec.ca_file
    }
