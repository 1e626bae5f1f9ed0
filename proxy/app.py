"""`App`: the composition root. It builds everything from the settings; no other file knows all packages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from aiohttp.web import BaseRequest

from .accounting.ledger.ledger import Ledger
from .accounting.receipt import Receipt
from .cache.lookup import ResponseCache
from .cache.stores.build import max_stale
from .config.loader import LoadedSettings
from .config.settings import Settings
from .config.urls import parse_url
from .coordination import NO_COORDINATION, Coordination
from .observability import logs
from .observability.metrics import Metrics
from .pipeline.coalescing.coalescer import Coalescer
from .pipeline.coalescing.cross_process import CrossProcessFlight
from .pipeline.coalescing.flight_keys import FlightKeys
from .pipeline.coalescing.hit_for_miss import HitForMiss
from .pipeline.embeddings import EmbeddingsFetcher
from .pipeline.fetch import Fetcher
from .pipeline.handler import RequestHandler
from .pipeline.recorder import Recorder
from .pipeline.stale import BackgroundRevalidator, StaleFallback
from .pipeline.stream_replies import StreamReplies
from .protocol.errors import ProxyError
from .server.access import AccessControl
from .server.admin import AdminHandler
from .server.api import ApiHandler
from .server.in_flight import InFlight
from .server.passthrough import PassthroughHandler
from .server.responses import DateHeader, error_response
from .server.tracing import Tracing
from .server.upgrade import UpgradeHandler
from .services import Services, build_endpoint_sender, build_reservations, build_sender, build_services
from .system.clock import SYSTEM_CLOCK, Clock
from .system.tasks import spawn_forever
from .upstream.client import AiohttpTransport, ConnectOptions
from .upstream.endpoint_sender import EndpointSender
from .upstream.entra import EntraTokens, default_identity
from .upstream.reader import ResponseReader
from .workers.budgets import WorkerBudgets
from .workers.limiter import WorkerLimits
from .workers.worker import WorkerLink, WorkerOwners, WorkerRuns

log = logging.getLogger("proxy")

SWEEP_INTERVAL: float = 60.0
"""Seconds between two searches for expired entries in memory."""


class App:
    """All parts of one proxy process. link: to the supervisor, if it is one of several workers."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock = SYSTEM_CLOCK,
        link: WorkerLink | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._link = link
        self.metrics = Metrics()
        self.in_flight = InFlight(started=clock.wall())
        ledger = settings.ledger
        self.ledger = Ledger(ledger.path if ledger.enabled else None, clock)
        offline = settings.cache.mode == "replay"
        self.transport = AiohttpTransport(
            settings.timeouts.connect, settings.timeouts.idle, connect_options(settings), offline
        )
        self.tracing = tracing
        self._traced_transport = self.transport if tracing is None else tracing.transport(self.transport)
        self._dates = DateHeader(clock.wall)
        self._renewals: list[asyncio.Task[None]] = []
        self._build(build_services(settings, clock, coordination=_worker_coordination(link, clock)))

    def _build(self, services: Services) -> None:
        """Build all that depends on the services. Requests in flight keep the parts that they are in."""
        self.services = services
        access = AccessControl(services.settings)
        self.admin = AdminHandler(services, self.metrics, access, self.in_flight, self.ledger, self._link)
        sender = build_sender(services, self._traced_transport)
        reservations = build_reservations(services)
        endpoint_sender = build_endpoint_sender(services, sender, reservations)
        self.handler = build_handler(services, endpoint_sender, self._observers(services))
        passthrough = PassthroughHandler(services, sender, reservations, self._observe_passed)
        self.api = ApiHandler(
            services,
            self.handler,
            passthrough,
            UpgradeHandler(services, sender, passthrough, self.in_flight),
            self.admin,
            self.metrics,
            access,
            self.in_flight,
            self.ledger,
        )

    def apply(self, loaded: LoadedSettings) -> None:
        """Put other settings in force, in one step. Raises OSError, and then nothing has changed."""
        old, settings = self.services, loaded.settings
        services, options = build_services(settings, old.clock, old), connect_options(settings)
        self.transport.apply_settings(settings.timeouts.connect, settings.timeouts.idle, options)
        self._build(services)
        logs.configure(settings.log.level, settings.log.format, services.masker)
        self.start_tokens()

    def apply_from_supervisor(self, loaded: LoadedSettings) -> None:
        """Put settings in force that the supervisor has checked and logged."""
        try:
            self.apply(loaded)
        except OSError as error:
            log.error("reload: a worker cannot use the new settings, the old ones stay: %s", error)

    def start_tokens(self) -> list[EntraTokens]:
        """Renew the Entra ID tokens of these services, and no longer those of the services before."""
        for task in self._renewals:
            task.cancel()
        services, tokens = self.services, []
        for spec in services.settings.upstreams:
            if spec.entra_id:
                tokens.append(EntraTokens(partial(services.put_token, spec.name), services.clock, default_identity))
        self._renewals = [spawn_forever(token.run, "entra id") for token in tokens]
        return tokens

    def _observers(self, services: Services) -> tuple[Callable[[Receipt], None], ...]:
        """Return what takes note of every finished receipt."""
        observers = self.ledger.record, self.metrics.observe, logs.log_receipt
        return observers if self.tracing is None else (*observers, partial(self.tracing.observe, services=services))

    def _observe_passed(self, receipt: Receipt) -> None:
        """Take note of the receipt of a request that was passed through."""
        self.services.budgets.recorded(receipt)
        self.services.receipts.put(receipt)
        for observe in self._observers(self.services):
            observe(receipt)

    async def handle(self, request: BaseRequest) -> Any:
        if self.tracing is not None:
            return await self.tracing.handle(request, self.services, self.api.handle)
        return await self.api.handle(request)

    async def handle_ops(self, request: BaseRequest) -> Any:
        try:
            path = request.raw_path.partition("?")[0]
            return await self.admin.handle_probe(request, path)
        except ProxyError as error:
            return error_response(request, error, self.services.clock.new_id(), self._dates.line())

    async def sweep(self) -> None:
        """Remove expired entries from memory, a few at a time."""
        store, grace = self.services.store, max_stale(self.services.settings.cache)
        while True:
            await self.services.clock.sleep(SWEEP_INTERVAL)
            while store.sweep(self.services.clock.wall(), grace=grace):  # noqa: ASYNC110 - other tasks run in between
                await asyncio.sleep(0)


