"""The process that starts the workers, restarts those that die, and stops them in order. It serves no requests."""

from __future__ import annotations

import asyncio
import logging
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from ..config.loader import LoadedSettings
from ..observability.aggregate import Family, summed
from ..observability.event_counters import own_counters
from ..reload import Read, Reloader
from ..system.clock import Clock, spawn
from ..system.state_changes import Change, log_change, state_changed
from ..system.tasks import spawn_forever
from .budgets import SharedBudgetTable
from .ipc import Channel, ConnectionLost
from .shared_state import SharedState, pack, unpack
from .worker import StartMessage

log = logging.getLogger("proxy")

FIRST_RESTART_DELAY: Final = 0.1
MAX_RESTART_DELAY: Final = 30.0
"""Seconds before a dead worker is restarted; the delay doubles each time it dies within `STABLE_AFTER`."""

STABLE_AFTER: Final = 10.0
MAX_EARLY_EXITS: Final = 6
"""If a worker dies early this many times in a row and no other serves, the supervisor gives up."""

_PEER_TIMEOUT: Final = 1.5
"""Seconds that a worker's answer to another worker is waited for."""

_KILL_AFTER: Final = 10.0
"""Seconds after the drain timeout, or after the second signal, before a worker that has not ended is killed."""

_PACKAGE: Final = str(Path(__file__).resolve().parents[2])
_CODE: Final = f"import sys; sys.path.append({_PACKAGE!r}); from proxy.cli.worker import main; sys.exit(main())"
"""A worker imports the supervisor's package, and never one from the working directory."""


class Listeners(Protocol):
    """The listening sockets."""

    @property
    def address(self) -> str: ...

    @property
    def ops_address(self) -> str | None: ...

    @property
    def sockets(self) -> Sequence[socket.socket]: ...

    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Worker:
    """One process. number: of its place, from 1; id: unique; ready: its banner lines, as soon as it serves."""

    number: int
    id: int
    process: asyncio.subprocess.Process
    channel: Channel
    ready: asyncio.Future[list[str]]
    ended: asyncio.Task[int] = field(init=False)


async def supervise(
    loaded: LoadedSettings,
    read: Read,
    listeners: Listeners,
    clock: Clock,
    say: Callable[[list[str]], None],
) -> int:
    """Run the workers until SIGTERM or SIGINT; return the exit status. read: as in `Reloader`; say: prints lines."""
    return await Supervisor(loaded, read, listeners, clock).run(say)


