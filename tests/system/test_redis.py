"""What the link to Redis does by itself."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from redis.exceptions import ResponseError

from proxy.system.redis import RedisConnection, UnexpectedReply
from tests.garbage import uncollected


async def test_a_failed_command_leaves_no_reference_cycle() -> None:
    link, found = RedisConnection("redis://127.0.0.1:1", 0.5), Counter[str]()

    async def refused() -> None:
        raise ResponseError("no")

    async def late() -> None:
        await asyncio.sleep(0.05)

    with uncollected(found, ours=True):
        for _ in range(3):
            with pytest.raises(ResponseError):
                await link.run(refused, 1.0)
            with pytest.raises(TimeoutError):
                await link.run(late, 0.01)
        await asyncio.sleep(0.1)
    await link.close()
    assert not found


FAULTS = [AttributeError, TypeError, ValueError, AssertionError, KeyError, RuntimeError, RecursionError, MemoryError]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_of_the_driver_or_a_reply_of_another_shape_is_an_error_of_redis(
    fault: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    link = RedisConnection("redis://127.0.0.1:1", 0.5)

    async def command() -> None:
        raise fault("'NoneType' object has no attribute 'readline'")

    for _ in range(3):
        with pytest.raises(UnexpectedReply):
            await link.run(command, 1.0)
    await link.close()
    assert fault.__name__ in caplog.text
    assert len(caplog.records) == 1  # once a minute
    assert link.failures > 0


async def test_a_probe_survives_a_driver_that_cannot_even_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    link = RedisConnection("redis://127.0.0.1:1", 0.5)
    pings = asyncio.Event()

    async def ping() -> None:
        pings.set()
        raise AttributeError("closed while connecting")

    async def disconnect(inuse_connections: bool = False) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(link, "_ping", ping)
    monkeypatch.setattr(link._pool, "disconnect", disconnect)
    await link.open()
    assert pings.is_set()
    assert link._probing is not None
    assert not link._probing.done()
    await link.close()
