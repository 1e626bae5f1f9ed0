"""Run, drain and stop the proxy: signals, listeners, background tasks, one process or several."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from aiohttp.web import Server, ServerRunner

from .app import App, log
from .banner import banner_lines
from .cache.stores.cassette import CassetteError, open_cassette
from .config.loader import LoadedSettings
from .observability import logs
from .protocol.masking import SecretMasker
from .reload import Read, Reloader
from .server import listeners as listening
from .server.connections import ListeningServer
from .server.tracing import tracing_from
from .system import state_changes
from .system.clock import SYSTEM_CLOCK
from .system.tasks import spawn_forever
from .workers.ipc import ConnectionLost
from .workers.limiter import WorkerLimits
from .workers.shared_state import pack
from .workers.supervisor import supervise
from .workers.worker import WorkerLink


@dataclass(frozen=True, slots=True)
class StopSignals:
    """The first SIGTERM or SIGINT sets `stop`: requests in flight may finish. The second sets `now`."""

    stop: asyncio.Event
    now: asyncio.Event


async def serve(loaded: LoadedSettings, read: Read, *, extra_lines: Callable[[str], list[str]] | None = None) -> int:
    """Run the proxy until SIGTERM or SIGINT. Returns the exit status.

    read: as in `Reloader`. extra_lines: returns more lines of the banner for a base URL.
    """
    settings = loaded.settings
    try:
        listeners = listening.listen(settings.server)
    except OSError as error:
        logs.print_lines([f"openai-proxy: cannot listen: {error.strerror or error}"], settings.log.format)
        return 1

    def print_banner(lines: list[str]) -> None:
        more = extra_lines(listeners.address) if extra_lines is not None else []
        logs.print_lines([*lines, *more], settings.log.format)

    try:
        if settings.server.workers > 1:
            logs.configure(settings.log.level, settings.log.format, SecretMasker(()))
            return await supervise(loaded, read, listeners, SYSTEM_CLOCK, print_banner)
        return await _serve_in_this_process(loaded, read, listeners, print_banner)
    finally:
        listeners.close()
        listeners.remove()


async def _serve_in_this_process(
    loaded: LoadedSettings, read: Read, listeners: listening.Listeners, print_banner: Callable[[list[str]], None]
) -> int:
    """Run the whole proxy in this process. Returns the exit status."""
    app = App(loaded.settings, tracing=tracing_from(os.environ))
    reloader = Reloader(loaded, read, app.apply, app.services.clock)
    signals = _on_signals(reloader.ask)
    reloading: list[asyncio.Task[None]] = []

    def started(banner: list[str]) -> None:
        print_banner(banner)
        reloading.append(spawn_forever(reloader.run, "reload"))

    try:
        return await _run(app, loaded, listeners, signals, started, shared=False)
    finally:
        for task in reloading:
            task.cancel()


async def run_worker(fd: int) -> int:
    """Run one of several workers. fd: the socket to the supervisor. Returns the exit status."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the supervisor gets them, and tells its workers
    try:
        link, start = await WorkerLink.open(fd)
    except ConnectionLost:
        return 1
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, link.stop.set)
    sockets = [socket.socket(fileno=number) for number in start.listeners]
    listeners = listening.Listeners(sockets, start.address, start.ops_address)
    app = App(start.loaded.settings, link=link, tracing=tracing_from(os.environ))
    if isinstance(app.services.limiter, WorkerLimits):
        app.services.limiter.on_capacity = lambda: app.services.admission.wake()
    loop = asyncio.get_running_loop()
    state_changes.forward = lambda change: _forward(loop, link, change)
    link.channel.handlers["settings"] = lambda body: app.apply_from_supervisor(pickle.loads(body))

    def started(banner: list[str]) -> None:
        link.channel.notify("ready", pack(banner))

    try:
        return await _run(app, start.loaded, listeners, StopSignals(link.stop, link.now), started, shared=True)
    finally:
        listeners.close()
        link.channel.notify("last_metrics", pack(app.admin.own_metrics()))
        await link.channel.flush()
        link.channel.close()


def _forward(loop: asyncio.AbstractEventLoop, link: WorkerLink, change: state_changes.Change) -> None:
    """Send a change of state to the supervisor. Any thread may call it."""
    try:
        loop.call_soon_threadsafe(link.channel.notify, "state_changed", pack(change))
    except RuntimeError:  # the worker has ended
        state_changes.log_change(change)


