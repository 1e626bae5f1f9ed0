"""What the link to Redis does by itself."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from redis.exceptions import ResponseError

from proxy.system.redis import RedisConnection
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
