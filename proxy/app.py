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
from .cache.stores.build import kept_past_end
from .config.loader import Loaded
from .config.settings import Settings
from .config.urls import parse_url
from .observability import logs
from .observability.metrics import Metrics
from .pipeline.handler import Journey
from .protocol.errors import Refusal
from .server.access import Gatekeeper
from .server.admin import Ops
from .server.api import Downstream
from .server.in_flight import Traffic
from .server.passthrough import Passage
from .server.responses import Dates, refused
from .server.tracing import Tracing
from .services import Commons, World, compile_world
from .system.clock import REAL, Seams, spawn
from .upstream.client import Outlet, Upstreams
from .upstream.entra import EntraTokens, default_identity
from .workers.budgets import SeatBudgets
from .workers.limiter import SeatLimiter
from .workers.worker import Seat, SeatObjects, SeatRuns

log = logging.getLogger("proxy")

SWEEP: float = 60.0
"""Seconds between two looks for entries whose time is over (contract 7: gone within 10 minutes of their end)."""


class App:
    """Everything one proxy is made of. `handle` is the main listener's handler."""

    def __init__(
        self, settings: Settings, seams: Seams = REAL, seat: Seat | None = None, tracing: Tracing | None = None
    ) -> None:
        self._seat = seat
        self.metrics = Metrics()
        self.traffic = Traffic(started=seams.wall())
        ledger = settings.ledger
        self.ledger = Ledger(ledger.path if ledger.enabled else None, seams)
        sealed = settings.cache.mode == "replay"
        self.way_up = Upstreams(settings.timeouts.connect, settings.timeouts.idle, outlets(settings), sealed)
        self.tracing = tracing
        self._traced_way_up = self.way_up if tracing is None else tracing.way_up(self.way_up)
        self._dates = Dates(seams.wall)
        self._renewals: list[asyncio.Task[None]] = []
        self._furnish(compile_world(settings, seams, commons=_commons(seat, seams)))

    def _furnish(self, world: World) -> None:
        """Everything that stands in this world. What is in flight keeps the rooms it is in."""
        self.world = world
        gatekeeper = Gatekeeper(world.settings)
        self.ops = Ops(world, self.metrics, gatekeeper, self.traffic, self.ledger, self._seat)
        self.journey = Journey(world, self._traced_way_up, self._observe)
        self.downstream = Downstream(
            world,
            self.journey,
            Passage(world, self._traced_way_up, self._keep),
            self.ops,
            self.metrics,
            gatekeeper,
            self.traffic,
            self.ledger,
        )

    def use(self, loaded: Loaded) -> None:
        """Puts other settings in force, in one step. Raises OSError, and then nothing has changed."""
        old, settings = self.world, loaded.settings
        world, found = compile_world(settings, old.seams, old), outlets(settings)
        self.way_up.set(settings.timeouts.connect, settings.timeouts.idle, found)
        self._furnish(world)
        logs.configure(settings.log.level, settings.log.format, world.masker)
        self.start_tokens()

    def told(self, loaded: Loaded) -> None:
        """As `use`, by the parent, which has checked them and logged what is to be logged."""
        try:
            self.use(loaded)
        except OSError as error:
            log.error("reload: a worker cannot use the new settings, the old ones stay: %s", error)

    def start_tokens(self) -> list[EntraTokens]:
        """Has the Entra ID tokens of this world renewed, and no longer those of the one before."""
        for task in self._renewals:
            task.cancel()
        world, tokens = self.world, []
        for spec in world.settings.upstreams:
            if spec.entra_id:
                tokens.append(EntraTokens(partial(world.put_token, spec.name), world.seams, default_identity))
        self._renewals = [spawn(one.run(), "entra id") for one in tokens]
        return tokens

    def _observe(self, receipt: Receipt) -> None:
        self.metrics.observe(receipt)
        self.ledger.record(receipt)
        logs.log_receipt(receipt)
        if self.tracing is not None:
            self.tracing.observe(receipt, self.world)

    def _keep(self, receipt: Receipt) -> None:
        self.world.receipts.put(receipt)
        self._observe(receipt)

    async def handle(self, request: BaseRequest) -> Any:
        if self.tracing is not None:
            return await self.tracing.handle(request, self.world, self.downstream.handle)
        return await self.downstream.handle(request)

    async def handle_ops(self, request: BaseRequest) -> Any:
        try:
            path = request.raw_path.partition("?")[0]
            return await self.ops.handle_probe(request, path)
        except Refusal as refusal:
            return refused(request, refusal, self.world.seams.new_id(), self._dates.line())

    async def sweep(self) -> None:
        """Takes entries out of memory whose time is over; a little at a time."""
        store, grace = self.world.store, kept_past_end(self.world.settings.cache)
        while store is not None:
            await self.world.seams.sleep(SWEEP)
            while store.sweep(self.world.seams.wall(), grace=grace):  # noqa: ASYNC110 - lets others run in between
                await asyncio.sleep(0)

    def _is_busy(self, server: Server) -> bool:
        """Whether a request is being served, an answer is read for the cache, or is not wholly handed to the system."""
        if self.traffic.in_flight or len(self.journey.sharing.flights):
            return True
        transports = (connection.transport for connection in server.connections)
        return any(transport is not None and transport.get_write_buffer_size() for transport in transports)

    async def drain(self, server: Server, now: asyncio.Event) -> None:
        """Lets what is being served finish, within `drain_timeout`; then tells streams and drops the rest."""
        self.traffic.closing = True
        limit = self.world.settings.server.drain_timeout
        loop = asyncio.get_running_loop()
        end = loop.time() + limit
        # A look now and then: an event would have to be set on the hot path.
        while self._is_busy(server) and loop.time() < end and not now.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        if self.traffic.in_flight:
            log.warning("%d requests did not finish within %gs", self.traffic.in_flight, limit)
        for task, flow in list(self.traffic.flows.items()):
            flow.interrupted = "draining"
            task.cancel()
        tasks = list(self.traffic.flows)
        if tasks:
            await asyncio.wait(tasks, timeout=0.5)


def _commons(seat: Seat | None, seams: Seams) -> Commons | None:
    """What a worker has in common with the others."""
    if seat is None:
        return None
    return Commons(SeatLimiter(seat, seams.monotonic), SeatRuns(seat), SeatObjects(seat), SeatBudgets(seat))


def outlets(settings: Settings) -> dict[str, Outlet]:
    """By origin, how those upstreams are reached that are not reached directly. Raises OSError."""
    return {
        parse_url(spec.base_url).origin: Outlet(spec.proxy.reveal() if spec.proxy else None, spec.ca_file)
        for spec in settings.upstreams
        if spec.proxy or spec.ca_file
    }
