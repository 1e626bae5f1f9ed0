"""Memory in front of a slower store, or alone."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from ...system.tasks import spawn_forever
from ..entry import Entry
from .interface import ALL, EntryName, EntryPage, Filter, Store
from .memory import MemoryStore

log = logging.getLogger("proxy.cache")
T = TypeVar("T")

_CHUNK = 2000
_MAX_KEYS_AT_ONCE = 128

POLL: float = 1.0
"""Seconds between two checks for purges by other processes."""


class TieredStore:
    """A cache of two tiers. `peek` and `put` never wait; `get` waits for the slower store, which has a deadline.

    slower: writes in the background; `close` waits for it. None: memory alone.
    """

    enabled = True
    """False only where a `NullStore` stands in for a cache that is off."""

    def __init__(self, memory: MemoryStore, slower: Store | None = None) -> None:
        self.memory = memory
        self.slower = slower
        self._purges = 0
        self._following: asyncio.Task[None] | None = None
        self._promotions = 0
        self._failures = 0

    @property
    def purges(self) -> int:
        """Return how many purges there were. After one, what is remembered of entries elsewhere may be out of date."""
        return self._purges

    @property
    def up(self) -> bool:
        """Return whether the slower store works; True if there is none."""
        return self.slower is None or self.slower.up

    @property
    def errors(self) -> int:
        """Return how many reads and writes of the slower store have failed so far."""
        return 0 if self.slower is None else self.slower.errors + self._failures

    async def open(self) -> None:
        if self.slower is not None:
            await self.slower.open()
            self._following = spawn_forever(self._follow, "purges of others")

    def peek(self, key: str, form: str) -> Entry | None:
        """Return the entry if it is in memory, however old."""
        entry = self.memory.get(key, form)
        if entry is not None and self.slower is not None:
            self.slower.touch(key, form)
        return entry

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        """Return the entry. If memory's is not fresh at `wall` (Unix seconds), the newer one of both tiers.

        What the slower store has is put into memory.
        """
        entry = self.peek(key, form)
        if self.slower is None or (entry is not None and entry.fresh(wall)):
            return entry
        purges = self._purges
        found = await self._ask(self.slower.get(key, form, wall), None)
        self._promote(found, purges)
        return self._newer(key, form, found)

    def _newer(self, key: str, form: str, found: Entry | None) -> Entry | None:
        """Return the newer of what was `found` in the slower store and what is in memory by now.

        An entry that was stored while the slower store was asked must not be fetched a second time.
        """
        newest = self.memory.get(key, form)
        return found if newest is None or (found is not None and found.stored_at > newest.stored_at) else newest

    def _promote(self, found: Entry | None, purges: int) -> None:
        """Put into memory what the slower store has, if it is newer. purges: `_purges` when it was asked."""
        if found is not None and purges == self._purges:  # what was purged meanwhile must not come back
            newest = self.memory.get(found.key, found.form)
            if newest is None or newest.stored_at < found.stored_at:
                self._promotions += self.memory.put(found)

    async def newest(self, bare: str, form: str, wall: float) -> Entry | None:
        """Return the entry stored last under a key without a partition.

        Only the slower store can search for it; without one, memory finds it if it is the key itself.
        """
        if self.slower is None:
            return self.memory.get(bare, form)
        return await self._ask(self.slower.newest(bare, form, wall), None)

    async def get_both(self, key: str, form: str, other: str, wall: float) -> tuple[Entry | None, Entry | None]:
        """Return the entry in `form`, and the one in the `other` form, unless the first is fresh in memory."""
        entry = self.peek(key, form)
        if entry is not None and entry.fresh(wall):
            return entry, None
        if self.slower is None:
            return entry, self.peek(key, other)
        first, second = await asyncio.gather(self.get(key, form, wall), self.get(key, other, wall))
        return self._newer(key, form, first), self._newer(key, other, second)

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None]:
        """Return the entries of `keys`, as `get` does. If the slower store is late or fails, it is not asked again."""
        found = [self.peek(key, form) for key in keys]
        if self.slower is None:
            return found
        left = [at for at, entry in enumerate(found) if entry is None or not entry.fresh(wall)]
        for start in range(0, len(left), _MAX_KEYS_AT_ONCE):
            some = left[start : start + _MAX_KEYS_AT_ONCE]
            purges = self._purges
            entries = await self._ask(self.slower.get_many([keys[at] for at in some], form, wall), None)
            if entries is None:
                break
            for at, entry in zip(some, entries, strict=True):
                self._promote(entry, purges)
                found[at] = entry or found[at]
        for at in left:
            found[at] = self._newer(keys[at], form, found[at])
        return found

    async def _ask(self, answer: Awaitable[T], otherwise: T) -> T:
        """Return what the slower store answers. An exception that it does not promise costs a miss and a log line."""
        try:
            return await answer
        except Exception as error:
            self._failures += 1
            log.warning("the cache could not be read (%s: %s); the request is a miss", type(error).__name__, error)
            return otherwise

    def put(self, entry: Entry) -> bool:
        """Store an entry; memory has it at once. Returns False if neither tier keeps it."""
        in_memory = self.memory.put(entry)
        in_slower = self.slower is not None and self.slower.put(entry)
        return in_memory or in_slower

    def touch(self, key: str, form: str) -> None:
        self.peek(key, form)

    def sweep(self, wall: float, limit: int = 1000, grace: float = 0.0) -> int:
        """Delete what has expired from memory; the slower store does so itself."""
        return self.memory.sweep(wall, limit, grace)

    async def purge(self, which: Filter, dry_run: bool = False) -> int:
        """Delete what matches from both tiers. Raises StoreError; memory is purged in any case.

        Returns the larger of the tiers' counts, since the slower store has nearly all that memory has. Entries that
        only memory has are missing in it. Other processes purge their memory within about a second.
        """
        names = self.memory.matching(which)
        count = len(names)
        if not dry_run:
            await self._forget(names)
        return count if self.slower is None else max(count, await self.slower.purge(which, dry_run))

    async def forget(self, which: Filter, dry_run: bool = False) -> int:
        """Delete what matches from memory alone: another process has purged the slower store."""
        names = self.memory.matching(which)
        if not dry_run:
            await self._forget(names)
        return len(names)

    async def purged(self) -> list[Filter]:
        return [] if self.slower is None else await self.slower.purged()

    async def _follow(self) -> None:
        """Delete from memory what any process purged from the slower store."""
        while True:
            await asyncio.sleep(POLL)
            if self.memory.stats()["entries"]:  # otherwise there is nothing to delete
                for which in await self.purged():
                    await self._forget(self.memory.matching(which))

    async def _forget(self, names: list[EntryName]) -> None:
        """Delete these from memory, in batches."""
        self._purges += 1
        for start in range(0, len(names), _CHUNK):
            self.memory.remove(names[start : start + _CHUNK])
            await asyncio.sleep(0)

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        if self.slower is None:
            return self.memory.read(names)
        slower = await self.slower.read(names)
        known = {(entry.key, entry.form) for entry in slower}
        return [*slower, *self.memory.read(name for name in names if name not in known)]

    async def list(self, which: Filter = ALL, after: str = "", limit: int = 500) -> EntryPage:
        if self.slower is not None:
            return await self.slower.list(which, after, limit)
        start = tuple(after.split("\n", 1)) if after else ("", "")
        names = heapq.nsmallest(limit, (name for name in self.memory.matching(which) if name > start))
        return EntryPage(self.memory.listed(names), "\n".join(names[-1]) if len(names) == limit else "")

    async def stats(self) -> dict[str, int | str]:
        """Return memory's counts as `memory_…`, and the slower store's, or else memory's, under their own names."""
        found: dict[str, int | str] = {f"memory_{name}": count for name, count in self.memory.stats().items()}
        if self.slower is None:
            return found | self.memory.stats() | {"state": "ok"}
        return found | {"promotions": self._promotions} | await self.slower.stats()

    async def flush(self) -> None:
        if self.slower is not None:
            await self.slower.flush()

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
        if self.slower is not None:
            await self.slower.close()
