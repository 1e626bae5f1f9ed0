"""proxy.cache.stores.tiered: memory first, the slower store behind it, and what happens between the two."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from proxy.cache.entry import Entry
from proxy.cache.stores.interface import ALL, EntryName, EntryPage, Filter, StoreError
from proxy.cache.stores.memory import MemoryStore
from proxy.cache.stores.tiered import TieredStore
from tests.cache.stores.kit import NOW, entry


class Slower:
    """A store behind memory that can be told to wait and to fail. Says what it was asked."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}
        self.asked: list[str] = []
        self.touched: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.takes = True
        self.state = "ok"
        self.heard: list[Filter] = []

    async def open(self) -> None:
        self.asked.append("open")

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        self.asked.append(key)
        found = self.entries.get((key, form))
        await self.gate.wait()
        return found

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None] | None:
        return [await self.get(key, form, wall) for key in keys] if self.state == "ok" else None

    async def newest(self, bare: str, form: str, wall: float) -> Entry | None:
        return await self.get(bare, form, wall)

    def put(self, entry: Entry) -> bool:
        if self.takes:
            self.entries[entry.key, entry.form] = entry
        return self.takes

    def touch(self, key: str, form: str) -> None:
        self.touched.append(key)

    async def purge(self, which: Filter, dry_run: bool = False) -> int:
        if self.state != "ok":
            raise StoreError(self.state)
        return len(self.entries)

    async def purged(self) -> list[Filter]:
        self.asked.append("purged")
        heard, self.heard = self.heard, []
        return heard

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        return [self.entries[name] for name in names if name in self.entries]

    async def list(self, which: Filter = ALL, after: str = "", limit: int = 500) -> EntryPage:
        return EntryPage([], "")

    @property
    def up(self) -> bool:
        return True

    @property
    def errors(self) -> int:
        return 3

    async def stats(self) -> dict[str, int | str]:
        return {"entries": len(self.entries), "state": self.state}

    async def flush(self) -> None:
        self.asked.append("flush")

    async def close(self) -> None:
        self.asked.append("close")


@pytest.fixture
async def slower() -> Slower:
    return Slower()


def tiered(slower: Slower) -> TieredStore:
    return TieredStore(MemoryStore(2**20, 2**18), slower)


async def test_a_hit_in_memory_asks_no_slower_store(slower: Slower) -> None:
    store = tiered(slower)
    store.put(entry("a"))
    assert store.peek("a", "json") == entry("a")
    assert await store.get("a", "json", NOW) == entry("a")
    store.touch("a", "json")
    assert slower.asked == []
    assert slower.touched == ["a"] * 3


async def test_an_entry_of_the_slower_store_is_kept_in_memory(slower: Slower) -> None:
    slower.put(entry("a"))
    store = tiered(slower)
    assert store.peek("a", "json") is None
    assert await store.get("a", "json", NOW) == entry("a")
    assert store.peek("a", "json") == entry("a")
    assert (await store.stats())["promotions"] == 1


async def test_an_entry_too_large_for_memory_is_served_from_the_slower_store(slower: Slower) -> None:
    store, large = tiered(slower), entry("a", bytes(2**18 + 1))
    assert store.put(large)
    assert store.peek("a", "json") is None
    assert await store.get("a", "json", NOW) == large
    slower.takes = False
    assert not store.put(large)


@pytest.mark.parametrize(("behind", "wanted"), [(NOW + 90, NOW + 90), (NOW, NOW), (NOW - 90, NOW), (None, NOW)])
async def test_the_younger_of_two_entries_is_returned(slower: Slower, behind: float | None, wanted: float) -> None:
    """Once memory's is stale: another process may have a new one."""
    store = tiered(slower)
    store.put(entry("a", ttl=60.0))
    slower.entries.clear()
    if behind is not None:
        slower.put(entry("a", stored_at=behind, ttl=60.0))
    found = await store.get("a", "json", NOW + 100)
    assert found is not None
    assert found.stored_at == wanted
    assert slower.asked == ["a"]
    kept = store.peek("a", "json")
    assert kept is not None
    assert kept.stored_at == wanted


async def test_an_entry_stored_meanwhile_is_not_replaced_by_an_older_one(slower: Slower) -> None:
    store = tiered(slower)
    slower.put(entry("a"))
    slower.gate.clear()
    reading = asyncio.create_task(store.get("a", "json", NOW))
    await asyncio.sleep(0)
    store.put(entry("a", stored_at=NOW + 1))
    slower.gate.set()
    assert await reading == entry("a", stored_at=NOW + 1)
    assert store.peek("a", "json") == entry("a", stored_at=NOW + 1)


async def test_an_entry_stored_during_a_lookup_is_found(slower: Slower) -> None:
    store = tiered(slower)
    slower.gate.clear()
    one = asyncio.create_task(store.get("a", "json", NOW))
    both = asyncio.create_task(store.get_both("a", "sse", "json", NOW))
    many = asyncio.create_task(store.get_many(["b", "a"], "json", NOW))
    while len(slower.asked) < 4:  # noqa: ASYNC110 - turns of the loop, no waiting
        await asyncio.sleep(0)
    store.put(entry("a"))
    slower.gate.set()
    assert await one == entry("a")
    assert await both == (None, entry("a"))
    assert await many == [None, entry("a")]


