"""Opens the cache for the subcommands: the configured store, or a running proxy."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from ...cache.entry import Entry
from ...cache.listing import listing
from ...cache.stores.build import BACKENDS, store_options
from ...cache.stores.intake import ImportResult, import_entries
from ...cache.stores.interface import EntryName, Filter, Store
from ...config.settings import Settings
from ...system.clock import SYSTEM_CLOCK
from .interface import PAGE, CacheClient, CommandError, EntrySummary, FilterArguments, UsageError

_SQLITE: Final = b"SQLite format 3\0"  # https://www.sqlite.org/fileformat.html, section 1.3


@dataclass(frozen=True, slots=True)
class CacheCommand:
    """What a subcommand works with. url: of the running proxy to ask; None: it opens the store itself."""

    settings: Settings
    url: str | None

    @asynccontextmanager
    async def client(self, filling: bool = False) -> AsyncIterator[CacheClient]:
        """Yield the cache. filling: entries will be added, so the store may be created. Raises as `CacheClient`."""
        if self.url is not None:
            from .remote import connect

            async with connect(self.url, self.settings.server.admin_key) as remote:
                yield remote
            return
        store, facts = self._store(filling)
        await store.open()
        try:
            await store.list(limit=1)  # raises StoreError at once if the store is unusable
            yield LocalCache(store, facts)
        finally:
            await store.close()

    def _store(self, filling: bool) -> tuple[Store, dict[str, Any]]:
        """Return the configured store, not yet open, and its facts."""
        cache, server = self.settings.cache, self.settings.server
        if cache.backend == "off":
            raise UsageError("nothing is stored: cache.backend is off; --cache sqlite or --url names another cache")
        make = BACKENDS[cache.backend]
        if make is None:
            raise UsageError(
                f"with cache.backend: {cache.backend} responses are only in the running proxy's memory; "
                f"ask it with --url http://{server.host}:{server.port}"
            )
        options = store_options(self.settings, SYSTEM_CLOCK.wall)
        where, max_bytes = "", cache.max_size
        if cache.backend == "sqlite":
            path = Path(options.path).expanduser()
            where = str(path)
            if not filling and not path.exists():
                raise CommandError(f"there is no cache file {path}; cache.path names it, --config other settings")
            _check(path)
        elif options.redis_url:
            parts = urlsplit(options.redis_url)
            where, max_bytes = parts.hostname or parts.path, 0
        if not filling:
            # A command that only reads must not evict: neither stale entries, which a replay may need, nor for space.
            options = replace(options, max_stale=math.inf, max_size=2**62)
        facts = {"backend": cache.backend, "where": where} | ({"max_bytes": max_bytes} if max_bytes else {})
        return make(options), facts


def _check(path: Path) -> None:
    """Raise CommandError if the file is not SQLite's: a store would take it for damaged and move it aside."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(_SQLITE))
        if start and start != _SQLITE:
            raise CommandError(f"{path} is not a cache file; check cache.path")


class LocalCache:
    """A store opened by this process."""

    def __init__(self, store: Store, facts: dict[str, Any]) -> None:
        self._store = store
        self._facts = facts

    async def facts(self) -> dict[str, Any]:
        stats = await self._store.stats()
        kept = ("state", "entries", "bytes", "file_bytes")
        return self._facts | {name: stats[name] for name in kept if name in stats}

    async def list(self, filters: FilterArguments) -> AsyncIterator[Sequence[EntrySummary]]:
        which, after, wall = _filter(filters), "", SYSTEM_CLOCK.wall()
        while True:
            page = await self._store.list(which, after, PAGE)
            yield [listing(entry, size, wall) for entry, size in page.entries]
            after = page.next
            if not after:
                return

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        return await self._store.read(names)

    async def purge(self, filters: FilterArguments, dry_run: bool) -> int:
        return await self._store.purge(_filter(filters), dry_run)

    async def add(self, entries: Iterable[Entry], on_progress: Callable[[], object]) -> ImportResult:
        return await import_entries(self._store, entries, SYSTEM_CLOCK.wall(), on_entry=on_progress)


def _filter(filters: FilterArguments) -> Filter:
    fields: dict[str, Any] = dict(filters)
    age = fields.pop("older_than", None)
    return Filter(**fields, stored_before=None if age is None else SYSTEM_CLOCK.wall() - age)
