"""proxy.cache.stores.memory: bounded by bytes, least recently used out first, expired entries out in time."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.cache.entry import Entry
from proxy.cache.stores.build import BACKENDS
from proxy.cache.stores.memory import MemoryStore
from proxy.cost.usage import Usage


def entry(key: str = "k", body: bytes = b"x" * 100, **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "key": key,
        "form": "json",
        "status": 200,
        "headers": ((b"content-type", b"application/json"),),
        "body": body,
        "usage_span": None,
        "stored_at": 1000.0,
        "ttl": 60.0,
        "endpoint": "chat",
        "model": "gpt-4o",
        "answer_model": None,
        "usage": None,
        "cost": None,
        "namespace": "",
        "tags": (),
        "sampled": False,
    }
    return Entry(**{**values, **changes})


SIZE = entry("0").size


def store(entries: int = 3, max_entry: int = 10**6) -> MemoryStore:
    """Room for so many entries with keys of one letter."""
    return MemoryStore(entries * SIZE, max_entry)


def keys(memory: MemoryStore) -> set[str]:
    return {key for key in "abcdefghij" if memory.get(key, "json") is not None}


class TestGetAndPut:
    def test_an_entry_is_read_as_it_was_stored(self) -> None:
        memory = store()
        stored = entry("a")
        assert memory.get("a", "json") is None
        assert memory.put(stored)
        assert memory.get("a", "json") is stored
        assert memory.get("a", "sse") is None

    def test_both_forms_are_kept(self) -> None:
        memory = store()
        plain, stream = entry("a"), entry("a", form="sse")
        assert memory.put(plain)
        assert memory.put(stream)
        assert memory.get("a", "json") is plain
        assert memory.get("a", "sse") is stream

    def test_replacing_an_entry_adjusts_the_total(self) -> None:
        memory = store()
        memory.put(entry("a", b"x" * 100))
        memory.put(entry("a", b"x" * 10))
        assert memory.stats()["bytes"] == SIZE - 90
        assert memory.stats()["entries"] == 1
        assert memory.stats()["evictions"] == 0

    def test_stale_entries_are_returned(self) -> None:
        memory = store()
        memory.put(entry("a", ttl=0.0))
        assert memory.get("a", "json") is not None

    @pytest.mark.parametrize("change", [{"key": "other"}, {"form": "sse"}])
    def test_an_entry_in_the_wrong_place_is_dropped(self, change: dict[str, str]) -> None:
        memory = store()
        memory.put(entry("a"))
        memory._entries[("a", "json")] = msgspec.structs.replace(entry("a"), **change)
        assert memory.get("a", "json") is None
        assert memory.stats()["entries"] == 0


class TestBounds:
    def test_the_least_recently_used_entry_is_evicted_first(self) -> None:
        memory = store(3)
        for key in "abc":
            memory.put(entry(key))
        assert memory.get("a", "json") is not None
        memory.put(entry("d"))
        assert memory.get("b", "json") is None
        assert keys(memory) == {"a", "c", "d"}
        assert memory.stats()["evictions"] == 1

    def test_a_large_entry_evicts_several(self) -> None:
        memory = store(3)
        for key in "abc":
            memory.put(entry(key))
        assert memory.put(entry("d", b"x" * (SIZE + 100)))
        assert keys(memory) == {"c", "d"}
        assert memory.stats()["bytes"] == 3 * SIZE

    def test_a_too_large_entry_is_refused_and_evicts_none(self) -> None:
        memory = store(3, max_entry=2 * SIZE)
        memory.put(entry("a"))
        assert not memory.put(entry("b", b"x" * (2 * SIZE + 1)))
        assert not store(1).put(entry("b", b"x" * 101))
        assert memory.put(entry("c", b"x" * (2 * SIZE - 100))) is True
        assert keys(memory) == {"c"} or keys(memory) == {"a", "c"}

    def test_max_entry_limits_the_body(self) -> None:
        assert MemoryStore(10**6, 100).put(entry("a", b"x" * 100))
        assert not MemoryStore(10**6, 100).put(entry("a", b"x" * 101))

    @settings(max_examples=200)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from("abcdefgh"), st.sampled_from(["json", "sse"]), st.integers(0, 3000), st.booleans()
            ),
            max_size=60,
        )
    )
    def test_any_sequence_of_steps_agrees_with_a_model(self, steps: list[tuple[str, str, int, bool]]) -> None:
        """A list in order of use is the plain statement of what the store does."""
        limit = 5 * SIZE
        memory = MemoryStore(limit, 10**6)
        model: list[Entry] = []
        for key, form, length, write in steps:
            known = next((e for e in model if (e.key, e.form) == (key, form)), None)
            if not write:
                assert memory.get(key, form) is known
                if known is not None:
                    model = [e for e in model if e is not known] + [known]
                continue
            new = entry(key, b"x" * length, form=form)
            assert memory.put(new) is (new.size <= limit)
            if new.size <= limit:
                model = [e for e in model if e is not known] + [new]
                while sum(e.size for e in model) > limit:
                    model.pop(0)
            assert memory.stats()["bytes"] == sum(e.size for e in model) <= limit
            assert memory.stats()["entries"] == len(model)

    def test_the_total_is_the_memory_used(self) -> None:
        """Against tracemalloc, for small entries, where overhead is most."""
        count = 3000
        memory = MemoryStore(10**9, 10**6)
        gc.collect()
        tracemalloc.start()
        try:
            for i in range(count):
                number = f"{i:064d}"
                memory.put(
                    entry(
                        "k" + number,
                        number.encode() * 4,
                        headers=((b"x" + number.encode(), b"y" + number.encode()),),
                        model="m" + number,
                        usage=Usage(i + 1000, 2, 3),
                        cost="0." + number[-6:],
                        stored_at=1000.5 + i,
                    )
                )
            real = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert memory.stats()["bytes"] == pytest.approx(real, rel=0.15)


class TestSweep:
    def test_expired_entries_are_swept(self) -> None:
        memory = store(5)
        for key, ttl in (("a", 10.0), ("b", 30.0), ("c", 20.0)):
            memory.put(entry(key, ttl=ttl))
        assert memory.sweep(1009.9) == 0
        assert memory.sweep(1020.0) == 2
        assert keys(memory) == {"b"}
        assert memory.stats() == {
            "entries": 1,
            "bytes": SIZE,
            "max_bytes": 5 * SIZE,
            "evictions": 0,
            "expirations": 2,
        }
        assert memory.sweep(2000.0) == 1
        assert memory.stats()["bytes"] == 0
        assert memory.sweep(2000.0) == 0

    def test_entries_are_kept_for_the_grace_period(self) -> None:
        memory = store()
        memory.put(entry("a", ttl=10.0))
        assert memory.sweep(1069.0, grace=60.0) == 0
        assert memory.sweep(1070.0, grace=60.0) == 1

    def test_a_sweep_does_bounded_work(self) -> None:
        memory = store(10)
        for key in "abcdefghij":
            memory.put(entry(key))
        assert [memory.sweep(5000.0, limit=4) for _ in range(4)] == [4, 4, 2, 0]

    def test_a_replaced_entry_lives_as_long_as_the_new_one(self) -> None:
        memory = store()
        memory.put(entry("a", ttl=10.0))
        memory.put(entry("a", ttl=100.0))
        assert memory.sweep(1050.0) == 0
        assert keys(memory) == {"a"}
        assert memory.sweep(1100.0) == 1

    def test_evicted_entries_are_forgotten_by_the_sweep(self) -> None:
        memory = store(2)
        for i in range(2000):
            memory.put(entry("abcdefghij"[i % 10], ttl=float(i)))
        assert len(memory._expiry) <= 2 * 2 + 64
        assert memory.sweep(10**6) == 2


def test_the_table_of_backends() -> None:
    assert BACKENDS["memory"] is None
