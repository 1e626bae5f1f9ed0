"""Cache backends, one file each, and what they have in common.

`memory` is the tier in front of every backend: synchronous, private to the process. `tiered` joins it to the backend
behind it (sqlite, redis), which is one file here and one line in the table `BACKENDS`; its module is imported only when
its name is configured. A backend never raises into a request: what is broken, slow, full or absent is a miss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import msgspec

from ..entry import Entry

EntryName = tuple[str, str]
"""Key and form: what an entry is stored under."""

MAX_CLOCK_SKEW: Final = 300.0
"""An entry from further in the future than this (seconds) was written by a clock that was wrong: a miss."""


class StoreError(Exception):
    """Administration could not be done: the store is broken, absent or too slow. Says why, in one line."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which entries: those for which everything that is given holds; without anything, all.

    prefix: what the key begins with; model: the one asked for; stored_before: Unix seconds.
    """

    key: str | None = None
    prefix: str | None = None
    endpoint: str | None = None
    model: str | None = None
    namespace: str | None = None
    tag: str | None = None
    stored_before: float | None = None

    def matches(self, entry: Entry) -> bool:
        return (
            (self.key is None or entry.key == self.key)
            and (self.prefix is None or entry.key.startswith(self.prefix))
            and (self.endpoint is None or entry.endpoint == self.endpoint)
            and (self.model is None or entry.model == self.model)
            and (self.namespace is None or entry.namespace == self.namespace)
            and (self.tag is None or self.tag in entry.tags)
            and (self.stored_before is None or entry.stored_at < self.stored_before)
        )


ALL: Final = Filter()

MOST_PURGES: Final = 1000
"""So many purges a store remembers, for `purged`."""


def purge_text(which: Filter) -> str:
    """How a store writes down that this was purged."""
    return msgspec.json.encode(which).decode()


def purge_of(text: str | bytes) -> Filter:
    """What was purged; everything, where another version of the program says it in a way of its own."""
    try:
        return msgspec.json.decode(text, type=Filter)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ALL


class ListedEntry(NamedTuple):
    """An entry in a list. entry: with an empty body; size: bytes it takes in its store."""

    entry: Entry
    size: int


class EntryPage(NamedTuple):
    """Part of a list. next: where to go on, "" at the end."""

    entries: list[ListedEntry]
    next: str


class Store(Protocol):
    """A backend. Owned by one event loop. grace: how long past its ttl an entry is still kept (s), inf: for ever."""

    async def open(self) -> None:
        """Makes it ready, within about a second. Where that fails it serves misses, says so and keeps trying."""

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        """The entry, however old: who asks knows whether a stale one may serve. `wall`: now, Unix seconds.

        None: there is none, or the store cannot tell. Never raises; a caller who is cancelled harms nobody.
        """

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None] | None:
        """The same for several, in about the time of one. None: the store cannot tell, and more need not be asked."""

    async def newest(self, bare: str, form: str, wall: float) -> Entry | None:
        """As `get`, by the bare key (core/entry.py): of several clients' answers the one stored last."""

    def put(self, entry: Entry) -> bool:
        """Takes the entry, to be written soon, in place of an older one; never waits. False: it will not be kept."""

    def touch(self, key: str, form: str) -> None:
        """Tells that a tier in front served this entry, so that it does not count as unused. Never waits."""

    async def purge(self, which: Filter, dry_run: bool = False) -> int:
        """Drops what was put so far and matches; how many (with dry_run: would be). Raises StoreError.

        Every process that uses the store hears of it by `purged`.
        """

    async def purged(self) -> list[Filter]:
        """What was purged, by whichever process, since this was last asked, or since the store was opened.

        More than that where the store cannot tell. Never raises: what is not said now is said later.
        """

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        """Those of `names` that are there, whole, in no order; they do not count as used. Raises StoreError."""

    async def list(self, which: Filter = ALL, after: str = "", limit: int = 500) -> EntryPage:
        """About `limit` matching entries, in no order; `after`: the page before's `next`. Raises StoreError.

        Entries put or dropped between two pages may be missing; one that is there all along is listed.
        """

    @property
    def errors(self) -> int:
        """Reads and writes that failed so far."""

    async def stats(self) -> dict[str, int | str]:
        """Counts so far, what there is, and `state`: "ok" or what is wrong. Never raises."""

    async def flush(self) -> None:
        """Returns when everything put so far was written, or could not be."""

    async def close(self) -> None:
        """Flushes, within a few seconds, and lets go. Nothing may be asked of it afterwards."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Where a backend keeps entries, and how much: each takes what it needs.

    path: of the file; max_size, max_entry: bytes; redis_url: a secret; grace: as for `Store`; wall: the clock.
    """

    path: str
    max_size: int
    max_entry: int
    redis_url: str = field(repr=False)
    redis_prefix: str
    wall: Callable[[], float]
    max_stale: float = 0.0


def plausible(entry: Entry, wall: float, grace: float) -> bool:
    """Whether its age can be told at `wall` (Unix seconds). Where nothing ages (grace: inf), it need not be."""
    return entry.stored_at - wall <= MAX_CLOCK_SKEW or grace == math.inf
