"""The composition root: settings become objects, objects become a running proxy, and a signal ends it in order.

The only file that knows everybody.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from aiohttp.web import BaseRequest, Server, ServerRunner, SockSite, UnixSite

from . import __version__
from .cassettes import Unusable, open_cassette
from .config import Loaded, Settings
from .config.urls import parse_url
from .core.errors import Refusal
from .core.receipt import Receipt
from .edge import logs
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
from .journey import Journey
from .ledger import Ledger
from .reload import Reloader, with_fixed
from .seams import REAL, Seams, spawn
from .world import World, compile_world, kept_past_end

log = logging.getLogger("proxy")

SWEEP: float = 60.0
"""Seconds between two looks for entries whose time is over (contract 7: gone within 10 minutes of their end)."""


class App:
    """Everything one proxy is made of. `handle` is the main listener's handler."""

    def __init__(self, settings: Settings, seams: Seams = REAL, tracing: Tracing | None = None) -> None:
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
        self._furnish(compile_world(settings, seams))

    def _furnish(self, world: World) -> None:
        """Everything that stands in this world. What is in flight keeps the rooms it is in."""
        self.world = world
        gatekeeper = Gatekeeper(world.settings)
        self.ops = Ops(world, self.metrics, gatekeeper, self.traffic, self.ledger)
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

    def use(self, loaded: Loaded) -> list[str]:
        """Puts other settings in force, in one step; what is to be said about them. Raises OSError, and then nothing
        has changed.
        """
        old = self.world
        settings, fixed = with_fixed(old.settings, loaded.settings)
        world, found = compile_world(settings, old.seams, old), outlets(settings)
        self.way_up.set(settings.timeouts.connect, settings.timeouts.idle, found)
        self._furnish(world)
        logs.configure(settings.log.level, settings.log.format, world.masker)
        self.start_tokens()
        return [f"{name} takes effect at the next start" for name in fixed]

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


