"""A worker's end of the wire: its orders, what the parent asks of it, and what it asks of the others."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from ..accounting.runs.run import Run, RunShare
from ..config.loader import LoadedSettings
from ..observability.aggregate import Family
from ..system.clock import spawn
from .ipc import Channel, ConnectionLost
from .shared_state import WorkersKnownRun, pack, unpack

ORPHAN: float = 1.0
"""Seconds a worker whose parent is gone still lets requests finish."""


@dataclass(frozen=True, slots=True)
class StartMessage:
    """What a worker is told first. listeners: descriptors of the main one and, where there is one, of `server.ops`."""

    number: int
    loaded: LoadedSettings
    listeners: tuple[int, ...]
    address: str
    ops_address: str | None


class WorkerLink:
    """number: from 1; stop, now: set when the worker shall end, and shall not wait any longer."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.number = 0
        self.stop, self.now = asyncio.Event(), asyncio.Event()
        self._orders: asyncio.Future[StartMessage] = asyncio.get_running_loop().create_future()
        # Pickled, as its sender is our own parent, at the end of a socket that nobody else has.
        channel.handlers["orders"] = lambda body: self._orders.set_result(pickle.loads(body))
        channel.handlers["stop"] = lambda _: self.stop.set()
        channel.handlers["now"] = lambda _: self.now.set()

    @classmethod
    async def take(cls, fd: int) -> tuple[WorkerLink, StartMessage]:
        """The seat at the inherited end `fd`. Raises ConnectionLost when the parent is gone already."""
        seat = cls(await Channel.over(socket.socket(fileno=fd)))
        reading = spawn(seat._run(), "wire to the parent")
        await asyncio.wait({reading, seat._orders}, return_when=asyncio.FIRST_COMPLETED)
        if not seat._orders.done():
            raise ConnectionLost
        orders = seat._orders.result()
        seat.number = orders.number
        return seat, orders

    async def _run(self) -> None:
        await self.channel.run()
        self.stop.set()  # the parent is gone: no orphans
        asyncio.get_running_loop().call_later(ORPHAN, self.now.set)

    async def ask(self, kind: str, body: bytes = b"") -> list[bytes]:
        """What the other workers answer; who does not answer in time is left out."""
        try:
            found: list[bytes] = unpack(await self.channel.request("ask", pack(kind, body)), list[bytes])[0]
        except ConnectionLost:
            return []
        return found

    def tell(self, kind: str, body: bytes) -> None:
        """A note to all others."""
        self.channel.notify("tell", pack(kind, body))

    async def metrics(self, mine: list[Family]) -> list[Family]:
        """All workers', summed; only our own where the parent cannot be asked."""
        try:
            found: list[Family] = unpack(await self.channel.request("metrics", pack(mine), 3.0), list[Family])[0]
        except ConnectionLost:
            return mine
        return found


class WorkerRuns:
    """`runs.Shared`: the numbers and sums of runs that all workers have in common."""

    def __init__(self, seat: WorkerLink) -> None:
        self._channel = seat.channel

    async def open(self) -> None:
        """There already."""

    async def close(self) -> None:
        await self._channel.flush()

    async def number(self, run: Run, key: str, retry: bool) -> int | None:
        try:
            answer = await self._channel.request("run.number", pack(run.owner, run.client, run.name, key, retry))
        except ConnectionLost:
            return None
        return int(unpack(answer, int)[0])

    async def ended(self, run: Run, key: str, number: int, delivered: bool) -> None:
        self._channel.notify("run.ended", pack(run.owner, run.client, run.name, key, number, delivered))

    async def share(
        self, run: Run, share: RunShare, before: Decimal = Decimal(0), limit: Decimal | None = None
    ) -> bool | None:
        body = pack(run.owner, run.client, run.name, run.id, share, before, limit)
        try:
            fits, others = unpack(await self._channel.request("run.share", body), bool, list[RunShare])
        except ConnectionLost:
            return None
        run.apply_shared(others, share.last)
        return bool(fits)

    async def read(self, name: str) -> Mapping[str, WorkersKnownRun] | None:
        try:
            known: Mapping[str, WorkersKnownRun] = unpack(
                await self._channel.request("run.read", pack(name)), dict[str, WorkersKnownRun]
            )[0]
        except ConnectionLost:
            return None
        return known


class WorkerOwners:
    """`objects.Shared`: which key made which stored object."""

    def __init__(self, seat: WorkerLink) -> None:
        self._channel = seat.channel

    async def open(self) -> None:
        """There already."""

    async def close(self) -> None:
        await self._channel.flush()

    async def put(self, ids: list[str], label: str) -> None:
        self._channel.notify("made", pack(ids, label))

    async def get(self, ids: list[str]) -> str | None:
        try:
            label: str | None = unpack(await self._channel.request("maker", pack(ids)), str | None)[0]
        except ConnectionLost:
            return None
        return label
