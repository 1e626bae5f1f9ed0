"""Run, drain and stop the proxy: signals, listeners, background tasks, one process or several."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

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
from .system.clock import SYSTEM_CLOCK, spawn
from .workers.ipc import ConnectionLost
from .workers.limiter import WorkerLimits
from .workers.shared_state import pack
from .workers.supervisor import supervise
from .workers.worker import WorkerLink


async def serve(loaded: LoadedSettings, read: Read, *, extra_lines: Callable[[str], list[str]] | None = None) -> int:
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
            logs.configure(settings.log.level, settings.log.format, SecretMasker(()))
            return await supervise(loaded, read, listeners, SYSTEM_CLOCK, say)
        return await _serve_in_this_process(loaded, read, listeners, say)
    finally:
        listeners.close()
        listeners.remove()


async def _serve_in_this_process(
    loaded: LoadedSettings, read: Read, listeners: listening.Listeners, say: Callable[[list[str]], None]
) -> int:
    """All of the proxy in this process."""
    app = App(loaded.settings, tracing=tracing_from(os.environ))
    reloader = Reloader(loaded, read, app.apply, app.services.clock)
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


async def run_worker(fd: int) -> int:
    """One of several workers, whose parent is at the other end of `fd`; the exit status."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the parent's: it tells us
    try:
        seat, orders = await WorkerLink.open(fd)
    except ConnectionLost:
        return 1
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, seat.stop.set)
    sockets = [socket.socket(fileno=one) for one in orders.listeners]
    listeners = listening.Listeners(sockets, orders.address, orders.ops_address)
    app = App(orders.loaded.settings, seat=seat, tracing=tracing_from(os.environ))
    if isinstance(app.services.limiter, WorkerLimits):
        app.services.limiter.on_capacity = lambda: app.services.admission.wake()
    seat.channel.handlers["settings"] = lambda body: app.apply_from_supervisor(pickle.loads(body))

    def say(lines: list[str]) -> None:
        seat.channel.notify("ready", pack(lines))

    try:
        return await _run(app, orders.loaded, listeners, say, seat.stop, seat.now, shared=True)
    finally:
        listeners.close()
        seat.channel.notify("last_metrics", pack(app.ops.own_metrics()))
        await seat.channel.flush()
        seat.channel.close()


async def _run(
    app: App,
    loaded: LoadedSettings,
    listeners: listening.Listeners,
    say: Callable[[list[str]], None],
    stop: asyncio.Event,
    now: asyncio.Event,
    shared: bool,
) -> int:
    """Serves until told to stop; the exit status. shared: others take connections from the same listeners."""
    settings = loaded.settings
    try:
        recorded = open_cassette(app.services.store, settings.cache.cassette)
    except CassetteError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log.level, settings.log.format, app.services.masker)
    servers = ListeningServer(app.handle), ListeningServer(app.handle_ops)
    runner, ops_runner = (ServerRunner(one, handle_signals=False, shutdown_timeout=0.1) for one in servers)
    background: list[asyncio.Task[None]] = []
    app.traffic.address = listeners.address
    try:
        await app.services.store.open()
        if app.services.limiter is not None:
            await app.services.limiter.open(lambda *state: app.services.apply_remote_state(*state))
        await asyncio.gather(*(tokens.first() for tokens in app.start_tokens()))
        await app.services.runs.open()
        await app.services.object_owners.open()
        await app.services.budgets.open(app.ledger.spent if settings.ledger.enabled else None)
        for one, listener in zip((runner, ops_runner), listeners.sockets, strict=False):
            await one.setup()
            await listening.serve_on(one, listener, shared)
        app.ledger.open()
        background += [spawn(app.ledger.run(), "ledger"), spawn(app.sweep(), "sweep")]
        background.append(spawn(app.metrics.measure_loop_lag(app.services.clock), "event loop lag"))
        say(banner_lines(loaded, listeners.address, listeners.ops_address, recorded))
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
    settings = app.services.settings.server
    count = app.traffic.requests
    log.info("stopping: %d request%s in flight", count, "" if count == 1 else "s")
    app.traffic.draining = True
    if settings.drain_delay:
        with suppress(TimeoutError):
            await asyncio.wait_for(now.wait(), settings.drain_delay)
    for site in list(runner.sites):
        await site.stop()
    assert runner.server is not None
    runner.server.pre_shutdown()  # idle connections close now, busy ones after their request
    await _drain(app, runner.server, now)


async def _close(app: App, runner: ServerRunner, ops_runner: ServerRunner) -> None:
    for one in (runner, ops_runner):
        await one.cleanup()
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
    app.traffic.closing = True
    limit = app.services.settings.server.drain_timeout
    loop = asyncio.get_running_loop()
    end = loop.time() + limit
    # It polls: an event would have to be set on the hot path.
    while _is_busy(app, server) and loop.time() < end and not now.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    if count := app.traffic.requests:
        cause = "second signal" if now.is_set() else f"server.drain_timeout ({limit:g}s) is over"
        log.warning("%s: cutting off %d request%s in flight", cause, count, "" if count == 1 else "s")
    for task, stream in list(app.traffic.streams.items()):
        stream.interrupted = "draining"
        task.cancel()
    tasks = list(app.traffic.streams)
    if tasks:
        await asyncio.wait(tasks, timeout=0.5)


def _is_busy(app: App, server: Server) -> bool:
    """Whether a request is being served, a response is read for the cache, or one is not yet with the system."""
    if app.traffic.requests or len(app.handler.coalescer.flights):
        return True
    transports = (connection.transport for connection in server.connections)
    return any(transport is not None and transport.get_write_buffer_size() for transport in transports)
