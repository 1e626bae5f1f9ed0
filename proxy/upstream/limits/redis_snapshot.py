"""Read what all proxies have admitted, with each heartbeat, so that it is known when Redis is lost; or clear it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ...system.redis import RedisConnection
from ...system.redis_keys import literal, shape
from .redis_limiter import RedisRateLimiter

MAX_READ: Final = 200
"""Limiters read in one heartbeat; those read longest ago come first."""


async def read_usage(
    link: RedisConnection,
    sha: str,
    offset: int,
    limiters: Iterable[tuple[str, RedisRateLimiter]],
    clock: Callable[[], float],
    timeout: float,
) -> None:
    """Read the usage of those limiters for which it is out of date. Raises as `RedisConnection.run` does.

    sha: the script's digest.
    offset: ms that are added to the server's clock.
    limiters: each with the name of its Redis hash.
    clock: returns monotonic seconds.
    timeout: seconds.
    """
    now = clock()
    outdated = sorted(
        ((key, each) for key, each in limiters if each.windows and each.stale(now)), key=lambda one: one[1].known_at
    )[:MAX_READ]
    if not outdated:
        return

    async def read() -> list[list[int]]:
        async with link.redis.pipeline(transaction=False) as pipe:
            for key, limiter in outdated:
                args: list[Any] = ["look", offset]
                for window in limiter.windows:
                    args += (window.name, *shape(window.span))
                pipe.evalsha(sha, 1, key, *args)
            return await pipe.execute()

    found = await link.run(read, timeout)
    for (_, limiter), totals in zip(outdated, found, strict=True):
        limiter.note_window_usage(totals, clock())


async def clear_usage(redis: Redis, start: str, resets: str, lifetime: int) -> None:
    """Delete what all proxies have admitted, and tell them so. It does not raise if Redis does not work.

    start: the start of the hashes' names.
    resets: the key that counts resets, which every proxy reads with its heartbeat; it lasts for `lifetime` ms.
    """
    with contextlib.suppress(RedisError, OSError, TimeoutError):
        cursor = -1
        while cursor:
            cursor, keys = await redis.scan(max(cursor, 0), match=literal(start) + ":*", count=1000)
            if keys:
                await redis.unlink(*keys)
        await redis.incr(resets)
        await redis.pexpire(resets, lifetime)
