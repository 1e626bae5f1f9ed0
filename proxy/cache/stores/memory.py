"""The cache in memory: synchronous, bounded in bytes; the least recently used entry is evicted first."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from ..entry import Entry
from .interface import EntryName, Filter, ListedEntry


class MemoryStore:
    """Entries by key and form, owned by one event loop. No method waits, so none needs a lock.

    The caller decides whether a stale entry may serve.

    max_bytes: bytes of all entries together, overhead included.
    max_entry: bytes of the longest body that is kept.
    """

    def __init__(self, max_bytes: int, max_entry: int) -> None:
        self._max_bytes = max_bytes
        self._max_entry = max_entry
        self._bytes = 0
        self._evictions = 0
        self._expirations = 0
        self._entries: OrderedDict[EntryName, Entry] = OrderedDict()  # least recently used first
        # A heap by end of life. Entries that are gone stay in it until they are due or too many.
        self._expiry: list[tuple[float, EntryName]] = []

    def get(self, key: str, form: str) -> Entry | None:
        """Return the entry and make it the most recently used. One that names another key or form is deleted."""
        name = (key, form)
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.key != key or entry.form != form:
            self._remove(name)
            return None
        self._entries.move_to_end(name)
        return entry

    def put(self, entry: Entry) -> bool:
        """Store the entry, replace an older one, and evict others for room. Returns False if it is too large."""
        size = entry.size
        if size > self._max_bytes or len(entry.body) > self._max_entry:
            return False
        name = (entry.key, entry.form)
        if name in self._entries:
            self._remove(name)
        while self._bytes + size > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self._bytes -= evicted.size
            self._evictions += 1
        self._entries[name] = entry
        self._bytes += size
        heapq.heappush(self._expiry, (entry.expires_at, name))
        if len(self._expiry) > 2 * len(self._entries) + 64:
            self._expiry = [(kept.expires_at, name) for name, kept in self._entries.items()]
            heapq.heapify(self._expiry)
        return True

    def sweep(self, wall: float, limit: int = 1000, grace: float = 0.0) -> int:
        """Delete entries whose lifetime ended `grace` seconds or more before `wall`, and return how many.

        wall: now, in Unix seconds.
        limit: delete at most this many; if as many are deleted, there may be more.
        """
        dropped = 0
        while dropped < limit and self._expiry and self._expiry[0][0] + grace <= wall:
            end, name = heapq.heappop(self._expiry)
            entry = self._entries.get(name)
            if entry is not None and entry.expires_at == end:
                self._remove(name)
                self._expirations += 1
                dropped += 1
        return dropped

    def matching(self, which: Filter) -> list[EntryName]:
        """Return the names of the entries that match. It reads all entries: for operators' requests."""
        return [name for name, entry in self._entries.items() if which.matches(entry)]

    def remove(self, names: Iterable[EntryName]) -> int:
        """Delete those of `names` that exist, and return how many."""
        present = [name for name in names if name in self._entries]
        for name in present:
            self._remove(name)
        return len(present)

    def listed(self, names: Iterable[EntryName]) -> list[ListedEntry]:
        """Return those of `names` that exist, without their bodies. They do not count as used."""
        return [ListedEntry(msgspec.structs.replace(entry, body=b""), entry.size) for entry in self.read(names)]

    def read(self, names: Iterable[EntryName]) -> list[Entry]:
        """Return those of `names` that exist. They do not count as used."""
        return [entry for name in names if (entry := self._entries.get(name)) is not None]

    def stats(self) -> dict[str, int]:
        """Return entries, bytes and max_bytes, and how many evictions and expirations there were so far."""
        return {
            "entries": len(self._entries),
            "bytes": self._bytes,
            "max_bytes": self._max_bytes,
            "evictions": self._evictions,
            "expirations": self._expirations,
        }

    def _remove(self, name: EntryName) -> None:
        self._bytes -= self._entries.pop(name).size