class Supervisor:
    """The workers and their shared state."""

    def __init__(self, loaded: LoadedSettings, read: Read, listeners: Listeners, clock: Clock) -> None:
        self._loaded = loaded
        self._listeners = listeners
        self._clock = clock
        self._shared_state = SharedState(clock.monotonic, clock.wall)
        self._budgets = SharedBudgetTable()
        self._reloader = Reloader(loaded, read, self._apply_settings, clock)
        self._workers: dict[int, _Worker] = {}
        self._started = 0
        self._stop, self._now = asyncio.Event(), asyncio.Event()
        self._status = 0

    async def run(self, say: Callable[[list[str]], None]) -> int:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._request_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reloader.ask)
        background: list[asyncio.Task[None]] = []
        try:
            lines, workers = await self._start_all()
            if lines is not None:
                say(lines)
                background = [spawn(self._keep_running(worker), "worker") for worker in workers]
                background.append(spawn_forever(self._reloader.run, "reload"))
                await self._stop.wait()
        finally:
            for task in background:
                task.cancel()
            await self._stop_all()
        return self._status

    def _request_stop(self) -> None:
        """Let the workers drain at the first signal, and end at once at the second."""
        if self._stop.is_set():
            self._now.set()
            self._notify_all("now")
        else:
            self._stop.set()
            self._notify_all("stop")

    def _notify_all(self, kind: str, body: bytes = b"") -> None:
        for worker in self._workers.values():
            worker.channel.notify(kind, body)

    # -- start --------------------------------------------------------------------------------------------------------

    async def _start_all(self) -> tuple[list[str] | None, list[_Worker]]:
        """Start all workers; return the banner lines and them, or None if they cannot be started or shall stop.

        The first one starts alone, so that a mistake common to all is reported once. Once it serves, another that ends
        before it is ready is restarted like any other.
        """
        first = await self._start(1)
        lines = await self._wait_until_ready(first)
        count = self._loaded.settings.server.workers
        if lines is not None and not self._stop.is_set():
            others = await asyncio.gather(*(self._start(number) for number in range(2, count + 1)))
            await asyncio.gather(*(self._wait_until_ready(other) for other in others))
            if not self._stop.is_set():
                return lines, [first, *others]
        if not self._stop.is_set():
            ended = first.ended.result() if first.ended.done() else 1
            self._status = ended if ended == 2 else 1
            log.error("the workers cannot be started; the lines above say why")
        return None, []

    async def _start(self, number: int) -> _Worker:
        """Start a worker. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [listener.fileno() for listener in self._listeners.sockets]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _CODE, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *fds],
                process_group=0,  # Ctrl-C in a terminal reaches the supervisor only, which stops the workers
            )
        channel = await Channel.over(ours)
        self._started += 1
        ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        worker = _Worker(number, self._started, process, channel, ready)
        self._workers[worker.id] = worker
        channel.handlers.update(self._shared_state.handlers(worker.id, channel.notify))
        channel.handlers |= {
            "ready": lambda body: None if ready.done() else ready.set_result(unpack(body, list[str])[0]),
            "state_changed": lambda body: log_change(unpack(body, Change)[0]),
            "budget": partial(self._budgets.publish, worker.id),
            "ask_peers": partial(self._ask_peers, worker),
            "notify_peers": partial(self._notify_peers, worker),
            "metrics": partial(self._merge_metrics, worker),
            "last_metrics": partial(self._record_metrics, worker),
        }
        addresses = self._listeners.address, self._listeners.ops_address
        channel.notify("start", pickle.dumps(StartMessage(number, self._loaded, tuple(fds), *addresses)))
        if self._stop.is_set():
            channel.notify("stop")
        worker.ended = spawn(self._wait_for_end(worker), "a worker's end")
        return worker

    async def _wait_for_end(self, worker: _Worker) -> int:
        """Wait until the worker has ended; return its exit status."""
        await worker.channel.run()
        status = await worker.process.wait()
        del self._workers[worker.id]
        self._shared_state.worker_ended(worker.id)
        self._budgets.worker_ended(worker.id)
        return status

    async def _wait_until_ready(self, worker: _Worker) -> list[str] | None:
        """Return the worker's banner lines as soon as it serves, or None if it ends before."""
        either: set[asyncio.Future[Any]] = {worker.ready, worker.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return worker.ready.result() if worker.ready.done() else None

    # -- while it runs ------------------------------------------------------------------------------------------------

    async def _keep_running(self, worker: _Worker) -> None:
        """Restart this worker, and each one that takes its place, when it dies."""
        early_exits, number = 0, worker.number
        while True:
            began = self._clock.monotonic()
            status = await asyncio.shield(worker.ended)
            early_exits = 1 if self._clock.monotonic() - began >= STABLE_AFTER else early_exits + 1
            if early_exits >= MAX_EARLY_EXITS and not any(other.ready.done() for other in self._workers.values()):
                log.critical("worker %d ended with status %d, and no other is left: giving up", number, status)
                self._status = 1
                self._stop.set()
                return
            while True:
                pause = min(FIRST_RESTART_DELAY * 2.0 ** (early_exits - 1), MAX_RESTART_DELAY)
                text = f"worker {number} (process {worker.process.pid}) ended with status {status}; "
                text += f"it is restarted in {pause:g}s"
                until = self._clock.wall() + pause
                state_changed(Change("worker", str(number), "ended", text, logging.ERROR, until))
                await self._clock.sleep(pause)
                try:
                    worker = await self._start(number)
                    spawn(self._log_ready(worker), "a worker's start")
                    break
                except OSError as error:
                    log.error("worker %d cannot be started: %s", number, error)
                    early_exits += 1

    async def _log_ready(self, worker: _Worker) -> None:
        """Log that a restarted worker serves, as soon as it does."""
        if await self._wait_until_ready(worker) is not None:
            text = f"worker {worker.number} (process {worker.process.pid}) serves again"
            state_changed(Change("worker", str(worker.number), "ready", text))

    def _apply_settings(self, loaded: LoadedSettings) -> None:
        """Send new settings to the workers; later workers start with them."""
        self._loaded = loaded
        self._notify_all("settings", pickle.dumps(loaded))

    # -- between workers ----------------------------------------------------------------------------------------------

    def _peers(self, worker: _Worker) -> list[_Worker]:
        return [other for other in self._workers.values() if other is not worker and other.ready.done()]

    def _notify_peers(self, worker: _Worker, body: bytes) -> None:
        kind, inner = unpack(body, str, bytes)
        for peer in self._peers(worker):
            peer.channel.notify(kind, inner)

    async def _ask_peers(self, worker: _Worker, kind_and_body: bytes) -> bytes:
        kind, body = unpack(kind_and_body, str, bytes)
        return pack([answer for _, answer in await self._answers_of_peers(worker, kind, body)])

    async def _answers_of_peers(self, worker: _Worker, kind: str, body: bytes) -> list[tuple[_Worker, bytes]]:
        """Return the answers of the other workers, without those that do not answer in time."""
        peers = self._peers(worker)
        requests = (peer.channel.request(kind, body, _PEER_TIMEOUT) for peer in peers)
        results = await asyncio.gather(*requests, return_exceptions=True)
        answers = []
        for peer, result in zip(peers, results, strict=True):
            if isinstance(result, bytes):
                answers.append((peer, result))
            elif not isinstance(result, ConnectionLost):
                raise result
        return answers

    def _record_metrics(self, worker: _Worker, body: bytes) -> None:
        self._shared_state.record_metrics(worker.id, unpack(body, list[Family])[0])

    async def _merge_metrics(self, worker: _Worker, body: bytes) -> bytes:
        self._record_metrics(worker, body)
        for peer, answer in await self._answers_of_peers(worker, "metrics", b""):
            self._record_metrics(peer, answer)
        return pack(summed([*self._shared_state.metrics(), own_counters()]))

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _stop_all(self) -> None:
        """Stop the workers; return when all have ended."""
        if not self._stop.is_set():
            self._request_stop()
        elif self._status:
            self._notify_all("stop")
        self._listeners.close()  # the workers' own descriptors stay open while they accept connections
        workers = {worker.ended: worker for worker in self._workers.values()}
        if workers:
            await self._wait_for_drain(list(workers))
        for ended, worker in workers.items():
            if not ended.done():
                log.error("worker %d has not ended in time and is killed", worker.number)
                worker.process.kill()
                await ended
            elif ended.result() and not self._status:
                log.error("worker %d ended with status %d", worker.number, ended.result())
            self._status = self._status or int(ended.result() != 0)

    async def _wait_for_drain(self, workers: list[asyncio.Task[int]]) -> None:
        """Wait until the workers have ended, or the time to do so is over."""
        server = self._loaded.settings.server
        second_signal = spawn(self._now.wait(), "second signal")
        all_ended = asyncio.gather(*workers, return_exceptions=True)
        timeout = server.drain_delay + server.drain_timeout + _KILL_AFTER
        await asyncio.wait({second_signal, all_ended}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if second_signal.done():
            await asyncio.wait({all_ended}, timeout=_KILL_AFTER)
        second_signal.cancel()
