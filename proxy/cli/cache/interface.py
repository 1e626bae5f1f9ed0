"""Stored answers as the subcommands see them, and what can go wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from ...cache.entry import Entry
from ...cache.stores.intake import ImportResult
from ...cache.stores.interface import EntryName

PAGE: Final = 1000

FilterArguments = Mapping[str, str | float]
"""Which entries: the fields of a purge over HTTP (docs/caching.md); `older_than` in seconds."""

EntrySummary = dict[str, Any]
"""A stored answer as core/listing.py shows it."""


class CommandError(Exception):
    """It could not be done; says why, in one line. Exit status 1."""


class UsageError(Exception):
    """It was not asked for rightly; says how to. Exit status 2."""


class CacheClient(Protocol):
    """Stored answers. All methods raise Trouble or StoreError."""

    async def facts(self) -> dict[str, Any]:
        """What the store says of itself."""

    def list(self, wanted: FilterArguments) -> AsyncIterator[Sequence[EntrySummary]]:
        """What is wanted, in no order, a page at a time."""

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        """Those that are there, whole, in no order."""

    async def purge(self, wanted: FilterArguments, dry_run: bool) -> int:
        """How many went, or would."""

    async def take(self, entries: Iterable[Entry], told: Callable[[], object]) -> ImportResult:
        """Stores these; `told` is called after each."""


async def find_key(cabinet: CacheClient, text: str) -> str:
    """The key that is, or alone begins with, `text`. Raises CommandError."""
    found: set[str] = set()
    async for page in cabinet.list({"prefix": text}):
        found.update(card["key"] for card in page)
    if text in found:
        return text
    if not found:
        raise CommandError(f"no stored answer has a key that begins with {text!r}")
    if len(found) > 1:
        few = ", ".join(f"{key[: len(text) + 6]}…" for key in sorted(found)[:3])
        raise CommandError(f"{len(found)} keys begin with {text!r}, such as {few}")
    return found.pop()
