"""Equal requests in other processes that share the store: one of them buys, the others wait for its entry.

A short lease on the key says who buys. It is a courtesy, not a lock: who cannot take it waits for the entry, within
bounds; who has waited long enough, or cannot ask, buys himself; a lost lease costs one call more, never an error. A
stream cannot be followed from one process to another, so whoever wants one waits only as briefly as a person might for
a first word (`STREAM_WAIT`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from ...cache.lookup import Hit, Shelf
from ...cache.plan import CachePlan
from ...protocol.request import Call
from ...services import World
from ...system.clock import spawn
from ...upstream.interfaces import Leases
from ...upstream.progress import Progress

LEASE: Final = 10.0
"""Seconds that a lease lasts when it is not renewed: so long does a crash keep others waiting."""

RENEW: Final = 3.0
WAIT: Final = 30.0
"""Seconds for which another process' plain answer is waited for, at most."""

STREAM_WAIT: Final = 5.0
AVOID_FOR: Final = 60.0
"""Seconds for which nobody waits after an answer that could not be stored."""

_PAUSES: Final = (0.05, 0.25)
_WRITTEN: Final = 1.0


class Claim:
    """A lease that is ours. `end` gives it back, once."""

    def __init__(self, world: World, leases: Leases, name: str, token: str) -> None:
        self._world = world
        self._leases = leases
        self._name = name
        self._token = token
        self._renewing: asyncio.Task[None] | None = spawn(self._renew(), "lease")

    async def _renew(self) -> None:
        while True:
            await self._world.seams.sleep(RENEW)
            if not await self._leases.renew(self._name, self._token, LEASE):
                return

    def end(self, *, avoid: bool = False) -> None:
        """The answer is with the store, or will never be. avoid: others like it need not wait for each other."""
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
            spawn(self._release(avoid), "lease end")

    async def _release(self, avoid: bool) -> None:
        if self._world.store is not None and not avoid:
            try:
                async with asyncio.timeout(_WRITTEN):  # who takes the lease next shall find the entry
                    await self._world.store.flush()
            except TimeoutError:
                pass
        await self._leases.release(self._name, self._token, AVOID_FOR if avoid else 0.0)


class Elsewhere:
    """What is being bought by others who share the store."""

    def __init__(self, world: World, leases: Leases, shelf: Shelf) -> None:
        self._world = world
        self._leases = leases
        self._shelf = shelf

    async def claim(self, call: Call, plan: CachePlan, name: tuple[str, str], progress: Progress) -> Hit | Claim | None:
        """The answer that another process bought; or a lease, to buy it; None: to be bought without one."""
        seams, full = self._world.seams, ":".join(name)
        token = seams.new_id()
        began = seams.monotonic()
        until = min(began + (STREAM_WAIT if call.stream else WAIT), progress.horizon.until)
        pause, longest = _PAUSES
        waited = False
        progress.elsewhere = True
        try:
            while True:
                state = await self._leases.take(full, token, LEASE)
                if state == "mine":
                    claim = Claim(self._world, self._leases, full, token)
                    if waited and (hit := await self._looked(call, plan, claim)) is not None:
                        return hit
                    return claim
                if state == "open" or seams.monotonic() + pause >= until:
                    return None
                waited = True
                await seams.sleep(pause)
                pause = min(1.5 * pause, longest)
                hit, _ = await self._shelf.look(call, plan)
                if hit is not None:
                    return hit
        finally:
            progress.elsewhere = False
            progress.paused_ms += (seams.monotonic() - began) * 1000

    async def _looked(self, call: Call, plan: CachePlan, claim: Claim) -> Hit | None:
        """It may have been stored just before its lease was given back."""
        hit = None
        try:
            hit, _ = await self._shelf.look(call, plan)
        except BaseException:
            claim.end()
            raise
        if hit is not None:
            claim.end()
        return hit