async def _run(
    app: App,
    loaded: LoadedSettings,
    listeners: listening.Listeners,
    signals: StopSignals,
    started: Callable[[list[str]], None],
    shared: bool,
) -> int:
    """Serve until a signal comes. Returns the exit status.

    started: is called with the banner. shared: other processes take connections from the same listeners.
    """
    settings = loaded.settings
    try:
        recorded = open_cassette(app.services.store, settings.cache.cassette)
    except CassetteError as error:
        logs.print_lines([str(error)], settings.log.format)
        return 2
    logs.configure(settings.log.level, settings.log.format, app.services.masker)
    servers = ListeningServer(app.handle), ListeningServer(app.handle_ops)
    runner, ops_runner = (ServerRunner(server, handle_signals=False, shutdown_timeout=0.1) for server in servers)
    background: list[asyncio.Task[None]] = []
    app.in_flight.address = listeners.address
    try:
        await app.services.store.open()
        if app.services.limiter is not None:
            await app.services.limiter.open(lambda *state: app.services.apply_remote_state(*state))
        await asyncio.gather(*(tokens.first() for tokens in app.start_tokens()))
        await app.services.runs.open()
        await app.services.object_owners.open()
        await app.services.budgets.open(app.ledger.spent if settings.ledger.enabled else None)
        for each, listener in zip((runner, ops_runner), listeners.sockets, strict=False):
            await each.setup()
            await listening.serve_on(each, listener, shared)
        app.ledger.open()
        background.append(spawn_forever(app.ledger.run, "ledger"))
        background.append(spawn_forever(partial(app.metrics.measure_loop_lag, app.services.clock), "event loop lag"))
        if app.services.store.enabled:
            background.append(spawn_forever(app.sweep, "sweep"))
        started(banner_lines(loaded, listeners.address, listeners.ops_address, recorded))
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        await _until_stopped(app, runner, signals)
        return 0
    finally:
        for task in background:
            task.cancel()
        await _close(app, runner, ops_runner)


def _on_signals(reload: Callable[[], None]) -> StopSignals:
    """Handle the signals of this process. reload: is called at SIGHUP."""
    loop = asyncio.get_running_loop()
    signals = StopSignals(asyncio.Event(), asyncio.Event())

    def stop() -> None:
        (signals.now if signals.stop.is_set() else signals.stop).set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    return signals


async def _until_stopped(app: App, runner: ServerRunner, signals: StopSignals) -> None:
    """Wait for a signal, then drain. A second signal cuts that short."""
    await signals.stop.wait()
    settings = app.services.settings.server
    count = app.in_flight.requests
    log.info("stopping: %d request%s in flight", count, "" if count == 1 else "s")
    app.in_flight.draining = True
    if settings.drain_delay:
        with suppress(TimeoutError):
            await asyncio.wait_for(signals.now.wait(), settings.drain_delay)
    for site in list(runner.sites):
        await site.stop()
    assert runner.server is not None
    runner.server.pre_shutdown()  # idle connections close now, busy ones after their request
    await _drain(app, runner.server, signals.now)


async def _close(app: App, runner: ServerRunner, ops_runner: ServerRunner) -> None:
    for each in (runner, ops_runner):
        await each.cleanup()
    await app.handler.revalidator.close()
    await app.transport.close()
    if app.services.limiter is not None:
        await app.services.limiter.close()
    await app.services.runs.close()
    await app.services.budgets.close()
    await app.ledger.close()
    await app.services.store.close()
    await app.services.object_owners.close()
    if app.tracing is not None:
        await app.tracing.close()


async def _drain(app: App, server: Server, now: asyncio.Event) -> None:
    """Let what is being served finish within `drain_timeout`, then tell streams that the proxy stops and drop the rest.

    now: ends the wait.
    """
    app.in_flight.closing = True
    limit = app.services.settings.server.drain_timeout
    loop = asyncio.get_running_loop()
    end = loop.time() + limit
    # It polls: an event would have to be set on the hot path.
    while _is_busy(app, server) and loop.time() < end and not now.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    if count := app.in_flight.requests:
        cause = "second signal" if now.is_set() else f"server.drain_timeout ({limit:g}s) is over"
        log.warning("%s: cutting off %d request%s in flight", cause, count, "" if count == 1 else "s")
    for task, stream in list(app.in_flight.streams.items()):
        stream.interrupted = "draining"
        task.cancel()
    tasks = list(app.in_flight.streams)
    if tasks:
        await asyncio.wait(tasks, timeout=0.5)


def _is_busy(app: App, server: Server) -> bool:
    """Whether a request is being served, a response is read for the cache, or one is not yet with the system."""
    if app.in_flight.requests or len(app.handler.coalescer.flights):
        return True
    transports = (connection.transport for connection in server.connections)
    return any(transport is not None and transport.get_write_buffer_size() for transport in transports)