async def serve(
    loaded: Loaded, read: Callable[[], Loaded], *, extra_lines: Callable[[str], list[str]] | None = None
) -> int:
    """Runs the proxy until SIGTERM or SIGINT; the exit status. read: the settings anew, for a reload, raises
    SettingsError; extra_lines: told the base URL, more start-up text.
    """
    settings = loaded.settings
    app = App(settings, tracing=tracing_from(os.environ))
    try:
        recorded = open_cassette(app.world.store, settings.cache.cassette)
    except Unusable as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log.level, settings.log.format, app.world.masker)
    runner = ServerRunner(ListeningServer(app.handle), handle_signals=False, shutdown_timeout=0.1)
    ops_runner = ServerRunner(ListeningServer(app.handle_ops), handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    await ops_runner.setup()
    await app.world.budgets.open(app.ledger.spent if settings.ledger.enabled else None)
    reloader = Reloader(loaded, read, app.use, app.world.seams)
    stop, now = _on_signals(reloader.ask)
    background: list[asyncio.Task[None]] = []
    try:
        try:
            address = await _listen(settings, runner)
            ops_address = await _listen_ops(settings, ops_runner)
        except OSError as error:
            print(f"openai-proxy: cannot listen: {error.strerror or error}", file=sys.stderr)
            return 1
        app.traffic.address = address
        if app.world.store is not None:
            await app.world.store.open()
        if app.world.limiter is not None:
            await app.world.limiter.open(lambda *state: app.world.adopt(*state))
        await asyncio.gather(*(tokens.first() for tokens in app.start_tokens()))
        await app.world.runs.open()
        await app.world.objects.open()
        lines = start_up_text(loaded, app.world, address, ops_address, recorded)
        if extra_lines is not None:
            lines += extra_lines(address)
        print("\n".join(lines), file=sys.stderr, flush=True)
        app.ledger.open()
        background += [spawn(app.ledger.run(), "ledger"), spawn(app.sweep(), "sweep"), spawn(reloader.run(), "reload")]
        background.append(spawn(app.metrics.feel_loop(app.world.seams), "event loop lag"))
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        await _until_stopped(app, runner, stop, now)
        return 0
    finally:
        for task in background:
            task.cancel()
        await _close(app, runner, ops_runner, settings)


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


async def _close(app: App, runner: ServerRunner, ops_runner: ServerRunner, settings: Settings) -> None:
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
    _remove_socket(settings.server.socket)


async def _listen(settings: Settings, runner: ServerRunner) -> str:
    """Opens the main listener; the base address it answers at. Raises OSError."""
    server = settings.server
    if server.socket is not None:
        path = _free_socket(server.socket)
        mask = os.umask(0o177)  # mode 0600 from the first moment on
        try:
            await UnixSite(runner, path).start()
        finally:
            os.umask(mask)
        return f"unix:{path}"
    listener = _bind(server.host, server.port)
    await SockSite(runner, listener, backlog=1024).start()
    return _url(server.host, listener.getsockname()[1])


async def _listen_ops(settings: Settings, runner: ServerRunner) -> str | None:
    if settings.server.ops is None:
        return None
    host, port = settings.server.ops
    listener = _bind(host, port)
    await SockSite(runner, listener).start()
    return _url(host, listener.getsockname()[1])


def _bind(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def _free_socket(path: str) -> str:
    """`path` made free where a process that is gone left its socket behind."""
    path = os.path.expanduser(path)
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)
    return path


def _remove_socket(path: str | None) -> None:
    if path is not None:
        with suppress(OSError):
            os.unlink(os.path.expanduser(path))


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def outlets(settings: Settings) -> dict[str, Outlet]:
    """By origin, how those upstreams are reached that are not reached directly. Raises OSError."""
    return {
        parse_url(spec.base_url).origin: Outlet(spec.proxy.reveal() if spec.proxy else None, spec.ca_file)
        for spec in settings.upstreams
        if spec.proxy or spec.ca_file
    }


def start_up_text(loaded: Loaded, world: World, address: str, ops_address: str | None, recorded: int = 0) -> list[str]:
    """What a person wants to know at start (contract 1). recorded: answers in the cassette."""
    settings = loaded.settings
    count = sum(len(upstream.keys) or upstream.entra_id for upstream in settings.upstreams)
    keys = str(count) if count else "none (pass-through)"
    if world.replays:
        keys = "none needed (replay: nothing is sent upstream)"
    lines = [
        f"openai-proxy {__version__}",
        f"listening on {address}",
        *([f"probes and metrics on {ops_address}"] if ops_address else []),
        f"config file: {loaded.file or 'none'}",
        *(
            f"upstream {upstream.name}: {upstream.kind} {upstream.base_url}"
            + (f" (priority {upstream.priority})" if upstream.priority else "")
            for upstream in settings.upstreams
        ),
        f"keys: {keys}",
        *([] if world.replays and settings.cache.cassette else [_cache_line(settings)]),
        *_mode_lines(settings, recorded),
        f"ledger: {os.path.expanduser(settings.ledger.path) if settings.ledger.enabled else 'off'}",
    ]
    if not address.startswith("unix:"):
        lines.append(f"clients: OPENAI_BASE_URL={address}/v1")
    return lines + [f"warning: {warning}" for warning in loaded.warnings]


def _mode_lines(settings: Settings, recorded: int) -> list[str]:
    mode, cassette = settings.cache.mode, settings.cache.cassette
    lines = []
    if mode != "normal":
        lines.append(f"mode: {mode}" + (" (every answer is bought anew)" if mode == "refresh" else ""))
    if cassette is not None:
        verb = "replaying from" if mode == "replay" else "recording into"
        lines.append(f"cassette: {verb} {cassette} ({recorded} answers there)")
    return lines


def _cache_line(settings: Settings) -> str:
    cache = settings.cache
    size = f"{cache.memory_size // (1024 * 1024)} MiB"
    match cache.backend:
        case "off":
            return "cache: off"
        case "sqlite":
            return f"cache: sqlite {os.path.expanduser(cache.path)}, {size} of it in memory"
        case "redis":
            return f"cache: redis {urlsplit(settings.redis.url.reveal()).hostname if settings.redis.url else ''}"
        case _:
            return f"cache: memory ({size}); answers do not survive a restart, --cache sqlite keeps them"
