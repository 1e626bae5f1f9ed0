"""Import entries into a store, in batches that it can write."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from ..entry import Entry
from .interface import Store, StoreError

_BATCH = 200
_BATCH_BYTES = 8 * 1024 * 1024


class ImportResult(msgspec.Struct):
    """How many entries were new, replaced another one, had expired, or were refused because they are too large."""

    new: int = 0
    replaced: int = 0
    expired: int = 0
    refused: int = 0


async def import_entries(
    store: Store,
    entries: Iterable[Entry],
    wall: float,
    grace: float = 0.0,
    on_entry: Callable[[], object] = lambda: None,
) -> ImportResult:
    """Put the entries into the store. Raises StoreError.

    wall: now, in Unix seconds.
    grace: as for `Store`.
    on_entry: called after each entry.
    """
    result = ImportResult()
    count = size = 0
    for entry in entries:
        if entry.expires_at + grace <= wall:
            result.expired += 1
        else:
            there = await store.get(entry.key, entry.form, wall) is not None
            if not store.put(entry):
                result.refused += 1
            elif there:
                result.replaced += 1
            else:
                result.new += 1
            count, size = count + 1, size + entry.size
        if count >= _BATCH or size >= _BATCH_BYTES:
            await store.flush()
            count = size = 0
        on_entry()
    await store.flush()
    if (state := (await store.stats())["state"]) != "ok":
        raise StoreError(f"not everything was written: {state}")
    return result
