"""What cache backends have in common; each backend is one file.

`memory` is the tier in front of every backend: synchronous and private to the process. `tiered` joins it with the
backend behind it (sqlite, redis). A backend is one file here and one line in `build.BACKENDS`, and is imported only if
it is configured. It never raises into a request: if it is broken, slow, full or absent, the request is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, NamedTuple, Protocol

import msgspec

from ..entry import Entry

EntryName = tuple[str, str]
"""Key and form, under which an entry is stored."""


_WILD: Final = frozenset("*?[")


class StoreError(Exception):
    """An operator's request failed: the store is broken, absent or too slow. The message says why, in one line."""


def is_glob(name: str) -> bool:
    return not _WILD.isdisjoint(name)


def name_matches(name: str, wanted: str) -> bool:
    """Return whether `name` is the one that is wanted, or matches it as a glob (`*`, `?`, `[…]`)."""
    return name == wanted or (is_glob(wanted) and fnmatchcase(name, wanted))


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects the entries for which everything that is given holds; without anything, all.

    endpoint, model, namespace, tag: a name, or a glob such as `gpt-4o*`.
    prefix: what the key begins with.
    model: the requested one.
    stored_before: Unix seconds.
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
            and (self.endpoint is None or name_matches(entry.endpoint, self.endpoint))
            and (self.model is None or name_matches(entry.model, self.model))
            and (self.namespace is None or name_matches(entry.namespace, self.namespace))
            and (self.tag is None or any(name_matches(tag, self.tag) for tag in entry.tags))
            and (self.stored_before is None or entry.stored_at < self.stored_before)
        )


ALL: Final = Filter()

MAX_PURGES: Final = 1000
"""How many purges a store remembers, for `purged`."""


def purge_text(which: Filter) -> str:
    """Return a filter as a store writes it down after a purge."""
    return msgspec.json.encode(which).decode()


def purge_of(text: str | bytes) -> Filter:
    """Return the filter of a purge; `ALL` if another version of the program wrote it in another way."""
    try:
        return msgspec.json.decode(text, type=Filter)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError):  # TypeError: a value that is no text at all
        return ALL


class ListedEntry(NamedTuple):
    """An entry in a list. entry: with an empty body; size: bytes that it takes in its store."""

    entry: Entry
    size: int


class EntryPage(NamedTuple):
    """A part of a list. next: where the next page begins; "" at the end."""

    entries: list[ListedEntry]
    next: str


class Store(Protocol):
    """A backend, owned by one event loop. grace: seconds for which an entry is kept after its ttl; inf: forever."""

    async def open(self) -> None:
        """Get ready, within about a second. If that fails, the store logs it, serves misses and keeps trying."""

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        """Return the entry, however old it is: the caller decides whether a stale one may serve.

        Returns None if there is none, or if the store does not work. It never raises, and may be cancelled.

        wall: now, in Unix seconds.
        """

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None] | None:
        """Return several entries, in about the time of one. None: the store does not work, so do not ask again."""

    async def newest(self, bare: str, form: str, wall: float) -> Entry | None:
        """Return the entry that was stored last by any client under a key without a partition (`Entry.bare`)."""

    def put(self, entry: Entry) -> bool:
        """Take an entry, to write it soon and replace an older one. Returns False if it will not be kept."""

    def touch(self, key: str, form: str) -> None:
        """Note that a tier in front served this entry, so that it does not count as unused."""

    async def purge(self, which: Filter, dry_run: bool = False) -> int:
        """Delete the entries that match and return how many they are. Raises StoreError.

        Every process that uses the store learns of it by `purged`.

        dry_run: count only.
        """

    async def purged(self) -> list[Filter]:
        """Return what any process has purged since the last call, or since the store was opened.

        It may return more than that. It never raises: what is not returned now is returned later.
        """

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        """Return those of `names` that exist, in no order. They do not count as used. Raises StoreError."""

    async def list(self, which: Filter = ALL, after: str = "", limit: int = 500) -> EntryPage:
        """Return about `limit` matching entries, in no order. Raises StoreError.

        Entries that are stored or deleted between two pages may be missing.

        after: `next` of the page before.
        """

    @property
    def up(self) -> bool:
        """Return whether entries can be read now."""

    @property
    def errors(self) -> int:
        """Return how many reads and writes have failed so far."""

    async def stats(self) -> dict[str, int | str]:
        """Return counts so far, the store's size, and `state`: "ok" or what is wrong. It never raises."""

    async def flush(self) -> None:
        """Wait until everything put so far was written, or could not be."""

    async def close(self) -> None:
        """Flush, within a few seconds, and release all resources. The store cannot be used afterwards."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Where a backend keeps entries, and how much. Each backend takes what it needs.

    path: the file.
    max_size, max_entry: bytes, of all entries and of one body.
    redis_url: a secret.
    wall: returns Unix seconds.
    max_stale: seconds for which an entry is kept after its ttl; inf: forever.
    """

    path: str
    max_size: int
    max_entry: int
    redis_url: str = field(repr=False)
    redis_prefix: str
    wall: Callable[[], float]
    max_stale: float = 0.0
