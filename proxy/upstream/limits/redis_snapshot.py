"""What others have admitted since we last asked: looked up with each sign of life, so that a loss finds it known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from ...system.redis import RedisConnection
from ...system.redis_keys import shape
from .redis_limiter import RedisRateLimiter

MOST: Final = 200
"""Allowances looked at in one go; the others have their turn when these are known."""


async def read_usage(
    link: RedisConnection,
    sha: str,
    offset: int,
    allowances: Iterable[tuple[str, RedisRateLimiter]],
    clock: Callable[[], float],
    patience: float,
) -> None:
    """allowances: each with the name of its hash; clock: monotonic seconds. sha: the script's.

    Raises as `RedisConnection.run` does.
    """
    now = clock()
    asked = sorted(
        ((key, each) for key, each in allowances if each.windows and each.stale(now)), key=lambda one: one[1].known_at
    )[:MOST]
    if not asked:
        return

    async def ask() -> list[list[int]]:
        async with link.redis.pipeline(transaction=False) as pipe:
            for key, allowance in asked:
                args: list[Any] = ["look", offset]
                for window in allowance.windows:
                    args += (window.name, *shape(window.span))
                pipe.evalsha(sha, 1, key, *args)
            return await pipe.execute()

    told = await link.run(ask, patience)
    for (_, allowance), totals in zip(asked, told, strict=True):
        allowance.looked(totals, clock())
