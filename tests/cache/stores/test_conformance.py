"""One suite over every backend: what a store promises, whatever stands behind it."""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.cache.entry import Entry
from proxy.cache.stores.build import BACKENDS
from proxy.cache.stores.interface import ALL, Filter, ListedEntry, Store, StoreOptions
from proxy.cache.stores.memory import MemoryStore
from proxy.cache.stores.redis import RedisStore
from proxy.cache.stores.tiered import TieredStore
from tests.cache.stores.kit import NOW, PATIENT, entry, redis_url, until

MAX_ENTRY = 4 * 2**20
Make = Callable[[], Awaitable[Store]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with redis_url() as url:
        yield url


BEHIND = [name for name, make in BACKENDS.items() if make is not None]


def _params() -> Iterator[Any]:
    for name in ("memory", *BEHIND, *(f"tiered {name}" for name in BEHIND)):
        yield pytest.param(name, marks=pytest.mark.slow if name.endswith("redis") else ())


@pytest.fixture(params=_params())
async def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Opens the same store again and again; what is still open at the end is closed."""
    monkeypatch.setattr("proxy.cache.stores.sqlite.DEADLINE", PATIENT)
    for module in ("cache.stores.redis", "system.redis"):
        monkeypatch.setattr(f"proxy.{module}.DEADLINE_MAX", PATIENT)
    kind = request.param
    prefix, opened = f"test-{uuid.uuid4().hex}", list[Store]()

    def behind() -> Store:
        name = kind.removeprefix("tiered ")
        if name == "redis":
            return RedisStore(request.getfixturevalue("server"), prefix, MAX_ENTRY, wall=lambda: NOW, deadline=PATIENT)
        factory = BACKENDS[name]
        assert factory is not None
        return factory(StoreOptions(str(tmp_path / "d" / "cache.db"), 2**28, MAX_ENTRY, "", "", lambda: NOW))

    async def make() -> Store:
        store: Store
        if kind == "memory":
            store = TieredStore(MemoryStore(2**28, MAX_ENTRY))
        else:
            store = TieredStore(MemoryStore(2**28, MAX_ENTRY), behind()) if kind.startswith("tiered") else behind()
        await store.open()
        opened.append(store)
        slower = getattr(store, "slower", store)
        if isinstance(slower, RedisStore):
            await until(lambda: slower.up)
        return store

    yield make
    if opened and kind != "memory":
        await opened[-1].purge(ALL)
    for store in opened:
        await store.close()


@pytest.fixture
async def store(make: Make) -> Store:
    return await make()


async def everything(store: Store, which: Filter = ALL, limit: int = 500) -> dict[tuple[str, str], ListedEntry]:
    found: dict[tuple[str, str], ListedEntry] = {}
    after = ""
    while True:
        page = await store.list(which, after, limit)
        for listed in page.entries:
            found[(listed.entry.key, listed.entry.form)] = listed
        after = page.next
        if not after:
            return found


def test_every_backend_is_tested() -> None:
    assert set(BACKENDS) == {"memory", "sqlite", "redis"}


async def test_an_entry_is_read_as_it_was_stored(store: Store) -> None:
    assert await store.get("k", "json", NOW) is None
    assert store.put(entry())
    assert await store.get("k", "json", NOW) == entry()
    await store.flush()
    assert await store.get("k", "json", NOW) == entry()


async def test_the_forms_are_stored_separately(store: Store) -> None:
    store.put(entry(form="sse", body=b"data: [DONE]\n\n"))
    assert await store.get("k", "json", NOW) is None
    store.put(entry())
    await store.flush()
    assert await store.get("k", "json", NOW) == entry()
    assert await store.get("k", "sse", NOW) == entry(form="sse", body=b"data: [DONE]\n\n")


async def test_several_keys_are_looked_up_together(store: Store) -> None:
    for number in range(200):
        store.put(entry(f"k{number}", body=b"%d" % number))
    names = [f"k{number}" for number in range(0, 400, 2)]
    for _ in range(2):
        found = await store.get_many(names, "json", NOW)
        assert found is not None
        assert found == [entry(name, body=name[1:].encode()) for name in names[:100]] + [None] * 100
        await store.flush()
    assert await store.get_many(["k0"], "sse", NOW) == [None]
    assert await store.get_many([], "json", NOW) == []


async def test_the_last_stored_entry_is_read(store: Store) -> None:
    for number in range(5):
        store.put(entry(body=b"%d" % number))
    assert await store.get("k", "json", NOW) == entry(body=b"4")
    await store.flush()
    store.put(entry(body=b"new", model="other"))
    await store.flush()
    assert await store.get("k", "json", NOW) == entry(body=b"new", model="other")
    assert len(await everything(store)) == 1


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 100_000, 3_000_000])
async def test_bodies_of_any_size(store: Store, size: int) -> None:
    one = entry(body=os.urandom(size))
    assert store.put(one)
    assert await store.get("k", "json", NOW) == one
    await store.flush()
    assert await store.get("k", "json", NOW) == one


async def test_a_too_large_entry_is_refused(store: Store) -> None:
    assert not store.put(entry(body=bytes(MAX_ENTRY + 1)))
    await store.flush()
    assert await store.get("k", "json", NOW) is None


async def test_unusual_keys(store: Store) -> None:
    names = ["", "ü" * 300, "a:b*?[x]\\", "x" * 1000, "'; DROP TABLE entries_v1; --", "\n\0"]
    for name in names:
        store.put(entry(name, name.encode(), model=name, namespace=name, tags=(name,)))
    await store.flush()
    for name in names:
        found = await store.get(name, "json", NOW)
        assert found is not None
        assert found.body == name.encode()
        assert await store.purge(Filter(key=name), dry_run=True) == 1
        assert await store.purge(Filter(model=name, namespace=name, tag=name), dry_run=True) == 1
    assert len(await everything(store)) == len(names)


async def test_expired_entries_are_still_returned(store: Store) -> None:
    store.put(entry(stored_at=NOW - 3500))
    await store.flush()
    found = await store.get("k", "json", NOW + 1000)
    assert found is not None
    assert not found.fresh(NOW + 1000)


async def test_entries_survive_a_restart(make: Make, request: pytest.FixtureRequest) -> None:
    store = await make()
    entries = [entry(f"k{number}", b"%d" % number) for number in range(50)]
    for one in entries:
        assert store.put(one)
    await store.close()
    again = await make()
    found = [await again.get(one.key, "json", NOW) for one in entries]
    assert found == ([None] * 50 if "memory" in request.node.callspec.id else entries)


async def test_two_open_stores_see_each_others_entries(make: Make, request: pytest.FixtureRequest) -> None:
    if "memory" in request.node.callspec.id:
        pytest.skip("memory is each process's own")
    one, two = await make(), await make()
    one.put(entry("a"))
    two.put(entry("b"))
    await one.flush()
    await two.flush()
    assert await two.get("a", "json", NOW) == entry("a")
    assert await one.get("b", "json", NOW) == entry("b")
    two.put(entry("c", stored_at=NOW + 1))
    await two.flush()
    one.put(entry("c"))
    await one.flush()
    assert await two.get("c", "json", NOW) is not None


CASES: list[tuple[Filter, set[str]]] = [
    (ALL, {"a", "b", "c", "d"}),
    (Filter(key="a"), {"a"}),
    (Filter(key="nobody"), set()),
    (Filter(prefix=""), {"a", "b", "c", "d"}),
    (Filter(prefix="c"), {"c"}),
    (Filter(prefix="ca"), set()),
    (Filter(prefix="%"), set()),
    (Filter(model="gpt-4o-mini"), {"b", "d"}),
    (Filter(endpoint="embeddings"), {"c"}),
    (Filter(namespace=""), {"d"}),
    (Filter(tag="team:ads"), {"a", "b"}),
    (Filter(tag="team"), set()),
    (Filter(tag="team:a*"), {"a", "b"}),
    (Filter(tag="*:ad[rs]"), {"a", "b"}),
    (Filter(tag="ads*"), set()),
    (Filter(model="gpt-4o-*"), {"b", "d"}),
    (Filter(model="GPT-4o-*"), set()),
    (Filter(endpoint="embed*"), {"c"}),
    (Filter(namespace="?*", model="*mini"), {"b"}),
    (Filter(tag="team:ads\n"), set()),
    (Filter(stored_before=NOW), {"c"}),
    (Filter(model="gpt-4o-mini", namespace="", stored_before=NOW + 1), {"d"}),
    (Filter(key="a", model="gpt-4o-mini"), set()),
]


@pytest.mark.parametrize(("which", "wanted"), CASES)
async def test_purge_and_list(store: Store, which: Filter, wanted: set[str]) -> None:
    entries = [
        entry("a", tags=("team:ads", "run:1")),
        entry("a", form="sse", tags=("run:1", "team:ads")),
        entry("b", model="gpt-4o-mini", tags=("x", "team:ads")),
        entry("c", endpoint="embeddings", stored_at=NOW - 1),
        entry("d", model="gpt-4o-mini", namespace="", tags=()),
    ]
    for one in entries:
        store.put(one)
    matching = [one for one in entries if one.key in wanted]
    listed = await everything(store, which)
    assert {name: found.entry for name, found in listed.items()} == {
        (one.key, one.form): msgspec.structs.replace(one, body=b"") for one in matching
    }
    assert all(found.size > 0 for found in listed.values())
    assert await store.purge(which, dry_run=True) == len(matching)
    assert await store.purge(which) == len(matching)
    assert await store.purge(which) == 0
    for one in entries:
        assert (await store.get(one.key, one.form, NOW) is None) == (one in matching), one.key


async def test_every_process_hears_of_a_purge_once(make: Make, request: pytest.FixtureRequest) -> None:
    if "memory" in request.node.callspec.id:
        pytest.skip("memory is each process's own")
    one, two = await make(), await make()
    first, second = Filter(key="a", tag="t:1", stored_before=NOW + 0.5), Filter(prefix="x", namespace="\n")
    await one.purge(first, dry_run=True)
    assert (await one.purged(), await two.purged()) == ([], [])
    await one.purge(first)
    late = await make()
    await two.purge(second)
    assert (await one.purged(), await two.purged()) == ([first, second], [first, second])
    assert (await one.purged(), await two.purged()) == ([], [])
    assert await late.purged() == [second]
    for _ in range(3):
        await one.purge(ALL)
    assert await two.purged() == [ALL] * 3


async def test_a_process_that_did_not_listen_for_long_drops_everything(
    make: Make, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "memory" in request.node.callspec.id:
        pytest.skip("memory is each process's own")
    for module in ("sqlite", "redis"):
        monkeypatch.setattr(f"proxy.cache.stores.{module}.MAX_PURGES", 5)
    one, two = await make(), await make()
    for number in range(4):
        await one.purge(Filter(key=str(number)))
    assert await two.purged() == [Filter(key=str(number)) for number in range(4)]
    for number in range(8):
        await one.purge(Filter(key=str(number)))
    assert await two.purged() == [ALL]
    await one.purge(Filter(key="again"))
    assert await two.purged() == [Filter(key="again")]


async def test_a_purge_empties_the_memory_of_other_processes(
    make: Make, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tiered" not in request.node.callspec.id:
        pytest.skip("no memory in front")
    monkeypatch.setattr("proxy.cache.stores.tiered.POLL", 0.01)
    one, two = await make(), await make()
    assert isinstance(two, TieredStore)
    for key in ("a", "b"):
        one.put(entry(key))
    await one.flush()
    for key in ("a", "b"):
        assert await two.get(key, "json", NOW) == entry(key)
    assert await one.purge(Filter(key="a")) == 1
    async with asyncio.timeout(PATIENT):
        while two.peek("a", "json") is not None:  # noqa: ASYNC110 - a look is what is tested
            await asyncio.sleep(0.01)
    assert await two.get("a", "json", NOW) is None
    assert two.peek("b", "json") == entry("b")


async def test_several_entries_are_read_at_once(store: Store) -> None:
    entries = [entry("a"), entry("b", os.urandom(500_000)), entry("c", form="sse"), entry("ü" * 100)]
    for one in entries:
        store.put(one)
    names = [("a", "json"), ("a", "sse"), ("b", "json"), ("c", "sse"), ("ü" * 100, "json"), ("nobody", "json")]
    found = await store.read(names)
    assert sorted(found, key=lambda one: one.key) == entries
    assert await store.read([]) == []


async def test_pages_hold_each_entry_once(store: Store) -> None:
    for number in range(1200):
        store.put(entry(f"k{number:04}", tags=("even",) if number % 2 == 0 else ()))
        if number % 400 == 0:
            await store.flush()
    assert len(await everything(store, limit=100)) == 1200
    assert len(await everything(store, Filter(tag="even"), limit=100)) == 600
    assert await store.purge(Filter(tag="even"), dry_run=True) == 600
    assert await store.purge(Filter(tag="even")) == 600
    assert len(await everything(store)) == 600


async def test_an_entry_with_a_long_head_is_listed(store: Store) -> None:
    one = entry(tags=tuple(f"tag:{number}" for number in range(1000)))
    store.put(one)
    await store.flush()
    assert (await everything(store))[("k", "json")].entry.tags == one.tags


async def test_counts_and_sizes(store: Store) -> None:
    for number in range(10):
        store.put(entry(f"k{number}"))
    await store.flush()
    await store.get("k1", "json", NOW)
    await store.get("nobody", "json", NOW)
    stats = await store.stats()
    assert stats["state"] == "ok"
    assert stats["entries"] == 10


async def test_a_burst_of_writes_is_bounded_and_entries_are_intact(store: Store) -> None:
    """Puts that never wait: each is either refused, or there in the end."""
    kept = [number for number in range(3000) if store.put(entry(f"k{number}"))]
    assert len(kept) >= 1000
    await store.flush()
    found = await asyncio.gather(*(store.get(f"k{number}", "json", NOW) for number in kept[:1000]))
    assert all(found)


async def test_many_concurrent_readers(store: Store) -> None:
    entries = {f"k{number}": entry(f"k{number}", os.urandom(50)) for number in range(100)}
    for one in entries.values():
        store.put(one)
    await store.flush()
    keys = [random.choice(list(entries)) for _ in range(1000)]
    found = await asyncio.gather(*(store.get(key, "json", NOW) for key in keys))
    assert found == [entries[key] for key in keys]


async def test_cancelled_readers_do_not_affect_others(store: Store) -> None:
    entries = {f"k{number}": entry(f"k{number}", os.urandom(5000)) for number in range(50)}
    for one in entries.values():
        store.put(one)
    await store.flush()

    async def read(key: str) -> tuple[str, Entry | None]:
        return key, await store.get(key, "json", NOW)

    answered = 0
    for _ in range(20):
        tasks = [asyncio.create_task(read(random.choice(list(entries)))) for _ in range(50)]
        for task in tasks:
            if random.random() < 0.5:
                asyncio.get_running_loop().call_later(random.random() * 0.005, task.cancel)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, tuple):
                assert result[1] == entries[result[0]]
                answered += 1
    assert answered > 400


async def test_a_store_behaves_like_a_dictionary(store: Store) -> None:
    """A thousand random steps against a model."""
    dice = random.Random(7)
    model: dict[tuple[str, str], Entry] = {}
    for step in range(1000):
        key, form = f"k{dice.randrange(20)}", dice.choice(("json", "sse"))
        act = dice.random()
        if act < 0.5:
            changes: dict[str, Any] = {"form": form, "model": f"m{dice.randrange(3)}", "stored_at": NOW + step / 1000}
            model[key, form] = entry(key, dice.randbytes(dice.choice((10, 2000))), **changes)
            assert store.put(model[key, form])
        elif act < 0.95:
            assert await store.get(key, form, NOW) == model.get((key, form))
        elif act < 0.97:
            which = Filter(model=f"m{dice.randrange(3)}")
            gone = [name for name, one in model.items() if which.matches(one)]
            assert await store.purge(which) == len(gone)
            for name in gone:
                del model[name]
        else:
            await store.flush()
    assert set(await everything(store)) == set(model)


@pytest.mark.parametrize("form", ["json", "sse"])
async def test_the_newest_entry_of_several_clients_is_found_without_partition(make: Make, form: str) -> None:
    """Replay: whose answer it was does not matter. Memory alone cannot search, and is not asked to."""
    store = await make()
    if isinstance(store, TieredStore) and store.slower is None:
        pytest.skip("nothing stands behind memory")
    assert await store.newest("bare", form, NOW) is None
    store.put(entry("one", bare="bare", form=form, stored_at=NOW - 2))
    store.put(entry("other", bare="another", form=form))
    await store.flush()
    found = await store.newest("bare", form, NOW)
    assert found is not None
    assert (found.key, found.bare) == ("one", "bare")
    store.put(entry("two", bare="bare", form=form, stored_at=NOW - 1))
    await store.flush()
    found = await store.newest("bare", form, NOW)
    assert found is not None
    assert found.key == "two"
    store.put(entry("bare", form=form, stored_at=NOW))
    await store.flush()
    found = await store.newest("bare", form, NOW)
    assert found is not None
    assert found.key == "bare"
    assert await store.newest("bare", "json" if form == "sse" else "sse", NOW) is None