def build_handler(
    services: Services, sender: EndpointSender, observers: Sequence[Callable[[Receipt], None]]
) -> RequestHandler:
    """Return the handler of the five endpoints, built from below: each part is handed to those that use it.

    observers: are called with every finished receipt, when it has been counted.
    """
    settings, clock, masker = services.settings, services.clock, services.masker
    runs, budgets = services.runs, services.budgets
    recorder = Recorder(
        clock,
        services.clients,
        budgets,
        show_key=len(settings.server.client_keys) < 2,
        mask=masker.mask_text,
        observers=(runs.finished, budgets.recorded, services.receipts.put, *observers),
    )
    cache = ResponseCache(services.store, settings.cache, clock, identity=services.identities.of, mask=masker.mask_text)
    estimates = sender.estimates
    reader = ResponseReader(estimates, services.object_owners, services.pool, masker, clock, settings)
    flight_keys = FlightKeys(settings.cache, settings.cost)
    hit_for_miss = HitForMiss(clock.monotonic)
    streams = StreamReplies(
        reader,
        cache,
        recorder,
        estimates=estimates,
        flight_keys=flight_keys,
        hit_for_miss=hit_for_miss,
        counters=services.counters,
        settings=settings,
        clock=clock,
    )
    embeddings = EmbeddingsFetcher(sender, reader, cache, masker)
    fetcher = Fetcher(sender, reader, cache, embeddings=embeddings, streams=streams, recorder=recorder, masker=masker)
    locks = services.coordination.locks if settings.cache.coalesce else None
    coalescer = Coalescer(
        fetcher,
        cache,
        recorder,
        flight_keys=flight_keys,
        hit_for_miss=hit_for_miss,
        cross_process=CrossProcessFlight(locks, cache, services.store, clock) if locks is not None else None,
        settings=settings,
        clock=clock,
    )
    return RequestHandler(
        services.planner,
        cache,
        coalescer,
        stale_fallback=StaleFallback(cache, budgets, max_stale(settings.cache)),
        revalidator=BackgroundRevalidator(coalescer, recorder, clock, settings.timeouts.total),
        recorder=recorder,
        runs=runs,
        serving=services.identities.serving,
    )


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
    """Return, by origin, the proxy and CA file of upstreams that have one. Raises OSError."""
    return {
        parse_url(spec.base_url).origin: ConnectOptions(spec.proxy.reveal() if spec.proxy else None, spec.ca_file)
        for spec in settings.upstreams
        if spec.proxy or spec.ca_file
    }
