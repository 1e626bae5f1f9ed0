"""Equal requests in other processes that share the store: one of them buys, the others wait for its entry.

A short lease on the key says who buys. It is a courtesy, not a lock: who cannot take it waits for the entry, within
bounds; who has waited long enough, or cannot ask, buys himself; a lost lease costs one call more, never an error. A
stream cannot be followed from one process to another, so whoever wants one waits only as briefly as a person might for
a first word (`STREAM_WAIT`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from ...cache.lookup import CacheHit, ResponseCache
from ...cache.plan import CachePlan
from ...protocol.request import ProxyRequest
from ...services import Services
from ...system.clock import spawn
from ...upstream.interfaces import LockStore
from ...upstream.progress import AttemptLog

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


class FetchLock:
    """A lease that is ours. `end` gives it back, once."""

    def __init__(self, services: Services, leases: LockStore, name: str, token: str) -> None:
        self._services = services
        self._leases = leases
        self._name = name
        self._token = token
        self._renewing: asyncio.Task[None] | None = spawn(self._renew(), "lease")

    async def _renew(self) -> None:
        while True:
            await self._services.clock.sleep(RENEW)
            if not await self._leases.renew(self._name, self._token, LEASE):
                return

    def end(self, *, avoid: bool = False) -> None:
        """The answer is with the store, or will never be. avoid: others like it need not wait for each other."""
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
            spawn(self._release(avoid), "lease end")

    async def _release(self, avoid: bool) -> None:
        if self._services.store is not None and not avoid:
            try:
                async with asyncio.timeout(_WRITTEN):  # who takes the lease next shall find the entry
                    await self._services.store.flush()
            except TimeoutError:
                pass
        await self._leases.release(self._name, self._token, AVOID_FOR if avoid else 0.0)


class CrossProcessFlight:
    """What is being bought by others who share the store."""

    def __init__(self, services: Services, leases: LockStore, shelf: ResponseCache) -> None:
        self._services = services
        self._leases = leases
        self._shelf = shelf

    async def acquire(
        self, request: ProxyRequest, plan: CachePlan, name: tuple[str, str], attempt_log: AttemptLog
    ) -> CacheHit | FetchLock | None:
        """The answer that another process bought; or a lease, to buy it; None: to be bought without one."""
        clock, full = self._services.clock, ":".join(name)
        token = clock.new_id()
        began = clock.monotonic()
        until = min(began + (STREAM_WAIT if request.stream else WAIT), attempt_log.deadline.at)
        pause, longest = _PAUSES
        waited = False
        attempt_log.waiting_for_peer = True
        try:
            while True:
                state = await self._leases.acquire(full, token, LEASE)
                if state == "mine":
                    claim = FetchLock(self._services, self._leases, full, token)
                    if waited and (hit := await self._looked(request, plan, claim)) is not None:
                        return hit
                    return claim
                if state == "open" or clock.monotonic() + pause >= until:
                    return None
                waited = True
                await clock.sleep(pause)
                pause = min(1.5 * pause, longest)
                hit, _ = await self._shelf.lookup(request, plan)
                if hit is not None:
                    return hit
        finally:
            attempt_log.waiting_for_peer = False
            attempt_log.paused_ms += (clock.monotonic() - began) * 1000

    async def _looked(self, request: ProxyRequest, plan: CachePlan, claim: FetchLock) -> CacheHit | None:
        """It may have been stored just before its lease was given back."""
        hit = None
        try:
            hit, _ = await self._shelf.lookup(request, plan)
        except BaseException:
            claim.end()
            raise
        if hit is not None:
            claim.end()
        return hit
