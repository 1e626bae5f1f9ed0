"""proxy.cache.stores.intake: many entries at once, more than a store takes without a pause."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.cache.stores.intake import ImportResult, import_entries
from proxy.cache.stores.interface import StoreError
from proxy.cache.stores.sqlite import SQLiteStore
from tests.cache.stores.kit import NOW, entry


async def test_imported_entries_are_counted_by_result(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "cache.db", 2**28, 2**16, wall=lambda: NOW)
    await store.open()
    store.put(entry("there"))
    result: list[int] = []
    entries = [entry(f"k{number}", stored_at=NOW) for number in range(3000)]
    entries += [entry("there"), entry("over", ttl=1.0), entry("large", bytes(2**16 + 1))]
    taken = await import_entries(store, entries, NOW + 1, on_entry=lambda: result.append(1))
    assert taken == ImportResult(new=3000, replaced=1, expired=1, refused=1)
    assert len(result) == 3003
    assert (await store.stats())["entries"] == 3001
    assert await import_entries(store, [entry("over", ttl=1.0)], NOW + 1, grace=5.0) == ImportResult(new=1)
    await store.close()


async def test_a_store_that_refuses_writes_is_reported(tmp_path: Path) -> None:
    (tmp_path / "cache.db").mkdir()
    store = SQLiteStore(tmp_path / "cache.db", 2**28, 2**16, wall=lambda: NOW)
    await store.open()
    with pytest.raises(StoreError, match="not everything was written"):
        await import_entries(store, [entry()], NOW)
    await store.close()
