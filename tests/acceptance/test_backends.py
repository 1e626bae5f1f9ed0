"""SQLite and Redis behind memory: what survives a restart, what is shared, what a failure costs (docs/caching.md)."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.stores.kit import Valkey, valkey
from tests.client import Client, ask
from tests.launch import Config, Launch, ProxyProcess, settings
from tests.scripted_upstream import ScriptedUpstream


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as running:
        yield running


def on_disk(port: int, path: Path) -> Config:
    return settings(port, cache={"backend": "sqlite", "path": str(path)})


def in_redis(port: int, url: str) -> Config:
    return settings(port, cache={"backend": "redis"}, redis={"url": url})


async def stored(client: Client, proxy: ProxyProcess) -> None:
    """Returns when the answer to `ask("one")` can be read: within a second, more on a busy machine."""
    for _ in range(100):
        if (await client.send(proxy, ask("one"), {"Cache-Control": "only-if-cached"})).status == 200:
            return
        await asyncio.sleep(0.05)
    pytest.fail("it never was")


async def test_sqlite_answers_after_a_restart(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "cache.db"
    first = launch(on_disk(upstream.port, path))
    assert f"cache: sqlite {path}" in first.stderr_so_far()
    result = await client.send(first, ask("one"))
    streamed = await client.send(first, ask("another", stream=True))
    first.terminate()
    assert first.wait() == 0
    again = launch(on_disk(upstream.port, path))
    hit = await client.send(again, ask("one"))
    assert (hit.cache, hit.body, hit.headers["X-Proxy-Cost-USD"]) == ("hit", result.body, "0.000000")
    hit = await client.send(again, ask("another", stream=True))
    assert (hit.cache, hit.body) == ("hit", streamed.body)
    assert upstream.count == 2
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700


async def test_two_processes_share_a_sqlite_file(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    one, two = (launch(on_disk(upstream.port, tmp_path / "cache.db")) for _ in range(2))
    result = await client.send(one, ask("one"))
    await stored(client, two)
    assert (await client.send(two, ask("one"))).body == result.body
    assert upstream.count == 1


async def test_a_file_that_is_no_database_is_moved_aside(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "cache.db"
    path.write_bytes(b"not a database, but long enough to look at " * 100)
    proxy = launch(on_disk(upstream.port, path))
    assert [(await client.send(proxy, ask("one"))).cache for _ in range(2)] == ["miss", "hit"]
    assert list(tmp_path.glob("cache.db.corrupt-*"))


async def test_redis_is_shared_and_every_key_expires(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    one, two = (launch(in_redis(upstream.port, server.url)) for _ in range(2))
    result = await client.send(one, ask("one"))
    await stored(client, two)
    hit = await client.send(two, ask("one"))
    assert (hit.cache, hit.body) == ("hit", result.body)
    assert upstream.count == 1
    keys = [line for line in server.say("KEYS", "*").split(b"\r\n") if line.startswith(b"openai-proxy:")]
    assert keys
    assert all(len(key) <= 160 for key in keys)
    assert b":-1\r\n" not in [server.say("PTTL", key) for key in keys]  # a lease may be gone by now: -2


async def test_a_redis_that_is_not_there_costs_at_most_a_miss(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxy = launch(in_redis(upstream.port, f"unix://{tmp_path}/nothing"))
    for number in range(5):
        result = await client.send(proxy, ask(str(number)))
        assert (result.status, result.cache) == (200, "miss")
    assert (await client.send(proxy, ask("0"))).cache == "hit"  # from memory
    assert (await client.get(proxy, "/readyz")).status == 200


async def test_a_frozen_redis_costs_at_most_a_miss(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    proxy = launch(in_redis(upstream.port, server.url))
    assert (await client.send(proxy, ask("before"))).cache == "miss"
    server.signal(signal.SIGSTOP)
    try:
        seconds = 0.0
        for number in range(10):
            result = await client.send(proxy, ask(str(number)))
            assert (result.status, result.cache) == (200, "miss")
            seconds += result.seconds
        assert seconds < 10.0  # 0.1 s for each of the first three; two seconds for each would be 20
    finally:
        server.signal(signal.SIGCONT)
