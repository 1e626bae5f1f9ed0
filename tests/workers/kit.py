"""Parent and workers in one process: real wires, a turned clock."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.workers.ipc import Channel
from proxy.workers.shared_state import SharedState
from proxy.workers.worker import WorkerLink


@asynccontextmanager
async def wire() -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends, each being served."""
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
async def seats(count: int, clock: Clock) -> AsyncIterator[tuple[SharedState, list[WorkerLink]]]:
    """Workers of one parent, which only keeps what they have in common."""
    commons = SharedState(clock, clock)
    found: list[WorkerLink] = []

    async def with_more() -> None:
        async with wire() as (ours, theirs):
            ours.handlers.update(commons.handlers(len(found), ours.notify))
            found.append(WorkerLink(theirs))
            if len(found) == count:
                ready.set()
                await done.wait()
            else:
                await with_more()

    ready, done = asyncio.Event(), asyncio.Event()
    running = asyncio.ensure_future(with_more())
    await ready.wait()
    try:
        yield commons, found
    finally:
        done.set()
        await running
