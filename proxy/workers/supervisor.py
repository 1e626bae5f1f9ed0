"""The parent of the workers: starts them, starts anew those that die, and ends them in order. It serves nothing."""

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
from ..reload import Read, Reloader
from ..system.clock import Clock, spawn
from .budgets import SharedBudgetTable
from .ipc import Channel, ConnectionLost
from .shared_state import SharedState, pack, unpack
from .worker import StartMessage

log = logging.getLogger("proxy")

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 30.0
"""Seconds before a worker that died is started again: doubled each time it dies within `LONG_LIFE`."""

LONG_LIFE: Final = 10.0
HOPELESS: Final = 6
"""So many times in a row a worker may die soon, while no other lives, before all of it is given up."""

_KILLED_AFTER: Final = 10.0
"""Seconds beyond the time for draining, or after being told `now`, until a worker that has not ended is killed."""

_PACKAGE: Final = str(Path(__file__).resolve().parents[2])
_CODE: Final = f"import sys; sys.path.append({_PACKAGE!r}); from proxy.cli.worker import main; sys.exit(main())"
"""The package is found wherever the parent found it, and never in the working directory of an installed one."""


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
    """One process. id: of no other, earlier ones in its place included; ready: its start-up text, once it serves."""

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
    """Runs the workers until SIGTERM or SIGINT; the exit status. read: as `Reloader`; say: prints the start-up text."""
    return await Supervisor(loaded, read, listeners, clock).run(say)


