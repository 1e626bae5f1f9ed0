"""Entries brought from elsewhere into a store, a few at a time, so that it can write what it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from ..entry import Entry
from .interface import Store, StoreError

_FEW = 200
_FEW_BYTES = 8 * 1024 * 1024


class ImportResult(msgspec.Struct):
    """What became of the entries. new, replaced: there was none, or one, before; expired: their time was over;
    refused: larger than the store takes.
    """

    new: int = 0
    replaced: int = 0
    expired: int = 0
    refused: int = 0


async def import_entries(
    store: Store, entries: Iterable[Entry], wall: float, grace: float = 0.0, told: Callable[[], object] = lambda: None
) -> ImportResult:
    """Puts the entries. wall: now, Unix seconds; grace: as for `Store`; told: called after each. Raises StoreError."""
    taken = ImportResult()
    count = size = 0
    for entry in entries:
        if entry.expires_at + grace <= wall:
            taken.expired += 1
        else:
            there = await store.get(entry.key, entry.form, wall) is not None
            if not store.put(entry):
                taken.refused += 1
            elif there:
                taken.replaced += 1
            else:
                taken.new += 1
            count, size = count + 1, size + entry.size
        if count >= _FEW or size >= _FEW_BYTES:
            await store.flush()
            count = size = 0
        told()
    await store.flush()
    if (state := (await store.stats())["state"]) != "ok":
        raise StoreError(f"not everything was written: {state}")
    return taken
