"""A worker's end of the wire: its orders, what the parent asks of it, and what it asks of the others."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from ..accounting.runs.run import Run, Share
from ..config.loader import Loaded
from ..observability.aggregate import Family
from ..system.clock import spawn
from .ipc import Channel, Lost
from .shared_state import Known, pack, unpack

ORPHAN: float = 1.0
"""Seconds a worker whose parent is gone still lets requests finish."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told first. listeners: descriptors of the main one and, where there is one, of `server.ops`."""

    number: int
    loaded: Loaded
    listeners: tuple[int, ...]
    address: str
    ops_address: str | None


class Seat:
    """number: from 1; stop, now: set when the worker shall end, and shall not wait any longer."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.number = 0
        self.stop, self.now = asyncio.Event(), asyncio.Event()
        self._orders: asyncio.Future[Orders] = asyncio.get_running_loop().create_future()
        # Pickled, as its sender is our own parent, at the end of a socket that nobody else has.
        channel.handlers["orders"] = lambda body: self._orders.set_result(pickle.loads(body))
        channel.handlers["stop"] = lambda _: self.stop.set()
        channel.handlers["now"] = lambda _: self.now.set()

    @classmethod
    async def take(cls, fd: int) -> tuple[Seat, Orders]:
        """The seat at the inherited end `fd`. Raises Lost when the parent is gone already."""
        seat = cls(await Channel.over(socket.socket(fileno=fd)))
        reading = spawn(seat._run(), "wire to the parent")
        await asyncio.wait({reading, seat._orders}, return_when=asyncio.FIRST_COMPLETED)
        if not seat._orders.done():
            raise Lost
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
            found: list[bytes] = unpack(await self.channel.call("ask", pack(kind, body)), list[bytes])[0]
        except Lost:
            return []
        return found

    def tell(self, kind: str, body: bytes) -> None:
        """A note to all others."""
        self.channel.note("tell", pack(kind, body))

    async def metrics(self, mine: list[Family]) -> list[Family]:
        """All workers', summed; only our own where the parent cannot be asked."""
        try:
            found: list[Family] = unpack(await self.channel.call("metrics", pack(mine), 3.0), list[Family])[0]
        except Lost:
            return mine
        return found


class SeatRuns:
    """`runs.Shared`: the numbers and sums of runs that all workers have in common."""

    def __init__(self, seat: Seat) -> None:
        self._channel = seat.channel

    async def open(self) -> None:
        """There already."""

    async def close(self) -> None:
        await self._channel.flush()

    async def number(self, run: Run, key: str, retry: bool) -> int | None:
        try:
            answer = await self._channel.call("run.number", pack(run.owner, run.client, run.name, key, retry))
        except Lost:
            return None
        return int(unpack(answer, int)[0])

    async def ended(self, run: Run, key: str, number: int, delivered: bool) -> None:
        self._channel.note("run.ended", pack(run.owner, run.client, run.name, key, number, delivered))

    async def share(
        self, run: Run, share: Share, before: Decimal = Decimal(0), limit: Decimal | None = None
    ) -> bool | None:
        body = pack(run.owner, run.client, run.name, run.id, share, before, limit)
        try:
            fits, others = unpack(await self._channel.call("run.share", body), bool, list[Share])
        except Lost:
            return None
        run.heard(others, share.last)
        return bool(fits)

    async def read(self, name: str) -> Mapping[str, Known] | None:
        try:
            known: Mapping[str, Known] = unpack(await self._channel.call("run.read", pack(name)), dict[str, Known])[0]
        except Lost:
            return None
        return known


class SeatObjects:
    """`objects.Shared`: which key made which stored object."""

    def __init__(self, seat: Seat) -> None:
        self._channel = seat.channel

    async def open(self) -> None:
        """There already."""

    async def close(self) -> None:
        await self._channel.flush()

    async def put(self, ids: list[str], label: str) -> None:
        self._channel.note("made", pack(ids, label))

    async def get(self, ids: list[str]) -> str | None:
        try:
            label: str | None = unpack(await self._channel.call("maker", pack(ids)), str | None)[0]
        except Lost:
            return None
        return label