class Supervisor:
    def __init__(self, loaded: LoadedSettings, read: Read, listeners: Listeners, clock: Clock) -> None:
        self._loaded = loaded
        self._listeners = listeners
        self._clock = clock
        self._commons = SharedState(clock.monotonic, clock.wall)
        self._purses = SharedBudgetTable()
        self._reloader = Reloader(loaded, read, self._use, clock)
        self._workers: dict[int, _Worker] = {}
        self._started = 0
        self._stop, self._now = asyncio.Event(), asyncio.Event()
        self._status = 0

    async def run(self, say: Callable[[list[str]], None]) -> int:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._told)
        loop.add_signal_handler(signal.SIGHUP, self._reloader.ask)
        background: list[asyncio.Task[None]] = []
        try:
            lines = await self._begin()
            if lines is not None:
                say(lines)
                background = [spawn(self._keep(worker), "worker") for worker in list(self._workers.values())]
                background.append(spawn(self._reloader.run(), "reload"))
                await self._stop.wait()
        finally:
            for task in background:
                task.cancel()
            await self._end()
        return self._status

    def _told(self) -> None:
        """By the first signal to stop, by the second not to wait."""
        if self._stop.is_set():
            self._now.set()
            self._note("now")
        else:
            self._stop.set()
            self._note("stop")

    def _note(self, kind: str, body: bytes = b"") -> None:
        for worker in self._workers.values():
            worker.channel.notify(kind, body)

    # -- start --------------------------------------------------------------------------------------------------------

    async def _begin(self) -> list[str] | None:
        """All workers, started; the start-up text. None: they cannot be, and it is said why; or it shall end.

        The first one goes ahead: what is wrong for all is said once.
        """
        first = await self._start(1)
        lines = await self._is_ready(first)
        count = self._loaded.settings.server.workers
        if lines is not None and not self._stop.is_set():
            others = await asyncio.gather(*(self._start(number) for number in range(2, count + 1)))
            ready = await asyncio.gather(*(self._is_ready(one) for one in others))
            if None not in ready and not self._stop.is_set():
                return lines
        if not self._stop.is_set():
            ended = first.ended.result() if first.ended.done() else 1
            self._status = ended if ended == 2 else 1
            log.error("the workers cannot be started")
        return None

    async def _start(self, number: int) -> _Worker:
        """Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            fds = [one.fileno() for one in self._listeners.sockets]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _CODE, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *fds],
                process_group=0,  # Ctrl-C in a terminal is for the parent, which tells the others
            )
        channel = await Channel.over(ours)
        self._started += 1
        ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        worker = _Worker(number, self._started, process, channel, ready)
        self._workers[worker.id] = worker
        channel.handlers.update(self._commons.handlers(worker.id, channel.notify))
        channel.handlers |= {
            "ready": lambda body: None if ready.done() else ready.set_result(unpack(body, list[str])[0]),
            "budget": partial(self._purses.publish, worker.id),
            "ask": partial(self._asked, worker),
            "tell": partial(self._tell, worker),
            "metrics": partial(self._metrics, worker),
            "counted": partial(self._counted, worker),
        }
        addresses = self._listeners.address, self._listeners.ops_address
        channel.notify("orders", pickle.dumps(StartMessage(number, self._loaded, tuple(fds), *addresses)))
        if self._stop.is_set():
            channel.notify("stop")
        worker.ended = spawn(self._wait_for(worker), "a worker's end")
        return worker

    async def _wait_for(self, worker: _Worker) -> int:
        """Until the worker has ended; its status."""
        await worker.channel.run()
        status = await worker.process.wait()
        del self._workers[worker.id]
        self._commons.left(worker.id)
        self._purses.left(worker.id)
        return status

    async def _is_ready(self, worker: _Worker) -> list[str] | None:
        """What it says once it serves; None where it ended before."""
        either: set[asyncio.Future[Any]] = {worker.ready, worker.ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return worker.ready.result() if worker.ready.done() else None

    # -- while it runs ------------------------------------------------------------------------------------------------

    async def _keep(self, worker: _Worker) -> None:
        """Has this worker's place filled."""
        soon, number = 0, worker.number
        while True:
            began = self._clock.monotonic()
            status = await asyncio.shield(worker.ended)
            soon = 1 if self._clock.monotonic() - began >= LONG_LIFE else soon + 1
            if soon >= HOPELESS and not any(one.ready.done() for one in self._workers.values()):
                log.critical("worker %d ended with status %d, and no other is left: giving up", number, status)
                self._status = 1
                self._stop.set()
                return
            while True:
                pause = min(FIRST_PAUSE * 2.0 ** (soon - 1), LONGEST_PAUSE)
                log.error(
                    "worker %d (process %d) ended with status %d; another takes its place in %gs",
                    *(number, worker.process.pid, status, pause),
                )
                await self._clock.sleep(pause)
                try:
                    worker = await self._start(number)
                    break
                except OSError as error:
                    log.error("worker %d cannot be started: %s", number, error)
                    soon += 1

    def _use(self, loaded: LoadedSettings) -> None:
        """Hands out new settings; those to come get them, too."""
        self._loaded = loaded
        self._note("settings", pickle.dumps(loaded))

    # -- between workers ----------------------------------------------------------------------------------------------

    def _others(self, worker: _Worker) -> list[_Worker]:
        return [one for one in self._workers.values() if one is not worker and one.ready.done()]

    def _tell(self, worker: _Worker, body: bytes) -> None:
        kind, inner = unpack(body, str, bytes)
        for one in self._others(worker):
            one.channel.notify(kind, inner)

    async def _asked(self, worker: _Worker, body: bytes) -> bytes:
        kind, inner = unpack(body, str, bytes)
        return pack([answer for _, answer in await self._ask_others(worker, kind, inner)])

    async def _ask_others(self, worker: _Worker, kind: str, body: bytes) -> list[tuple[_Worker, bytes]]:
        others = self._others(worker)
        calls = (one.channel.request(kind, body, 1.5) for one in others)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found = []
        for one, answer in zip(others, answers, strict=True):
            if isinstance(answer, bytes):
                found.append((one, answer))
            elif not isinstance(answer, ConnectionLost):
                raise answer
        return found

    def _counted(self, worker: _Worker, body: bytes) -> None:
        self._commons.counted(worker.id, unpack(body, list[Family])[0])

    async def _metrics(self, worker: _Worker, body: bytes) -> bytes:
        self._counted(worker, body)
        for one, answer in await self._ask_others(worker, "counts", b""):
            self._counted(one, answer)
        return pack(summed(self._commons.metrics()))

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Returns when no worker is left."""
        if not self._stop.is_set():
            self._told()
        elif self._status:
            self._note("stop")
        self._listeners.close()  # theirs are open as long as they take connections
        left = {worker.ended: worker for worker in self._workers.values()}
        if left:
            await self._all_ended(list(left))
        for ended, worker in left.items():
            if not ended.done():
                log.error("worker %d has not ended in time and is killed", worker.number)
                worker.process.kill()
                await ended
            elif ended.result() and not self._status:
                log.error("worker %d ended with status %d", worker.number, ended.result())
            self._status = self._status or int(ended.result() != 0)

    async def _all_ended(self, workers: list[asyncio.Task[int]]) -> None:
        """Returns when they have, or should have."""
        server = self._loaded.settings.server
        hurried = spawn(self._now.wait(), "second signal")
        together = asyncio.gather(*workers, return_exceptions=True)
        patience = server.drain_delay + server.drain_timeout + _KILLED_AFTER
        await asyncio.wait({hurried, together}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if hurried.done():
            await asyncio.wait({together}, timeout=_KILLED_AFTER)
        hurried.cancel()
