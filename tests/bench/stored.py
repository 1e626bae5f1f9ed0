"""What an entry costs: sets and gets per second of SQLite, memory for many entries, entries per GiB."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from proxy.cache.codec import decode, encode
from proxy.cache.entry import Entry
from proxy.cache.stores.interface import Store
from proxy.cache.stores.memory import MemoryStore
from proxy.cache.stores.redis import RedisStore
from proxy.cache.stores.sqlite import SQLiteStore
from proxy.cost.usage import Usage
from tests.cache.stores.kit import Valkey
from tests.launch import ROOT

from .wire import answer_body

GIB: Final = 2**30
_FEW: Final = 500
_HEADERS: Final = (
    (b"Content-Type", b"application/json"),
    (b"openai-processing-ms", b"412"),
    (b"openai-version", b"2020-10-01"),
    (b"x-request-id", b"req_00000000000000000000000000000000"),
)
_TRAITS: Final = " ".join(
    f"{name}:{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    for name in ("model", "upstreams", "messages", "temperature")
)


def words(seed: int = 7) -> Callable[[int], str]:
    """What makes text of so many characters that packs about as English does: few words often, many seldom."""
    dice = random.Random(seed)
    known = ["".join(dice.choices("etaoinshrdlucmfwypvbgk", k=dice.randint(1, 9))) for _ in range(5000)]
    shares = [1 / (rank + 3) for rank in range(len(known))]

    def text(length: int) -> str:
        return " ".join(dice.choices(known, shares, k=length // 3))[:length]

    return text


def entries(count: int, size: int) -> list[Entry]:
    """Chat answers of `size` bytes, no two alike, each with objects of its own as what came over the network has."""
    text = words()
    before, _, after = answer_body(size).partition(b"x" * 32)
    after = after.lstrip(b"x")
    now, made = time.time(), []
    for number in range(count):
        key = hashlib.sha256(b"%d" % number).hexdigest()
        body = before + text(size - len(before) - len(after)).encode() + after
        entry = Entry(
            key=key,
            form="json",
            status=200,
            headers=_HEADERS,
            body=body,
            usage_span=None,
            stored_at=now,
            ttl=86400.0,
            endpoint="chat",
            model="gpt-4o-mini",
            answer_model="gpt-4o-mini-2024-07-18",
            usage=Usage(234, 567, 801, 0, 0, 0),
            cost="0.000375",
            namespace="",
            tags=(),
            sampled=False,
            traits=_TRAITS,
        )
        copy = decode(b"".join(encode(entry)), key, "json")
        assert copy is not None
        made.append(copy)
    return made


async def sets(store: Store, given: list[Entry]) -> float:
    """Sets a second, all written at the end."""
    began = time.perf_counter()
    for start in range(0, len(given), _FEW):
        for entry in given[start : start + _FEW]:
            assert store.put(entry)
        await store.flush()
    return len(given) / (time.perf_counter() - began)


async def gets(store: Store, given: list[Entry]) -> float:
    """Gets a second, one after the other."""
    keys = [entry.key for entry in given]
    random.Random(1).shuffle(keys)
    began = time.perf_counter()
    for key in keys:
        assert await store.get(key, "json", time.time()) is not None
    return len(given) / (time.perf_counter() - began)


async def sqlite(home: Path, given: list[Entry]) -> tuple[float, float, float]:
    """(sets a second, gets a second, bytes of the file an entry)."""
    path = home / f"{time.monotonic_ns()}.db"
    store = SQLiteStore(path, 4 * GIB, 8 * 2**20)
    await store.open()
    set_ = await sets(store, given)
    await store.close()  # what is read must come from the file
    store = SQLiteStore(path, 4 * GIB, 8 * 2**20)
    await store.open()
    got = await gets(store, given)
    await store.close()
    return set_, got, path.stat().st_size / len(given)


async def redis(server: Valkey, given: list[Entry]) -> tuple[float, float, float]:
    """(sets a second, gets a second, bytes of Redis' memory an entry)."""

    def used() -> int:
        found = re.search(rb"used_memory:(\d+)", server.say("INFO", "memory"))
        assert found
        return int(found[1])

    store = RedisStore(server.url, f"b{time.monotonic_ns()}", 8 * 2**20, deadline=5.0)
    await store.open()
    before = used()
    set_, got = await sets(store, given), await gets(store, given)
    taken = used() - before
    await store.close()
    return set_, got, taken / len(given)


def memory(count: int, size: int) -> dict[str, float]:
    """In a process of its own: bytes an entry, as the memory store counts them and as the system does."""
    argv = [sys.executable, "-m", "tests.bench.stored", str(count), str(size)]
    told: dict[str, float] = json.loads(subprocess.run(argv, cwd=ROOT, check=True, capture_output=True).stdout)
    return told


def rss() -> int:
    """Resident bytes of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def fill(count: int, size: int) -> dict[str, float]:
    """What `memory` tells, measured here."""
    store = MemoryStore(64 * GIB, 8 * 2**20)
    some = entries(1000, size)
    packed = [(entry, b"".join(encode(entry))) for entry in some]
    before = rss()
    for number in range(count):
        entry, blob = packed[number % len(packed)]
        copy: Any = decode(blob, entry.key, "json")
        copy = msgspec.structs.replace(copy, key=f"{number:064x}")
        store.put(copy)
    return {"counted": store.stats()["bytes"] / count, "resident": (rss() - before) / count}


async def figures(home: Path, server: Valkey, count: int, many: int) -> list[dict[str, Any]]:
    """Of 1 KB and 2 KB answers, what each store takes for one, and how fast. many: entries in memory."""
    rows: list[dict[str, Any]] = []
    for size in (1024, 2048):
        given = entries(count, size)
        for name, measured in (("sqlite", await sqlite(home, given)), ("redis", await redis(server, given))):
            set_, got, each = measured
            rows.append({"store": name, "size": size, "sets": set_, "gets": got, "bytes": each, "per_gib": GIB / each})
        told = await asyncio.to_thread(memory, many, size)
        rows.append({"store": "memory", "size": size, "entries": many, "bytes": told["counted"], **told})
        rows[-1]["per_gib"] = GIB / told["counted"]
    return rows


if __name__ == "__main__":
    print(json.dumps(fill(int(sys.argv[1]), int(sys.argv[2]))))
