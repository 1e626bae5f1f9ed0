"""Who made which stored object, told through a real Valkey."""

from __future__ import annotations

import asyncio

import pytest

from proxy.upstream.keys import redis_owners as redis_objects
from proxy.upstream.keys.redis_owners import RedisOwners
from proxy.upstream.keys.stored_objects import KEPT_FOR
from tests.cache.stores.kit import PATIENT, until, valkey

pytestmark = pytest.mark.slow


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
        assert await other.get(["file-1"]) is None
        await one.put(["file-1", "vs_\ud800"], "k1")
        assert await other.get(["x", "file-1"]) == "k1"
        assert await other.get(["vs_\ud800"]) == "k1"
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
            await objects.put(["file-1"], "k1")
            assert await objects.get(["file-1"]) is None
        assert not objects.link.up
    finally:
        await objects.close()
