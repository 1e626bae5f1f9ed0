"""A worker's end of the link: its start message, requests of the supervisor, and requests to other workers."""

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

ORPHAN_GRACE: float = 1.0
"""Seconds for which a worker whose supervisor has died lets requests finish."""


@dataclass(frozen=True, slots=True)
class StartMessage:
    """A worker's first message. listeners: file descriptors of the main one and, if it is set, of `server.ops`."""

    number: int
    loaded: LoadedSettings
    listeners: tuple[int, ...]
    address: str
    ops_address: str | None


class WorkerLink:
    """A worker's link to the supervisor.

    number: the worker's, from 1. stop, now: set by the first and the second signal to stop.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.number = 0
        self.stop, self.now = asyncio.Event(), asyncio.Event()
        self._start_message: asyncio.Future[StartMessage] = asyncio.get_running_loop().create_future()
        # Unpickling is safe: only the supervisor has the other end of this socket pair.
        channel.handlers["start"] = lambda body: self._start_message.set_result(pickle.loads(body))
        channel.handlers["stop"] = lambda _: self.stop.set()
        channel.handlers["now"] = lambda _: self.now.set()

    @classmethod
    async def open(cls, fd: int) -> tuple[WorkerLink, StartMessage]:
        """Open the link at the inherited descriptor `fd`. Raises ConnectionLost if the supervisor has died."""
        link = cls(await Channel.over(socket.socket(fileno=fd)))
        reading = spawn(link._run(), "link to the supervisor")
        await asyncio.wait({reading, link._start_message}, return_when=asyncio.FIRST_COMPLETED)
        if not link._start_message.done():
            raise ConnectionLost
        start = link._start_message.result()
        link.number = start.number
        return link, start

    async def _run(self) -> None:
        await self.channel.run()
        self.stop.set()  # the supervisor has died
        asyncio.get_running_loop().call_later(ORPHAN_GRACE, self.now.set)

    async def ask_peers(self, kind: str, body: bytes = b"") -> list[bytes]:
        """Return the answers of the other workers, without those that do not answer in time."""
        try:
            answers: list[bytes] = unpack(await self.channel.request("ask_peers", pack(kind, body)), list[bytes])[0]
        except ConnectionLost:
            return []
        return answers

    def notify_peers(self, kind: str, body: bytes) -> None:
        """Send a notification to all other workers."""
        self.channel.notify("notify_peers", pack(kind, body))

    async def metrics(self, own: list[Family]) -> list[Family]:
        """Return the sum of all workers' metrics; `own` if the supervisor does not answer."""
        try:
            merged: list[Family] = unpack(await self.channel.request("metrics", pack(own), 3.0), list[Family])[0]
        except ConnectionLost:
            return own
        return merged


class WorkerRuns:
    """The numbers and totals of runs, shared by all workers: the `SharedRuns` of `accounting.runs`."""

    def __init__(self, link: WorkerLink) -> None:
        self._channel = link.channel

    async def open(self) -> None:
        """Do nothing: the link is open."""

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
    """The owners of stored objects, shared by all workers: the `SharedOwners` of `upstream.keys`."""

    def __init__(self, link: WorkerLink) -> None:
        self._channel = link.channel

    async def open(self) -> None:
        """Do nothing: the link is open."""

    async def close(self) -> None:
        await self._channel.flush()

    async def put(self, digests: list[str], owner: str, only_new: bool) -> None:
        self._channel.notify("owner.put", pack(digests, owner, only_new))

    async def get(self, digests: list[str]) -> dict[str, str]:
        try:
            owners: dict[str, str] = unpack(await self._channel.request("owner.get", pack(digests)), dict[str, str])[0]
        except ConnectionLost:
            return {}
        return owners
