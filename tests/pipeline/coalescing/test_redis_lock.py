"""Leases in a real Valkey: whoever holds the token, and nobody else, renews and gives back; trouble means none."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from proxy.pipeline.coalescing.redis_lock import RedisLockStore
from proxy.system.redis import RedisConnection
from tests.cache.stores.kit import HASTY, PATIENT, Valkey, until, valkey

pytestmark = pytest.mark.slow

NAME = "k" * 64 + ":sse without usage"


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as running:
        yield running


@pytest.fixture
async def leases(server: Valkey) -> AsyncIterator[RedisLockStore]:
    link = RedisConnection(server.url, PATIENT)
    await link.open()
    await until(lambda: link.up)
    yield RedisLockStore(link, "p" * 64, PATIENT)
    await link.close()


async def test_a_lock_is_held_until_it_is_released(leases: RedisLockStore) -> None:
    taken = [await leases.acquire(NAME, token, 1000.0) for token in ("a", "b", "a")]
    assert taken == ["acquired", "held", "acquired"]
    assert not await leases.renew(NAME, "b", 1000.0)
    await leases.release(NAME, "b", 0.0)
    assert await leases.renew(NAME, "a", 1000.0)
    await leases.release(NAME, "a", 0.0)
    assert await leases.acquire(NAME, "b", 1000.0) == "acquired"
    assert await leases.acquire("other", "c", 1000.0) == "acquired"


async def test_a_lock_expires(leases: RedisLockStore) -> None:
    assert await leases.acquire(NAME, "a", 0.05) == "acquired"
    await asyncio.sleep(0.2)
    assert not await leases.renew(NAME, "a", 1000.0)
    assert await leases.acquire(NAME, "b", 1000.0) == "acquired"


async def test_a_key_marked_open_is_not_waited_for(leases: RedisLockStore, server: Valkey) -> None:
    await leases.acquire(NAME, "a", 1000.0)
    await leases.release(NAME, "a", 500.0)
    assert [await leases.acquire(NAME, token, 1000.0) for token in ("a", "b")] == ["unavailable", "unavailable"]
    key = leases.key_of(NAME)
    assert 0 < int(server.say("PTTL", key).strip(b":\r\n")) <= 500_000
    server.say("PEXPIRE", key, "0")
    assert await leases.acquire(NAME, "b", 1000.0) == "acquired"


async def test_every_redis_key_is_short_and_expires(leases: RedisLockStore, server: Valkey) -> None:
    await leases.acquire(NAME * 10, "a", 1000.0)
    await leases.acquire(NAME, "a", 1000.0)
    await leases.release(NAME, "a", 1000.0)
    for name in (NAME, NAME * 10):
        key = leases.key_of(name)
        assert len(key.encode()) <= 160
        assert 0 < int(server.say("PTTL", key).strip(b":\r\n")) <= 1_000_000


async def test_without_redis_no_lock_is_available(leases: RedisLockStore, server: Valkey) -> None:
    assert await leases.acquire(NAME, "a", 1000.0) == "acquired"
    server.kill()
    assert await leases.acquire(NAME, "b", 1000.0) == "unavailable"
    assert not await leases.renew(NAME, "a", 1000.0)
    await leases.release(NAME, "a", 0.0)


async def test_after_another_commands_failure_no_lock_is_waited_for(leases: RedisLockStore, server: Valkey) -> None:
    server.signal(signal.SIGSTOP)
    leases._deadline = HASTY
    try:
        assert await leases.renew(NAME, "a", 1000.0) is False
        assert await leases.acquire(NAME, "a", 1000.0) == "unavailable"
        assert leases._link.failures == 1  # it was not asked again
    finally:
        server.signal(signal.SIGCONT)
