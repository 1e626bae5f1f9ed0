"""What the subcommands of `openai-proxy cache` need of the cache, and their errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from ...cache.entry import Entry
from ...cache.stores.intake import ImportResult
from ...cache.stores.interface import EntryName

PAGE: Final = 1000

FilterArguments = Mapping[str, str | float]
"""The filters of a purge over HTTP (docs/caching.md); `older_than` in seconds."""

EntrySummary = dict[str, Any]
"""An entry without its body, as `proxy/cache/listing.py` makes it."""


class CommandError(Exception):
    """The command failed, with the reason in one line. Exit status 1."""


class UsageError(Exception):
    """The command line is wrong, with what to write instead. Exit status 2."""


class CacheClient(Protocol):
    """The store, or a running proxy. All methods raise CommandError or StoreError."""

    async def facts(self) -> dict[str, Any]:
        """Return the store's backend, place and sizes."""

    def list(self, filters: FilterArguments) -> AsyncIterator[Sequence[EntrySummary]]:
        """Yield the entries that match all filters, in no order, a page at a time."""

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        """Return the entries of these names that exist, in no order."""

    async def purge(self, filters: FilterArguments, dry_run: bool) -> int:
        """Delete the entries that match all filters; return their number. dry_run: only count them."""

    async def add(self, entries: Iterable[Entry], on_progress: Callable[[], object]) -> ImportResult:
        """Store entries. on_progress: called after each."""


async def find_key(cache: CacheClient, text: str) -> str:
    """Return the key that is `text`, else the only one that begins with it. Raises CommandError."""
    keys: set[str] = set()
    async for page in cache.list({"prefix": text}):
        keys.update(entry["key"] for entry in page)
    if text in keys:
        return text
    if not keys:
        raise CommandError(f"no stored response has a key that begins with {text!r}; `cache list` shows the keys")
    if len(keys) > 1:
        examples = ", ".join(f"{key[: len(text) + 6]}…" for key in sorted(keys)[:3])
        raise CommandError(f"{len(keys)} keys begin with {text!r}, such as {examples}; give more of the key")
    return keys.pop()
