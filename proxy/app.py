"""The composition root: settings become objects, objects become a running proxy, and a signal ends it in order.

The only file that knows everybody.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from aiohttp.web import BaseRequest, Server, ServerRunner

from .cassettes import Unusable, open_cassette
from .config import Loaded, Settings
from .config.urls import parse_url
from .core.errors import Refusal
from .core.headers import Masker
from .core.receipt import Receipt
from .edge import listening, logs
from .edge.downstream import Downstream
from .edge.entra import EntraTokens, default_identity
from .edge.gatekeeper import Gatekeeper
from .edge.metrics import Metrics
from .edge.ops import Ops
from .edge.passage import Passage
from .edge.server import ListeningServer
from .edge.tracing import Tracing, tracing_from
from .edge.traffic import Traffic
from .edge.upstream import Outlet, Upstreams
from .edge.wire import Dates, refused
from .greeting import start_up_text
from .journey import Journey
from .ledger import Ledger
from .reload import Read, Reloader
from .seams import REAL, Seams, spawn
from .workers.budgets import SeatBudgets
from .workers.channel import Lost
from .workers.commons import pack
from .workers.limiter import SeatLimiter
from .workers.parent import lead
from .workers.seat import Seat, SeatObjects, SeatRuns
from .world import Commons, World, compile_world, kept_past_end

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


async def serve(loaded: Loaded, read: Read, *, extra_lines: Callable[[str], list[str]] | None = None) -> int:
    """Runs the proxy until SIGTERM or SIGINT; the exit status. read: as `Reloader`; extra_lines: told the base URL,
    more start-up text.
    """
    settings = loaded.settings
    try:
        listeners = listening.listen(settings.server)
    except OSError as error:
        print(f"openai-proxy: cannot listen: {error.strerror or error}", file=sys.stderr)
        return 1

    def say(lines: list[str]) -> None:
        more = extra_lines(listeners.address) if extra_lines is not None else []
        print("\n".join([*lines, *more]), file=sys.stderr, flush=True)

    try:
        if settings.server.workers > 1:
            logs.configure(settings.log.level, settings.log.format, Masker(()))
            return await lead(loaded, read, listeners, REAL, say)
        return await _alone(loaded, read, listeners, say)
    finally:
        listeners.close()
        listeners.remove()


async def _alone(loaded: Loaded, read: Read, listeners: listening.Listeners, say: Callable[[list[str]], None]) -> int:
    """All of the proxy in this process."""
    app = App(loaded.settings, tracing=tracing_from(os.environ))
    reloader = Reloader(loaded, read, app.use, app.world.seams)
    stop, now = _on_signals(reloader.ask)
    reloading: list[asyncio.Task[None]] = []

    def begun(lines: list[str]) -> None:
        say(lines)
        reloading.append(spawn(reloader.run(), "reload"))

    try:
        return await _run(app, loaded, listeners, begun, stop, now, shared=False)
    finally:
        for task in reloading:
            task.cancel()


async def work(fd: int) -> int:
    """One of several workers, whose parent is at the other end of `fd`; the exit status."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the parent's: it tells us
    try:
        seat, orders = await Seat.take(fd)
    except Lost:
        return 1
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, seat.stop.set)
    sockets = [socket.socket(fileno=one) for one in orders.listeners]
    listeners = listening.Listeners(sockets, orders.address, orders.ops_address)
    app = App(orders.loaded.settings, seat=seat, tracing=tracing_from(os.environ))
    if isinstance(app.world.limiter, SeatLimiter):
        app.world.limiter.room = lambda: app.world.gate.notify()
    seat.channel.handlers["settings"] = lambda body: app.told(pickle.loads(body))

    def say(lines: list[str]) -> None:
        seat.channel.note("ready", pack(lines))

    try:
        return await _run(app, orders.loaded, listeners, say, seat.stop, seat.now, shared=True)
    finally:
        listeners.close()
        seat.channel.note("counted", pack(app.ops.counts()))
        await seat.channel.flush()
        seat.channel.close()


async def _run(
    app: App,
    loaded: Loaded,
    listeners: listening.Listeners,
    say: Callable[[list[str]], None],
    stop: asyncio.Event,
    now: asyncio.Event,
    shared: bool,
) -> int:
    """Serves until told to stop; the exit status. shared: others take connections from the same listeners."""
    settings = loaded.settings
    try:
        recorded = open_cassette(app.world.store, settings.cache.cassette)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log.level, settings.log.format, app.world.masker)
    servers = ListeningServer(app.handle), ListeningServer(app.handle_ops)
    runner, ops_runner = (ServerRunner(one, handle_signals=False, shutdown_timeout=0.1) for one in servers)
    background: list[asyncio.Task[None]] = []
    app.traffic.address = listeners.address
    try:
        if app.world.store is not None:
            await app.world.store.open()
        if app.world.limiter is not None:
            await app.world.limiter.open(lambda *state: app.world.adopt(*state))
        await asyncio.gather(*(tokens.first() for tokens in app.start_tokens()))
        await app.world.runs.open()
        await app.world.objects.open()
        await app.world.budgets.open(app.ledger.spent if settings.ledger.enabled else None)
        for one, listener in zip((runner, ops_runner), listeners.sockets, strict=False):
            await one.setup()
            await listening.serve_on(one, listener, shared)
        app.ledger.open()
        background += [spawn(app.ledger.run(), "ledger"), spawn(app.sweep(), "sweep")]
        background.append(spawn(app.metrics.feel_loop(app.world.seams), "event loop lag"))
        say(start_up_text(loaded, listeners.address, listeners.ops_address, recorded))
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        await _until_stopped(app, runner, stop, now)
        return 0
    finally:
        for task in background:
            task.cancel()
        await _close(app, runner, ops_runner)


def _on_signals(reload: Callable[[], None]) -> tuple[asyncio.Event, asyncio.Event]:
    """(stop, now): set by the first and the second SIGTERM or SIGINT. `reload` is called at SIGHUP."""
    loop = asyncio.get_running_loop()
    stop, now = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (now if stop.is_set() else stop).set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, told)
    loop.add_signal_handler(signal.SIGHUP, reload)
    return stop, now


async def _until_stopped(app: App, runner: ServerRunner, stop: asyncio.Event, now: asyncio.Event) -> None:
    """Waits for a signal, then drains. A second signal: now."""
    await stop.wait()
    settings = app.world.settings.server
    log.info("stopping: %d requests in flight", app.traffic.in_flight)
    app.traffic.draining = True
    if settings.drain_delay:
        with suppress(TimeoutError):
            await asyncio.wait_for(now.wait(), settings.drain_delay)
    for site in list(runner.sites):
        await site.stop()
    assert runner.server is not None
    runner.server.pre_shutdown()  # idle connections close now, busy ones after their request
    await app.drain(runner.server, now)


async def _close(app: App, runner: ServerRunner, ops_runner: ServerRunner) -> None:
    for one in (runner, ops_runner):
        await one.cleanup()
    await app.journey.refresher.close()
    await app.way_up.close()
    if app.world.limiter is not None:
        await app.world.limiter.close()
    await app.world.runs.close()
    await app.world.budgets.close()
    await app.ledger.close()
    if app.world.store is not None:
        await app.world.store.close()
    await app.world.objects.close()
    if app.tracing is not None:
        await app.tracing.close()


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
