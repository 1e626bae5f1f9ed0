"""Memory in front of a slower store, or alone: what the journey looks into and fills."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Sequence

from ...system.clock import spawn
from ..entry import Entry
from .interface import ALL, EntryName, EntryPage, Filter, Store
from .memory import MemoryStore

_CHUNK = 2000
_AT_ONCE = 128

POLL: float = 1.0
"""Seconds between two looks for what other processes purged."""


class TieredStore:
    """`peek` and `put` never wait; `get` waits for the slower store, at most as long as that allows itself.

    The slower store (None: memory alone) writes in the background, within bounds of its own; `close` waits for it.
    """

    enabled = True
    """False only where a `NullStore` stands in for a cache that is off."""

    def __init__(self, memory: MemoryStore, slower: Store | None = None) -> None:
        self.memory = memory
        self.slower = slower
        self._purges = 0
        self._following: asyncio.Task[None] | None = None
        self._promotions = 0

    @property
    def purges(self) -> int:
        """How often something was thrown away by request: what is remembered of it elsewhere is out of date then."""
        return self._purges

    @property
    def errors(self) -> int:
        """What failed of the slower store so far."""
        return 0 if self.slower is None else self.slower.errors

    async def open(self) -> None:
        if self.slower is not None:
            await self.slower.open()
            self._following = spawn(self._follow(), "purges of others")

    def peek(self, key: str, form: str) -> Entry | None:
        """The entry where it is in memory, however old."""
        entry = self.memory.get(key, form)
        if entry is not None and self.slower is not None:
            self.slower.touch(key, form)
        return entry

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        """The entry; the younger one where memory's is no longer fresh at `wall` (Unix seconds). Promotes to memory."""
        entry = self.peek(key, form)
        if self.slower is None or (entry is not None and entry.fresh(wall)):
            return entry
        purges = self._purges
        found = await self.slower.get(key, form, wall)
        self._promote(found, purges)
        return self._younger(key, form, found)

    def _younger(self, key: str, form: str, found: Entry | None) -> Entry | None:
        """Of what was `found` and what is in memory by now: what was stored while the slower store was asked is not to
        be bought a second time."""
        newest = self.memory.get(key, form)
        return found if newest is None or (found is not None and found.stored_at > newest.stored_at) else newest

    def _promote(self, found: Entry | None, purges: int) -> None:
        """Puts into memory what was found behind it, asked for after so many purges, where it is the younger."""
        if found is not None and purges == self._purges:  # what was purged meanwhile must not come back
            newest = self.memory.get(found.key, found.form)
            if newest is None or newest.stored_at < found.stored_at:
                self._promotions += self.memory.put(found)

    async def newest(self, bare: str, form: str, wall: float) -> Entry | None:
        """By the bare key: of the slower store, which alone can search for it; in memory only where it is the key."""
        return self.memory.get(bare, form) if self.slower is None else await self.slower.newest(bare, form, wall)

    async def get_both(self, key: str, form: str, other: str, wall: float) -> tuple[Entry | None, Entry | None]:
        """The entry in `form`; and in the `other` one, which is looked for only where the first is not fresh."""
        entry = self.peek(key, form)
        if entry is not None and entry.fresh(wall):
            return entry, None
        if self.slower is None:
            return entry, self.peek(key, other)
        first, second = await asyncio.gather(self.get(key, form, wall), self.get(key, other, wall))
        return self._younger(key, form, first), self._younger(key, other, second)

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None]:
        """The entries of `keys`, as from `get`. Where the slower store is late or fails, it is not asked on."""
        found = [self.peek(key, form) for key in keys]
        if self.slower is None:
            return found
        left = [at for at, entry in enumerate(found) if entry is None or not entry.fresh(wall)]
        for start in range(0, len(left), _AT_ONCE):
            some = left[start : start + _AT_ONCE]
            purges = self._purges
            entries = await self.slower.get_many([keys[at] for at in some], form, wall)
            if entries is None:
                break
            for at, entry in zip(some, entries, strict=True):
                self._promote(entry, purges)
                found[at] = entry or found[at]
        for at in left:
            found[at] = self._younger(keys[at], form, found[at])
        return found

    def put(self, entry: Entry) -> bool:
        """Readable from memory at once. False: neither tier keeps it."""
        in_memory = self.memory.put(entry)
        behind = self.slower is not None and self.slower.put(entry)
        return in_memory or behind

    def touch(self, key: str, form: str) -> None:
        self.peek(key, form)

    def sweep(self, wall: float, limit: int = 1000, grace: float = 0.0) -> int:
        """Drops what has expired from memory; a slower store sweeps itself."""
        return self.memory.sweep(wall, limit, grace)

    async def purge(self, which: Filter, dry_run: bool = False) -> int:
        """Drops what matches from both tiers. Raises StoreError; memory is purged in any case.

        How many: the larger of the tiers' counts, as nearly all of memory is behind it too. What only memory has (the
        store behind was full or is broken) is not in it. Memory of other processes follows within about a second.
        """
        names = self.memory.matching(which)
        count = len(names)
        if not dry_run:
            await self._forget(names)
        return count if self.slower is None else max(count, await self.slower.purge(which, dry_run))

    async def forget(self, which: Filter, dry_run: bool = False) -> int:
        """The same for memory alone: another process has purged what is behind it."""
        names = self.memory.matching(which)
        if not dry_run:
            await self._forget(names)
        return len(names)

    async def purged(self) -> list[Filter]:
        return [] if self.slower is None else await self.slower.purged()

    async def _follow(self) -> None:
        """Takes out of memory what any process purged from the store behind."""
        while True:
            await asyncio.sleep(POLL)
            if self.memory.stats()["entries"]:  # else there is nothing to be taken out: let the store be
                for which in await self.purged():
                    await self._forget(self.memory.matching(which))

    async def _forget(self, names: list[EntryName]) -> None:
        """Drops these from memory, a few at a time."""
        self._purges += 1
        for start in range(0, len(names), _CHUNK):
            self.memory.remove(names[start : start + _CHUNK])
            await asyncio.sleep(0)

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        if self.slower is None:
            return self.memory.read(names)
        behind = await self.slower.read(names)
        there = {(entry.key, entry.form) for entry in behind}
        return [*behind, *self.memory.read(name for name in names if name not in there)]

    async def list(self, which: Filter = ALL, after: str = "", limit: int = 500) -> EntryPage:
        if self.slower is not None:
            return await self.slower.list(which, after, limit)
        start = tuple(after.split("\n", 1)) if after else ("", "")
        names = heapq.nsmallest(limit, (name for name in self.memory.matching(which) if name > start))
        return EntryPage(self.memory.listed(names), "\n".join(names[-1]) if len(names) == limit else "")

    async def stats(self) -> dict[str, int | str]:
        """Memory's counts as `memory_…`, the slower store's under their own names; alone, memory's are those."""
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
