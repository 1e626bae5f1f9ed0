"""Where the subcommands find stored answers: the configured store, opened here, or a running proxy."""

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
    """What a subcommand works with. url: of the running proxy to ask, None: the store itself is opened."""

    settings: Settings
    url: str | None

    @asynccontextmanager
    async def client(self, filling: bool = False) -> AsyncIterator[CacheClient]:
        """The stored answers. filling: they are to become more, so the store may be made. Raises as `CacheClient`."""
        if self.url is not None:
            from .remote import asking

            async with asking(self.url, self.settings.server.admin_key) as remote:
                yield remote
            return
        store, facts = self._store(filling)
        await store.open()
        try:
            await store.list(limit=1)  # says at once what is wrong with it
            yield LocalCache(store, facts)
        finally:
            await store.close()

    def _store(self, filling: bool) -> tuple[Store, dict[str, Any]]:
        """The configured store, not yet open, and where it is."""
        cache, server = self.settings.cache, self.settings.server
        if cache.backend == "off":
            raise UsageError("nothing is stored: cache.backend is off")
        make = BACKENDS[cache.backend]
        if make is None:
            raise UsageError(
                f"with cache.backend: {cache.backend} the answers are in the running proxy alone: "
                f"ask it with --url http://{server.host}:{server.port}"
            )
        place = store_options(self.settings, SYSTEM_CLOCK.wall)
        where, bound = "", cache.max_size
        if cache.backend == "sqlite":
            path = Path(place.path).expanduser()
            where = str(path)
            if not filling and not path.exists():
                raise CommandError(f"there is no cache file {path}")
            _check(path)
        elif place.redis_url:
            parts = urlsplit(place.redis_url)
            where, bound = parts.hostname or parts.path, 0
        if not filling:
            # Who only looks drops nothing: not what is stale for him (a proxy may run in replay), nor for want of room.
            place = replace(place, max_stale=math.inf, max_size=2**62)
        facts = {"backend": cache.backend, "where": where} | ({"max_bytes": bound} if bound else {})
        return make(place), facts


def _check(path: Path) -> None:
    """A store moves a damaged file aside; a command that was given a wrong path must not. Raises CommandError."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(_SQLITE))
        if start and start != _SQLITE:
            raise CommandError(f"{path} is not a cache file")


class LocalCache:
    """A store opened by this process."""

    def __init__(self, store: Store, facts: dict[str, Any]) -> None:
        self._store = store
        self._facts = facts

    async def facts(self) -> dict[str, Any]:
        stats = await self._store.stats()
        kept = ("state", "entries", "bytes", "file_bytes")
        return self._facts | {name: stats[name] for name in kept if name in stats}

    async def list(self, wanted: FilterArguments) -> AsyncIterator[Sequence[EntrySummary]]:
        which, after, wall = _filter(wanted), "", SYSTEM_CLOCK.wall()
        while True:
            page = await self._store.list(which, after, PAGE)
            yield [listing(entry, size, wall) for entry, size in page.entries]
            after = page.next
            if not after:
                return

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        return await self._store.read(names)

    async def purge(self, wanted: FilterArguments, dry_run: bool) -> int:
        return await self._store.purge(_filter(wanted), dry_run)

    async def take(self, entries: Iterable[Entry], told: Callable[[], object]) -> ImportResult:
        return await import_entries(self._store, entries, SYSTEM_CLOCK.wall(), told=told)


def _filter(wanted: FilterArguments) -> Filter:
    fields: dict[str, Any] = dict(wanted)
    age = fields.pop("older_than", None)
    return Filter(**fields, stored_before=None if age is None else SYSTEM_CLOCK.wall() - age)
