"""Who made which stored object, told through a real Valkey."""

from __future__ import annotations

import asyncio

import pytest

from proxy.upstream.keys import redis_owners as redis_objects
from proxy.upstream.keys.owner_table import KEPT_FOR, digest_of
from proxy.upstream.keys.redis_owners import RedisOwners
from tests.cache.stores.kit import PATIENT, until, valkey

pytestmark = pytest.mark.slow

FILE, STORE = digest_of("file-1"), digest_of("vs_\ud800")


async def test_owners_are_shared_between_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEADLINE", "_PUT_DEADLINE"):
        monkeypatch.setattr(redis_objects, name, PATIENT)
    with valkey() as server:
        await told(server.url)


async def told(url: str) -> None:
    one, other = RedisOwners(url, "t"), RedisOwners(url, "t")
    await asyncio.gather(one.open(), other.open())
    await until(lambda: one.link.up and other.link.up)
    try:
        assert await other.get([FILE]) == {}
        await one.put([FILE, STORE], "m1\nanna\n", False)
        await other.put([FILE], "m2\n\n", True)  # the owner that is known stays
        assert await other.get([digest_of("x"), FILE]) == {FILE: "m1\nanna\n"}
        await one.put([FILE], "m2\n\n", False)
        assert await other.get([FILE, STORE]) == {FILE: "m2\n\n", STORE: "m1\nanna\n"}
        keys = [key async for key in one.link.redis.scan_iter()]
        assert all(len(key) <= 160 and b"file-1" not in key for key in keys)
        for key in keys:
            assert 0 < await one.link.redis.ttl(key) <= KEPT_FOR
    finally:
        await asyncio.gather(one.close(), other.close())


async def test_without_redis_owners_are_unknown_at_once() -> None:
    with valkey() as server:
        objects = RedisOwners(server.url, "t")
        await objects.open()
        server.kill()
    try:
        for _ in range(5):
            await objects.put([FILE], "m1\n\n", False)
            assert await objects.get([FILE]) == {}
        assert not objects.link.up
    finally:
        await objects.close()
