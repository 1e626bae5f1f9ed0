"""Identical requests in other processes that share the store: one process fetches, the others wait for its entry.

A short-lived lock on the cache key says which one. The lock is advisory: a process that cannot take it waits a bounded
time for the entry, then fetches the response itself. So a lost lock costs one more upstream request, never an error. A
stream cannot be followed from one process to another, so a client that wants one waits only briefly (`STREAM_WAIT`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from ...cache.lookup import CacheHit, ResponseCache
from ...cache.plan import CachePlan
from ...cache.stores.tiered import TieredStore
from ...protocol.request import ProxyRequest
from ...system.clock import Clock, spawn
from ...upstream.interfaces import LockStore
from ...upstream.progress import AttemptLog

LEASE: Final = 10.0
"""Seconds that a lock lasts if it is not renewed: a crash keeps others waiting for as long."""

RENEW: Final = 3.0
WAIT: Final = 30.0
"""The longest wait for another process's plain response, in seconds."""

STREAM_WAIT: Final = 5.0
AVOID_FOR: Final = 60.0
"""Seconds for which no process waits after a response that could not be stored."""

_PAUSES: Final = (0.05, 0.25)
_WRITTEN: Final = 1.0


class FetchLock:
    """A lock that this process holds. `end` releases it, once."""

    def __init__(self, locks: LockStore, store: TieredStore, clock: Clock, name: str, token: str) -> None:
        self._locks = locks
        self._store = store
        self._clock = clock
        self._name = name
        self._token = token
        self._renewing: asyncio.Task[None] | None = spawn(self._renew(), "lease")

    async def _renew(self) -> None:
        while True:
            await self._clock.sleep(RENEW)
            if not await self._locks.renew(self._name, self._token, LEASE):
                return

    def end(self, *, avoid: bool = False) -> None:
        """Release the lock: the response is with the store, or will never be.

        avoid: it could not be stored, so that others need not wait for each other for a while.
        """
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
            spawn(self._release(avoid), "lease end")

    async def _release(self, avoid: bool) -> None:
        if not avoid:
            try:
                async with asyncio.timeout(_WRITTEN):  # whoever takes the lock next is to find the entry
                    await self._store.flush()
            except TimeoutError:
                pass
        await self._locks.release(self._name, self._token, AVOID_FOR if avoid else 0.0)


class CrossProcessFlight:
    """Waits for other processes that share the store and fetch the same response."""

    def __init__(self, locks: LockStore, cache: ResponseCache, store: TieredStore, clock: Clock) -> None:
        self._locks = locks
        self._cache = cache
        self._store = store
        self._clock = clock

    async def acquire(
        self, request: ProxyRequest, plan: CachePlan, key: tuple[str, str], attempt_log: AttemptLog
    ) -> CacheHit | FetchLock | None:
        """Return the response that another process fetched; or a lock, to fetch it; or None, to fetch it without."""
        clock, name = self._clock, ":".join(key)
        token = clock.new_id()
        began = clock.monotonic()
        until = min(began + (STREAM_WAIT if request.stream else WAIT), attempt_log.deadline.at)
        pause, longest = _PAUSES
        waited = False
        attempt_log.waiting_for_peer = True
        try:
            while True:
                state = await self._locks.acquire(name, token, LEASE)
                if state == "acquired":
                    lock = FetchLock(self._locks, self._store, clock, name, token)
                    if waited and (hit := await self._lookup(request, plan, lock)) is not None:
                        return hit
                    return lock
                if state == "unavailable" or clock.monotonic() + pause >= until:
                    return None
                waited = True
                await clock.sleep(pause)
                pause = min(1.5 * pause, longest)
                hit, _ = await self._cache.lookup(request, plan)
                if hit is not None:
                    return hit
        finally:
            attempt_log.waiting_for_peer = False
            attempt_log.paused_ms += (clock.monotonic() - began) * 1000

    async def _lookup(self, request: ProxyRequest, plan: CachePlan, lock: FetchLock) -> CacheHit | None:
        """Return what was stored just before the lock was released."""
        hit = None
        try:
            hit, _ = await self._cache.lookup(request, plan)
        except BaseException:
            lock.end()
            raise
        if hit is not None:
            lock.end()
        return hit
