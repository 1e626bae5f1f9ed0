"""Supervisor and workers in one process: real socket pairs, a clock that the test turns."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.workers.ipc import Channel
from proxy.workers.shared_state import SharedState
from proxy.workers.worker import WorkerLink


@asynccontextmanager
async def channel_pair() -> AsyncIterator[tuple[Channel, Channel]]:
    """Yield both ends of a link; each receives messages."""
    ends = [await Channel.over(end) for end in socket.socketpair()]
    running = [asyncio.ensure_future(end.run()) for end in ends]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()
        await asyncio.gather(*running)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def worker_links(count: int, clock: Clock) -> AsyncIterator[tuple[SharedState, list[WorkerLink]]]:
    """Yield the shared state of a supervisor, and the links of its workers."""
    shared_state = SharedState(clock, clock)
    links: list[WorkerLink] = []

    async def open_next() -> None:
        async with channel_pair() as (supervisor_end, worker_end):
            supervisor_end.handlers.update(shared_state.handlers(len(links), supervisor_end.notify))
            links.append(WorkerLink(worker_end))
            if len(links) == count:
                ready.set()
                await done.wait()
            else:
                await open_next()

    ready, done = asyncio.Event(), asyncio.Event()
    running = asyncio.ensure_future(open_next())
    await ready.wait()
    try:
        yield shared_state, links
    finally:
        done.set()
        await running