async def test_an_entry_purged_during_a_read_stays_purged(slower: Slower) -> None:
    store = tiered(slower)
    slower.put(entry("a"))
    slower.gate.clear()
    reading = asyncio.create_task(store.get("a", "json", NOW))
    await asyncio.sleep(0)
    await store.purge(ALL)
    slower.gate.set()
    assert await reading == entry("a")
    assert store.peek("a", "json") is None


async def test_memory_is_purged_even_if_the_slower_store_fails(slower: Slower) -> None:
    store = tiered(slower)
    store.put(entry("a"))
    slower.state = "gone"
    with pytest.raises(StoreError, match="gone"):
        await store.purge(ALL)
    assert store.peek("a", "json") is None
    assert (await store.stats())["state"] == "gone"


async def test_entries_of_either_tier_are_read(slower: Slower) -> None:
    store = tiered(slower)
    slower.put(entry("behind"))
    slower.takes = False
    store.put(entry("front"))
    found = await store.read([("behind", "json"), ("front", "json"), ("nobody", "json")])
    assert [one.key for one in found] == ["behind", "front"]


async def test_purges_by_other_processes_reach_memory(slower: Slower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cache.stores.tiered.POLL", 0.001)
    store = tiered(slower)
    await store.open()
    for key in ("a", "b", "c"):
        store.put(entry(key, model=f"model of {key}"))
    slower.heard = [Filter(model="model of a"), Filter(key="b"), Filter(key="nobody")]
    while store.peek("b", "json") is not None:  # noqa: ASYNC110 - a look is what is tested
        await asyncio.sleep(0.001)
    assert [store.peek(key, "json") is None for key in ("a", "b", "c")] == [True, True, False]
    slower.heard = [ALL]
    while store.peek("c", "json") is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    slower.asked.clear()
    await asyncio.sleep(0.01)
    assert slower.asked == []  # with nothing in memory there is nothing to ask
    await store.close()


async def test_other_methods_are_forwarded_to_the_slower_store(slower: Slower) -> None:
    store = tiered(slower)
    await store.open()
    await store.flush()
    await store.close()
    assert slower.asked == ["open", "flush", "close"]
    assert (await store.list()).entries == []
    store.put(entry("a", ttl=1.0))
    assert store.sweep(NOW + 2) == 1
    assert store.peek("a", "json") is None


async def test_several_keys_are_looked_up_in_memory_first() -> None:
    slower = Slower()
    store = TieredStore(MemoryStore(1_000_000, 100_000), slower)
    store.memory.put(entry("here"))
    store.memory.put(entry("old", stored_at=NOW - 4000))
    for key in ("there", "old"):
        slower.entries[key, "json"] = entry(key)
    names = ["here", "there", "nowhere", "old", *(f"n{number}" for number in range(300))]
    found = await store.get_many(names, "json", NOW)
    assert [one.key if one else None for one in found] == ["here", "there", None, "old", *[None] * 300]
    assert found[3] == entry("old")
    assert slower.asked == names[1:]
    assert store.peek("there", "json") == entry("there")
    slower.state = "broken"
    found = await store.get_many(["here", "there", "else"], "json", NOW)
    assert [one is not None for one in found] == [True, True, False]
    alone = TieredStore(store.memory)
    assert [one is not None for one in await alone.get_many(["here", "else"], "json", NOW)] == [True, False]


@pytest.mark.parametrize("fault", [AttributeError, TypeError, ValueError, AssertionError, OverflowError, StoreError])
async def test_an_exception_that_a_store_does_not_promise_costs_a_miss(
    fault: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Slower):
        async def get(self, key: str, form: str, wall: float) -> Entry | None:
            raise fault("of the driver")

    store = TieredStore(MemoryStore(1000, 1000), Broken())
    assert await store.get("a", "json", NOW) is None
    assert await store.get_both("a", "json", "sse", NOW) == (None, None)
    assert await store.get_many(["a", "b"], "json", NOW) == [None, None]
    assert await store.newest("a", "json", NOW) is None
    assert store.errors >= 4
    assert "of the driver" in caplog.text


async def test_a_fault_while_purges_are_followed_does_not_end_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cache.stores.tiered.POLL", 0.001)
    monkeypatch.setattr("proxy.system.tasks._FIRST_PAUSE", 0.001)

    class Broken(Slower):
        faults = 1

        async def purged(self) -> list[Filter]:
            if self.faults:
                self.faults -= 1
                raise TypeError("a reply of another shape")
            return await super().purged()

    slower = Broken()
    store = TieredStore(MemoryStore(100_000, 10_000), slower)
    await store.open()
    store.memory.put(entry("a"))
    slower.heard = [ALL]
    async with asyncio.timeout(15):
        while store.memory.get("a", "json") is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await store.close()
