"""The memory tier: least recently used out first, bounded by real bytes, synchronous: a hit never waits."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from ..entry import Entry
from .interface import EntryName, Filter, ListedEntry


class MemoryStore:
    """Entries by key and form. Owned by one event loop; every method ends without waiting, so none locks.

    max_bytes: what all entries may take together, overhead included; max_entry: the longest body kept.
    Age is not judged on reading: who asks knows whether a stale entry may still serve.
    """

    def __init__(self, max_bytes: int, max_entry: int) -> None:
        self._max_bytes = max_bytes
        self._max_entry = max_entry
        self._bytes = 0
        self._evictions = 0
        self._expirations = 0
        self._entries: OrderedDict[EntryName, Entry] = OrderedDict()  # least recently used first
        # By end of life. Lines of entries that went another way stay until they are due or too many.
        self._calendar: list[tuple[float, EntryName]] = []

    def get(self, key: str, form: str) -> Entry | None:
        """The entry, now the most recently used. One that names another key or form is dropped: None."""
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
        """Stores the entry in place of an older one, evicting others for room. False: it is too large."""
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
        heapq.heappush(self._calendar, (entry.expires_at, name))
        if len(self._calendar) > 2 * len(self._entries) + 64:
            self._calendar = [(kept.expires_at, name) for name, kept in self._entries.items()]
            heapq.heapify(self._calendar)
        return True

    def sweep(self, wall: float, limit: int = 1000, grace: float = 0.0) -> int:
        """Drops entries whose lifetime ended `grace` seconds or more before `wall`; how many.

        At most `limit`: when it drops as many as that, there may be more.
        """
        dropped = 0
        while dropped < limit and self._calendar and self._calendar[0][0] + grace <= wall:
            end, name = heapq.heappop(self._calendar)
            entry = self._entries.get(name)
            if entry is not None and entry.expires_at == end:
                self._remove(name)
                self._expirations += 1
                dropped += 1
        return dropped

    def matching(self, which: Filter) -> list[EntryName]:
        """The names of what matches. Walks over everything: for administration."""
        return [name for name, entry in self._entries.items() if which.matches(entry)]

    def remove(self, names: Iterable[EntryName]) -> int:
        """Drops those of `names` that are there; how many."""
        present = [name for name in names if name in self._entries]
        for name in present:
            self._remove(name)
        return len(present)

    def listed(self, names: Iterable[EntryName]) -> list[ListedEntry]:
        """Those of `names` that are there, less their bodies. They do not count as used."""
        return [ListedEntry(msgspec.structs.replace(entry, body=b""), entry.size) for entry in self.read(names)]

    def read(self, names: Iterable[EntryName]) -> list[Entry]:
        """Those of `names` that are there. They do not count as used."""
        return [entry for name in names if (entry := self._entries.get(name)) is not None]

    def stats(self) -> dict[str, int]:
        """entries, bytes, max_bytes; evictions (for room) and expirations (by age) so far."""
        return {
            "entries": len(self._entries),
            "bytes": self._bytes,
            "max_bytes": self._max_bytes,
            "evictions": self._evictions,
            "expirations": self._expirations,
        }

    def _remove(self, name: EntryName) -> None:
        self._bytes -= self._entries.pop(name).size
